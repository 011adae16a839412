"""Numbers to expect: the curves of a run, as it printed them.

    (time python recipes/sft_copilot.py --config recipes/mawps_first.yaml --dataset_name FILE) &> mawps_first.log
    python -m benchmarks.expected mawps_first.log [MORE.log ...]

Reads what recipes print, and adds it under the file's name to benchmarks/results/expected.json. Draws all of it into
docs/expected.png. `python -m benchmarks.tables` writes the tables of docs/expected.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.common import RESULTS

FILE = RESULTS / "expected.json"
ENTRY = re.compile(r"(?:^(\d+) )?(\{'[^{}]+\})", re.M)  # the loop of one's own prints the step before it
CURVES = ("pilot_nll", "rectified_nll", "pilot_token_accuracy", "rectified_token_accuracy", "copilot_loss")
COST = re.compile(r"(\d+) min (\d+) s, at most ([\d.]+) GB of memory")
PROCESSOR = re.compile(r"^(?:user|sys)\s+(\d+)m([\d.]+)s$", re.M)  # of bash's `time`
SHARE = re.compile(r"the Copilot takes (\d+)% of the Pilot's time")
STRENGTH = re.compile(r"λ = ([\d.]+), chosen")
RIGHT = re.compile(r"right answers\s*│\s*([\d.]+)%\s*│\s*([\d.]+)%")


def read_run(text: str) -> dict[str, Any]:
    """A run's output as figures: `training` and `evaluation`, each a list of entries, and what it cost.

    Raises:
        ValueError: If no entry of a Copilot is in it.
    """
    found: dict[str, Any] = {"training": [], "evaluation": []}
    for step, printed in ENTRY.findall(text):
        entry = {name: float(value) for name, value in ast.literal_eval(printed).items() if is_number(value)}
        at = {"step": int(step)} if step else {"epoch": entry.get("epoch")}
        for part, prefix in (("training", ""), ("evaluation", "eval_")):
            figures = {name: entry[prefix + name] for name in CURVES if prefix + name in entry}
            if "rectified_nll" in figures:
                found[part].append(at | figures)
    if not found["training"]:
        raise ValueError("This is no output of a run with a Copilot: no entry has rectified_nll.")
    flat = " ".join(text.split())
    for name, pattern in (("share", SHARE), ("strength", STRENGTH)):
        found[name] = float(match[1]) if (match := pattern.search(flat)) else None
    cost, seconds = COST.search(flat), PROCESSOR.findall(text)
    found["seconds"] = 60 * int(cost[1]) + int(cost[2]) if cost else None
    found["processor_seconds"] = sum(60 * int(m) + float(s) for m, s in seconds) if seconds else None
    found["gigabytes"] = float(cost[3]) if cost else None
    right = RIGHT.search(flat)
    found["right"] = [float(part) / 100 for part in right.groups()] if right else None
    return found


def is_number(value: Any) -> bool:
    try:
        return float(value) == float(value)
    except (TypeError, ValueError):
        return False


def plot(axes: Axes, name: str, run: dict[str, Any]) -> None:
    """NLL of both in training, before the Copilot learns from it, and in evaluation; and the Copilot's own loss."""
    unit = next(key for key in ("step", "epoch") if key in run["training"][0])
    drawn = (
        ("training", "copilot_loss", "tab:blue", ":", "copilot_loss"),
        ("training", "pilot_nll", "tab:gray", ":", "pilot_nll, training"),
        ("training", "rectified_nll", "tab:orange", ":", "rectified_nll, training"),
        ("evaluation", "pilot_nll", "tab:gray", "-", "pilot_nll, evaluation"),
        ("evaluation", "rectified_nll", "tab:orange", "-", "rectified_nll, evaluation"),
    )
    for part, curve, colour, style, label in drawn:
        points = [(entry[unit], entry[curve]) for entry in run[part] if curve in entry]
        axes.plot(*zip(*points, strict=True) if points else ([], []), style, color=colour, label=label)
    highest = max(entry["pilot_nll"] for entry in run["evaluation"] or run["training"])
    axes.set(title=name, xlabel=unit, ylabel="nats per token", ylim=(0, 1.3 * highest))


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    columns = min(3, len(runs))
    lines = -(-len(runs) // columns)
    figure, all_axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines), layout="constrained", squeeze=False
    )
    for axes in all_axes.flat[len(runs) :]:
        axes.set_axis_off()
    for axes, (name, run) in zip(all_axes.flat, runs.items(), strict=False):
        plot(axes, name, run)
    figure.legend(*all_axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "logs", type=Path, nargs="*", help="what recipes printed; without one the picture is drawn anew"
    )
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--picture", type=Path, default=RESULTS.parent.parent / "docs" / "expected.png")
    args = parser.parse_args()
    runs = json.loads(args.results.read_text()) if args.results.is_file() else {}
    runs |= {log.stem: read_run(log.read_text(encoding="utf-8")) for log in args.logs}
    args.results.write_text(json.dumps(runs, indent=1) + "\n")
    draw(runs, args.picture)
    for name, run in runs.items():
        print(name, {key: value for key, value in run.items() if not isinstance(value, list)}, len(run["evaluation"]))


if __name__ == "__main__":
    main()

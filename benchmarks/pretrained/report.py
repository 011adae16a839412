"""Tables of what `search.py` wrote, as Markdown.

    python -m benchmarks.pretrained.report WORK                # of a folder of arms, as search.py writes them
    python -m benchmarks.pretrained.report WORK --store NAME   # kept as results/pretrained/NAME.{json,md}
    python -m benchmarks.pretrained.report FILE WORK --store NAME  # the arms of both, of one machine
    python -m benchmarks.pretrained.report benchmarks/results/pretrained/search_h100.json

Every arm stands beside the Pilot alone that is best on validation rows among those that took no more training time
than it did (5 % tolerance), by the times that were measured with nothing else running. Differences are paired, with
95 % intervals by bootstrap of the test rows; positive is better than the Pilot alone. λ is chosen on validation rows
by NLL.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, paired_interval, standard_error, table_of_cells
from benchmarks.pretrained.arms import Result, nll_of
from benchmarks.pretrained.tasks import family

TOLERANCE = 1.05
ALONE = (1.0, 0.0)
COLUMNS = (
    *(
        "arm",
        "seed",
        "steps",
        "time",
        "α, λ",
        "NLL valid",
        "NLL test",
        "at λ = 1",
        "gain in nats",
        "right",
        "at λ = 1",
    ),
    *("gain in points", "sampled", "other task: NLL alone, so", "beside"),
)


@dataclass
class Results:
    """What was measured: arms, seconds of a step by task, and in words on which machine."""

    arms: list[Result]
    timings: dict[str, Any] = field(default_factory=dict)
    machine: str = ""

    @classmethod
    def read(cls, source: Path) -> Results:
        """From a folder of `search.py`, or a file of [`write`]."""
        if source.is_file():
            return cls(**json.loads(source.read_text()))
        arms = [json.loads(file.read_text()) for file in sorted((source / "arms").glob("*.json"))]
        files = {file.stem.removeprefix("timing_"): file for file in source.glob("timing_*.json")}
        return cls(arms, {task: json.loads(file.read_text()) for task, file in files.items()})

    @classmethod
    def read_all(cls, sources: Sequence[Path]) -> Results:
        """Of one machine."""
        found = [cls.read(source) for source in sources]
        arms = {arm["name"]: arm for results in found for arm in results.arms}
        timings = {task: timing for results in found for task, timing in results.timings.items()}
        return cls(list(arms.values()), timings, found[0].machine)

    def write(self, file: Path) -> None:
        """All that the tables need, an arm a line."""
        file.parent.mkdir(parents=True, exist_ok=True)
        arms = ",\n".join(json.dumps(compact(arm), separators=(",", ":")) for arm in self.arms)
        timings, machine = json.dumps(self.timings), json.dumps(self.machine)
        file.write_text(f'{{"machine": {machine},\n"timings": {timings},\n"arms": [\n{arms}\n]}}\n')

    def seconds(self, result: Result) -> float:
        """Training time of an arm by the solo timing, or without one as it was among the others."""
        arm, timing = result["arm"], self.timings.get(family(result["arm"]["task"]))
        if timing is None:
            return seconds_among_others(result)
        per_step = _pilot_seconds(timing, arm["pilot"]["method"]) * (2 if arm["second"] else 1)
        if arm["copilot"] is None:
            return per_step * result["steps"]
        observe, round_ = _copilot_seconds(timing, arm["copilot"])
        return (per_step + observe + round_) * result["steps"] + round_ * result.get("replays", 0)

    def of(self, task: str) -> list[Result]:
        return sorted((r for r in self.arms if r["arm"]["task"] == task), key=nll_of)

    def reference(self, result: Result) -> Result | None:
        """The best Pilot alone of the same seed in the time of this arm, if there is one."""
        time, arm = self.seconds(result), result["arm"]
        alone = [r for r in self.of(arm["task"]) if r["arm"]["copilot"] is None and not r["arm"]["second"]]
        same_seed = (r for r in alone if r["arm"]["seed"] == arm["seed"])
        return next((r for r in same_seed if self.seconds(r) <= TOLERANCE * time), None)


def seconds_among_others(result: Result) -> float:
    """As long as training took, with a share of what the Copilots beside the same Pilot took together."""
    parts, arm = dict(result["seconds"]), result["arm"]
    pilot = parts.pop("pilot", 0.0) * (2 if arm["second"] else 1)
    return pilot if arm["copilot"] is None else pilot + sum(parts.values()) / result.get("copilots", 1)


def compact(result: Result) -> Result:
    """An arm without what no table shows: rows at other weights than the chosen ones and the Pilot's alone, and single
    sampled answers."""
    shown = dict.fromkeys([chosen_of(result), ALONE])
    kept = {**result, "rows": [{"weights": w, "nll": rows_at(result, w)["nll"]} for w in shown]}
    if "sampled" in result:
        kept["sampled"] = [row | {"right": [statistics.mean(row["right"])]} for row in result["sampled"]]
    return kept


def _pilot_seconds(timing: dict[str, Any], method: str) -> float:
    return sum(timing["pilots"].get(method, timing["pilots"]["lora"]).values())


def _copilot_seconds(timing: dict[str, Any], copilot: dict[str, Any]) -> tuple[float, float]:
    """Of a round: observing, and steps of the same shape; those of a shape that was not timed as a token Copilot's."""
    timed = [t for t in timing["copilots"] if t["shape"] == copilot["shape"]]
    timed = timed or [t for t in timing["copilots"] if t["shape"] == "token"]
    nearest = min(timed, key=lambda t: abs(t["steps"] - copilot["steps"]))
    return nearest["observe"], nearest["copilot"] * copilot["steps"] / nearest["steps"]


def rows_at(result: Result, weights: tuple[float, float]) -> dict[str, Any] | None:
    return next((row for row in result["rows"] if tuple(row["weights"]) == weights), None)


def greedy_at(result: Result, weights: tuple[float, float]) -> list[int] | None:
    found = (g["right"] for g in result.get("greedy", []) if tuple(g["weights"]) == weights)
    return next(found, None)


def chosen_of(result: Result) -> tuple[float, float]:
    return tuple(result["chosen"]["nll"])


def nll_gain(
    results: Sequence[Result], references: Sequence[Result], of_references: tuple[float, float] | None = None
) -> str:
    """Of an arm with some seeds over another with the same, at its chosen weights or at these: the mean over seeds,
    row by row, and the interval over rows."""
    tokens = np.array(results[0]["test"]["tokens"])  # [rows]
    gains = []
    for result, reference in zip(results, references, strict=True):
        both = (result, chosen_of(result)), (reference, of_references or chosen_of(reference))
        ours, theirs = (np.array(rows_at(r, weights)["nll"]) / tokens for r, weights in both)
        gains.append(theirs - ours)
    return interval(paired_interval(np.mean(gains, axis=0), tokens), 1, 3)


def answer_gain(result: Result, reference: Result) -> str:
    ours, theirs = (greedy_at(r, chosen_of(r)) for r in (result, reference))
    if ours is None or theirs is None:
        return ""
    return interval(paired_interval(np.array(ours, float) - np.array(theirs, float)), 100, 1)


def interval(found: tuple[float, float, float], scale: float, digits: int) -> str:
    mean, low, high = (scale * value for value in found)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def percent(values: list[float] | None) -> str:
    return "" if values is None else f"{100 * statistics.mean(values):.1f} %"


def line(results: Results, result: Result) -> list[str]:
    """The cells of one arm."""
    grid, chosen = [tuple(w) for w in result["grid"]], chosen_of(result)
    nll = dict(zip(grid, result["test"]["nll"], strict=True))
    reference, arm = results.reference(result), result["arm"]
    has_gain = reference is not None and reference["name"] != result["name"]
    other = "; ".join(f"{name} {v['alone']:.2f}, {v['chosen']:.2f}" for name, v in result["other"].items())
    full = (1.0, 1.0)
    return [
        result["name"].split(" ", 1)[1].rsplit(" seed", 1)[0],
        str(arm["seed"]),
        str(result["steps"]),
        f"{results.seconds(result):.1f} s",
        "" if chosen == ALONE else f"{chosen[0]:g}, {chosen[1]:g}",
        f"{nll_of(result):.4f}",
        f"{nll[chosen]:.4f}",
        f"{nll[full]:.4f}" if full in nll else "",
        nll_gain([result], [reference]) if has_gain else "",
        percent(greedy_at(result, chosen)),
        percent(greedy_at(result, full)),
        answer_gain(result, reference) if has_gain else "",
        percent(next((s["right"] for s in result.get("sampled", [])), None)),
        other,
        reference["name"].split(" ")[1] if has_gain else "",
    ]


def over_seeds(results: Results, task: str) -> list[list[str]]:
    """Means and standard errors of the arms that have several seeds."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results.of(task):
        groups[result["name"].split(" ", 1)[1].rsplit(" seed", 1)[0]].append(result)
    lines = []
    for name, group in groups.items():
        if len(group) > 1:
            nll = [dict(zip(map(tuple, r["grid"]), r["test"]["nll"], strict=True))[chosen_of(r)] for r in group]
            right = [100 * statistics.mean(g) for r in group if (g := greedy_at(r, chosen_of(r))) is not None]
            lines.append([name, str(len(group)), spread(nll, 4), spread(right, 1)])
    return lines


def spread(values: list[float], digits: int) -> str:
    error = standard_error(values)
    return "" if error is None else f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def timing_lines(timing: dict[str, Any]) -> list[list[str]]:
    """Milliseconds of a step by part."""
    lines = [[f"Pilot alone, {name}", f"{1000 * sum(v.values()):.0f}", "", ""] for name, v in timing["pilots"].items()]
    for t in timing["copilots"]:
        parts = [f"{1000 * t[part]:.0f}" for part in ("pilot", "observe", "copilot")]
        lines.append([f"with a Copilot: {t['shape']}, {t['steps']} steps in a round", *parts])
    return lines


def text_of(results: Results) -> str:
    """All tables, task by task."""
    parts = [f"{results.machine}, {len(results.arms)} arms"] if results.machine else []
    for task in sorted({r["arm"]["task"] for r in results.arms}, reverse=True):
        parts.append(f"## {task}")
        parts.append(table_of_cells(COLUMNS, [line(results, result) for result in results.of(task)]))
        if lines := over_seeds(results, task):
            parts.append(table_of_cells(("arm", "seeds", "NLL test", "right, %"), lines))
        if task in results.timings:
            columns = ("ms of a training step, alone on the machine", "Pilot", "observing", "Copilot")
            parts.append(table_of_cells(columns, timing_lines(results.timings[task])))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="folders of search.py, or files that --store wrote")
    parser.add_argument("--store", help="keep it under this name")
    parser.add_argument("--machine", default="", help="device and versions, in words, to be stored")
    parser.add_argument("--folder", type=Path, default=RESULTS / "pretrained", help="where --store writes")
    arguments = parser.parse_args()
    results = Results.read_all(arguments.sources)
    if arguments.store:
        results.machine = arguments.machine or results.machine
        results.write(arguments.folder / f"{arguments.store}.json")
        (arguments.folder / f"{arguments.store}.md").write_text(text_of(results) + "\n")
    print(text_of(results))


if __name__ == "__main__":
    main()

"""The pictures of what run.py and experiments.py wrote: gains over the Pilot with their intervals, the likelihood
against λ, and what one change at a time does.

    python -m benchmarks.accuracy.picture

Reads benchmarks/results/accuracy/, writes docs/results.png and docs/learning.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.accuracy.arms import TITLES
from benchmarks.accuracy.experiments import ALONE
from benchmarks.accuracy.groups import LEARNING
from benchmarks.accuracy.report import LOWER_IS_BETTER
from benchmarks.accuracy.run import RESULTS, TASKS

SHOWN = {
    "paper, λ chosen": "tab:blue",
    "copilot": "tab:orange",
    "copilot, λ chosen": "tab:red",
    "states": "tab:purple",
    "joint": "tab:gray",
    "longer": "tab:olive",
}


def plot_gains(axes: Axes, results: dict[str, dict[str, Any]]) -> None:
    """Relative gain in each task's own metric, better to the right, with 95 % intervals."""
    height = 0.8 / len(SHOWN)
    for i, (arm, colour) in enumerate(SHOWN.items()):
        for place, (task, result) in enumerate(results.items()):
            if arm not in result["arms"]:
                continue
            metric = TASKS[task].metric
            figures, pilot = result["arms"][arm][metric], result["arms"]["pilot"][metric]["mean"]
            sign = -1 if metric in LOWER_IS_BETTER else 1
            gain, *ends = (sign * figures[name] / pilot for name in ("difference", "low", "high"))
            errors = [[gain - min(ends)], [max(ends) - gain]]
            at = place + (i - len(SHOWN) / 2 + 0.5) * height
            label = TITLES[arm] if place == 0 else None
            axes.barh(at, gain, height, xerr=errors, color=colour, label=label, error_kw={"linewidth": 0.8})
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(results)), [f"{task}\n({TASKS[task].metric})" for task in results])
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    axes.set_xlabel("gain over the Pilot, relative")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def plot_strengths(axes: Axes, results: dict[str, dict[str, Any]]) -> None:
    """NLL on the validation rows against λ, as a share of the Pilot's: mean over seeds."""
    for task, result in results.items():
        found = result["arms"]["copilot, λ chosen"]["calibrations"]
        nll = np.mean([np.divide(c["nll"], c["nll"][0]) for c in found], axis=0)  # [λ]
        axes.plot(found[0]["strengths"], nll, marker=".", label=task)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="λ", ylabel="NLL / the Pilot's (valid)", ylim=(None, 1.15))
    axes.legend(frameon=False, fontsize=8)


def plot_learning(axes: Axes, task: str, runs: list[dict[str, Any]], names: list[str]) -> None:
    """NLL of every Copilot of the group `learning` as a change of its Pilot's, at λ = 1 and at the chosen one: means
    over seeds. The line is at ours."""
    places = [place for place, name in enumerate(names) if name in runs[0]]

    def changes(which: str) -> np.ndarray:
        nll = [[run[names[place]][which]["nll"] / run[ALONE]["own"]["nll"] for place in places] for run in runs]
        return 100 * (np.mean(nll, axis=0) - 1)  # [places], in %

    for which, label, marker in (("own", "λ = 1", "o"), ("chosen", "λ chosen on other rows", "x")):
        axes.scatter(changes(which), places, marker=marker, label=label)
    axes.axvline(changes("chosen")[0], color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", linewidth=0.3)
    axes.locator_params(axis="x", integer=True)
    axes.set(
        ylim=(len(names), -1),
        xlabel="NLL on validation rows against the Pilot's, %",
        title=f"{task}, seeds: {len(runs)}",
    )
    axes.legend(frameon=False, fontsize=8)


def read_runs(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """What the files say of each task that has one; `name` is a pattern for theirs."""
    files = {task: folder / name.format(task=task) for task in TASKS}
    return {task: json.loads(file.read_text()) for task, file in files.items() if file.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, default=RESULTS.parent.parent.parent / "docs")
    args = parser.parse_args()
    results = read_runs(args.results, "{task}.json")
    figure, (gains, strengths) = plt.subplots(1, 2, figsize=(12, 2 + 1.1 * len(results)))
    plot_gains(gains, results)
    plot_strengths(strengths, results)
    figure.tight_layout()
    figure.savefig(args.pictures / "results.png", dpi=110)
    learning = read_runs(args.results, "experiments_learning_{task}.json")
    if not learning:
        return
    figure, all_axes = plt.subplots(1, len(learning), figsize=(6 * len(learning), 5.5), sharey=True, squeeze=False)
    for axes, (task, result) in zip(all_axes[0], learning.items(), strict=True):
        plot_learning(axes, task, result["runs"], list(LEARNING.variants))
    figure.tight_layout()
    figure.savefig(args.pictures / "learning.png", dpi=110)


if __name__ == "__main__":
    main()

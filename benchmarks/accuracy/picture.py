"""The picture of what run.py wrote: gains over the Pilot with their intervals, and the likelihood against λ.

    python benchmarks/accuracy/picture.py

Reads benchmarks/results/accuracy/<task>.json, writes docs/results.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from arms import TITLES
from matplotlib.axes import Axes
from report import LOWER_IS_BETTER
from run import RESULTS, TASKS

SHOWN = {
    "paper, λ chosen": "tab:blue",
    "copilot": "tab:orange",
    "copilot, λ chosen": "tab:red",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=RESULTS.parent.parent.parent / "docs" / "results.png")
    args = parser.parse_args()
    files = {task: args.results / f"{task}.json" for task in TASKS}
    results = {task: json.loads(file.read_text()) for task, file in files.items() if file.is_file()}
    figure, (gains, strengths) = plt.subplots(1, 2, figsize=(12, 2 + 1.1 * len(results)))
    plot_gains(gains, results)
    plot_strengths(strengths, results)
    figure.tight_layout()
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()

"""The pictures of what run.py, experiments.py and moves.py wrote: gains over the Pilot with their intervals, the
likelihood against λ, what one change at a time does, and what is left of a gain beside other Pilots.

    python -m benchmarks.accuracy.picture

Reads benchmarks/results/accuracy/, writes docs/results.png, docs/learning.png and docs/moving.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.accuracy.arms import TITLES
from benchmarks.accuracy.experiments import ALONE
from benchmarks.accuracy.groups import LEARNING
from benchmarks.accuracy.report import LOWER_IS_BETTER
from benchmarks.accuracy.run import RESULTS, TASKS
from benchmarks.accuracy.shares import NOT_TUNED, Runs, share_of_gain
from benchmarks.common import Share

SHOWN = {
    "paper, λ chosen": "tab:blue",
    "copilot": "tab:orange",
    "copilot, λ chosen": "tab:red",
    "states": "tab:purple",
    "deeper": "tab:gray",
    "wider": "tab:brown",
    "longer": "tab:olive",
}
MOVED = {  # marker and colour, which Okabe and Ito chose for all eyes
    "moved, λ of home": ("o", "#0072B2"),
    "moved, λ chosen": ("D", "#D55E00"),
    "small logits": ("s", "#009E73"),
}
SHARES = (-0.5, 2.5)  # that are drawn in their place


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


def plot_moves(axes: Axes, task: str, runs: Runs) -> None:
    """What each arm has of the gain of a Copilot that was trained there, by destination: to the right is better."""
    for place, name in enumerate(runs[0]):
        shares = {arm: share_of_gain(runs, name, arm) for arm in MOVED}
        if None in shares.values():
            axes.text(0.5, place, "no gain there to have a share of", ha="center", va="center", fontsize=8)
            continue
        for i, (arm, (marker, colour)) in enumerate(MOVED.items()):
            plot_share(axes, shares[arm], place + 0.26 * (i - 1), marker, colour)
        axes.axhspan(place - 0.5, place + 0.5, color="0.95" if place % 2 else "white", zorder=0)
    for arm, (marker, colour) in MOVED.items():
        axes.plot([], [], marker, color=colour, label=arm)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(runs[0])), [f"{name}*" if name.endswith(NOT_TUNED) else name for name in runs[0]])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlim=SHARES, ylim=(len(runs[0]) - 0.5, -0.5))
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(MOVED), "columnspacing": 1.0}
    axes.legend(frameon=False, fontsize=8, title=f"{task}, seeds: {len(runs)}", **above)
    below = "*: of what fine-tuning gains; arrow: off the axis"
    axes.set_xlabel(f"share of the gain in NLL of a Copilot trained there\n{below}")


def plot_share(axes: Axes, found: Share, at: float, marker: str, colour: str) -> None:
    """A share with its standard error over seeds, or outside of the axis an arrow at its border with the value."""
    low, high = SHARES
    if low <= found.value <= high:
        axes.errorbar(found.value, at, xerr=found.error, fmt=marker, color=colour, markersize=5, capsize=2)
        return
    border, arrow, place = (low, "<", (6, 0)) if found.value < low else (high, ">", (-6, 0))
    axes.plot(border, at, arrow, color=colour, markersize=6, clip_on=False)
    side = {"ha": "left" if border == low else "right", "va": "center", "fontsize": 7}
    axes.annotate(f"{found.value:.0%}", (border, at), place, textcoords="offset points", **side)


def read_runs(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """What the files say of each task that has one; `name` is a pattern for theirs."""
    files = {task: folder / name.format(task=task) for task in TASKS}
    return {task: json.loads(file.read_text()) for task, file in files.items() if file.is_file()}


def draw_results(results: dict[str, dict[str, Any]]) -> Figure:
    figure, (gains, strengths) = plt.subplots(1, 2, figsize=(12, 2 + 1.1 * len(results)))
    plot_gains(gains, results)
    plot_strengths(strengths, results)
    return figure


def draw_runs(results: dict[str, dict[str, Any]], plot: Callable[[Axes, str, list], None]) -> Figure:
    """The runs of every task, side by side."""
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 5.5), sharey=True, squeeze=False)
    for own, (task, result) in zip(axes[0], results.items(), strict=True):
        plot(own, task, result["runs"])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, default=RESULTS.parent.parent.parent / "docs")
    args = parser.parse_args()
    drawn = {
        "results": ("{task}.json", draw_results),
        "learning": (
            "experiments_learning_{task}.json",
            partial(draw_runs, plot=partial(plot_learning, names=list(LEARNING.variants))),
        ),
        "moving": ("moves_{task}.json", partial(draw_runs, plot=plot_moves)),
    }
    for name, (files, draw) in drawn.items():
        if found := read_runs(args.results, files):
            figure = draw(found)
            figure.tight_layout()
            figure.savefig(args.pictures / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()

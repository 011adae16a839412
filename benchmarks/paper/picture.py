"""Accuracy against parameters, as in the paper's Figure 6: its lines, and ours on MAWPS beside its own points.

python -m benchmarks.paper.picture      # reads benchmarks/results, writes benchmarks/results/paper/parameters.{md,png}
"""

from __future__ import annotations

import json
from statistics import mean
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.common import RESULTS, table_of_cells
from benchmarks.paper.rows import ROWS

LINES = {"FLAN-T5": (8.74, 40.17), "LLaMA-3": (29.58, 50.20), "Qwen2.5": (12.40, 71.80)}  # a log10(billions) + b
RANGES = {"FLAN-T5": (0.077, 0.92), "LLaMA-3": (1.3, 9.1), "Qwen2.5": (3.6, 10.7)}  # where its points lie
BILLIONS = {  # Table 11: the Pilot, and with the Copilot
    "flan-t5-small+small": (0.077, 0.118),
    "flan-t5-base+base": (0.248, 0.385),
    "flan-t5-large+small": (0.783, 0.824),
    "flan-t5-large+base": (0.783, 0.920),
    "llama-3.2-1b+1b": (1.3, 2.4),
    "llama-3.2-3b+1b": (3.2, 4.3),
    "llama-3.1-8b+1b": (8.0, 9.1),
}
OURS = {"pilot": False, "deeper": False, "copilot": True, "states": True}  # arms, and whether a Copilot is among them
SMOLLM2 = 134_515_008  # parameters of SmolLM2-135M
BEST = {"method": "lora", "rate": 2e-3, "epochs": 1.5}


class Point(NamedTuple):
    """MAWPS, in %."""

    billions: float
    right: float
    has_copilot: bool


def paper_points() -> dict[str, list[Point]]:
    """Of Table 1, where Table 11 says how large."""
    points: dict[str, set[Point]] = {"FLAN-T5": set(), "LLaMA-3": set()}
    for name, sizes in BILLIONS.items():
        family = "FLAN-T5" if name.startswith("flan") else "LLaMA-3"
        for has_copilot, (size, right) in enumerate(
            zip(sizes, ROWS[f"{name}/arithmetic"].paper["mawps"], strict=True)
        ):
            points[family].add(Point(size, right, bool(has_copilot)))
    return {family: sorted(own) for family, own in points.items()}


def our_points() -> dict[str, list[Point]]:
    """Small Pilots from scratch (three seeds), and SmolLM2-135M with LoRA (one seed, λ chosen) at the rate that was
    best on validation rows. Right is an equation that has the right value."""
    arms = json.loads((RESULTS / "accuracy" / "mawps.json").read_text())["arms"]
    scratch = [
        Point(arms[arm]["parameters"] / 1e9, 100 * arms[arm]["value right"]["mean"], has) for arm, has in OURS.items()
    ]
    found = json.loads((RESULTS / "pretrained" / "search_h100.json").read_text())["arms"]
    smollm2 = []
    for arm in found:
        if arm["arm"]["task"] != "mawps" or arm["arm"]["pilot"] != BEST:
            continue
        (greedy,) = (g for g in arm["greedy"] if g["weights"] == arm["chosen"]["nll"])
        size = (SMOLLM2 + arm.get("copilot_parameters", 0)) / 1e9
        smollm2.append(Point(size, 100 * mean(greedy["right"]), arm["arm"]["copilot"] is not None))
    return {"from scratch, 1M": sorted(scratch), "SmolLM2-135M": sorted(smollm2)}


def fitted(points: list[Point]) -> tuple[float, float]:
    """a and b of right = a log10(billions) + b, by least squares."""
    slope, intercept = np.polyfit(np.log10([p.billions for p in points]), [p.right for p in points], 1)
    return float(slope), float(intercept)


def plot_line(axes: Axes, line: tuple[float, float], ends: tuple[float, float], **style) -> None:
    axes.plot(ends, [line[0] * np.log10(end) + line[1] for end in ends], **style)


def plot_points(axes: Axes, groups: dict[str, list[Point]]) -> None:
    """Filled with a Copilot, empty without; each group with its line."""
    for i, (name, points) in enumerate(groups.items()):
        colour, ends = f"C{i}", (points[0].billions, points[-1].billions)
        for point in points:
            axes.plot(
                point.billions, point.right, "o", color=colour, fillstyle="full" if point.has_copilot else "none"
            )
        plot_line(axes, fitted(points), ends, color=colour, label=name)
    axes.set(xscale="log", xlabel="parameters, billions", title="MAWPS: ours equations, theirs numbers, right, %")
    axes.legend(frameon=False, title="filled: with a Copilot", fontsize=8)


def text_of(groups: dict[str, list[Point]]) -> str:
    """The fitted lines, and the paper's."""
    cells = [[name, f"{a:.2f}", f"{b:.2f}", "Figure 6, reasoning"] for name, (a, b) in LINES.items()]
    for name, points in groups.items():
        slope, intercept = fitted(points)
        cells.append([name, f"{slope:.2f}", f"{intercept:.2f}", f"MAWPS, {len(points)} points"])
    return table_of_cells(("right = a log10(billions) + b", "a", "b", "of"), cells)


def main() -> None:
    groups = our_points() | {f"{family}, the paper": own for family, own in paper_points().items()}
    figure, (lines, points) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, line in LINES.items():
        plot_line(lines, line, RANGES[name], label=name)
    lines.set(xscale="log", xlabel="parameters, billions", title="the paper's Figure 6: reasoning, %")
    lines.legend(frameon=False)
    plot_points(points, groups)
    folder = RESULTS / "paper"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "parameters.png", dpi=110)
    (folder / "parameters.md").write_text(text_of(groups) + "\n")
    print(text_of(groups))


if __name__ == "__main__":
    main()

"""Kept runs into one table: means over seeds, and paired differences to the Pilot on the same test items."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.common import paired_interval, standard_error

Run = dict[str, dict[str, Any]]  # arms of one seed
LOWER_IS_BETTER = ("nll",)


def mean_of(figures: list) -> float:
    """Σ weight · value / Σ weight."""
    values, weights = figures
    return float(np.average(values, weights=weights))


def difference(runs: list[Run], arm: str, metric: str, base: str = "pilot") -> dict[str, float]:
    """Mean difference over seeds, and its 95 % interval over test items: paired bootstrap of items, BCa."""
    both = [(run[arm]["figures"][metric], run[base]["figures"][metric]) for run in runs]
    gains = np.mean([np.subtract(a[0], b[0]) for a, b in both], axis=0)  # [items]
    weights = both[0][0][1]
    mean, low, high = paired_interval(gains, None if weights is None else np.array(weights))
    return {"difference": mean, "low": low, "high": high}


def summarise(runs: list[Run], metrics: Iterable[str]) -> dict[str, dict[str, Any]]:
    """For every arm: size, λ of each seed, and each metric's mean, standard error over seeds and difference."""
    summary = {}
    for arm in runs[0]:
        row = {"parameters": runs[0][arm]["parameters"], "strengths": [run[arm].get("strength") for run in runs]}
        row["calibrations"] = [run[arm]["calibration"] for run in runs if "calibration" in run[arm]]
        row |= {"checks": [run[arm]["checks"] for run in runs]} if "checks" in runs[0][arm] else {}
        for metric in metrics:
            means = [mean_of(run[arm]["figures"][metric]) for run in runs]
            row[metric] = {"mean": statistics.mean(means), "standard_error": standard_error(means), "by_seed": means}
            if arm != "pilot":
                row[metric] |= difference(runs, arm, metric)
                pilot = statistics.mean(mean_of(run["pilot"]["figures"][metric]) for run in runs)
                row[metric]["relative"] = row[metric]["difference"] / pilot if pilot else None
        summary[arm] = row
    return summary


def shown(metric: str, value: float, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.4f}" if metric == "nll" else f"{value:{'+' if signed else ''}.1%}"


def cell(metric: str, figures: dict[str, Any]) -> str:
    error = figures["standard_error"]
    return shown(metric, figures["mean"]) + (f" ± {shown(metric, error)}" if error is not None else "")


def change(metric: str, figures: dict[str, Any]) -> str:
    """Relative difference, and the interval of the absolute one."""
    if "difference" not in figures:
        return ""
    interval = f"[{shown(metric, figures['low'], True)}, {shown(metric, figures['high'], True)}]"
    relative = f"{figures['relative']:+.1%} " if figures["relative"] is not None else ""
    return f"{relative}({shown(metric, figures['difference'], True)} {interval})"


def rows_of(
    summary: dict[str, dict[str, Any]], titles: dict[str, str], metrics: list[str], costs: dict[str, dict[str, float]]
) -> list[dict[str, str]]:
    """Rows of the table: the first metric with its difference, then NLL with its own, then the others; costs are
    ratios to the Pilot alone."""
    rows = []
    for arm, figures in summary.items():
        strengths = [f"{strength:g}" for strength in figures["strengths"] if strength is not None]
        row = {"arm": titles.get(arm, arm), "parameters": f"{figures['parameters']:,}", "λ": ", ".join(strengths)}
        ratios = costs.get(arm.partition(",")[0], {})
        row |= {f"{work} time": f"{ratios[work]:.2f}" if ratios else "" for work in ("training", "generation")}
        for i, metric in enumerate(metrics):
            row[metric] = cell(metric, figures[metric])
            if i < 2:
                row[f"against the Pilot{' ' * i}"] = change(metric, figures[metric])
        rows.append(row)
    return rows

"""Figures into text, and what the pages call tasks, arms and Copilots."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Share, table_of_cells

TASKS = {  # name: the metric that it is judged by, and how the pages call the two
    "arithmetic": ("exact match", "generated arithmetic, right answers"),
    "text": ("nll", "GSM8K rationales, NLL per token (less is better)"),
    "mawps": ("value right", "MAWPS, equations with the right value"),
    "recommendation": ("H@10", "LastFM, next item among 3,646, H@10"),
}
ARMS = {
    "pilot": "Pilot alone",
    "copilot": "+ token Copilot, λ = 1",
    "copilot, λ chosen": "+ token Copilot, λ with the least NLL",
    "copilot, λ by accuracy": "+ token Copilot, λ with the most right tokens",
    "states": "+ state Copilot, λ = 1",
    "paper": "+ the paper's preset, λ = 1",
    "deeper": "deeper Pilot of the same total size",
    "wider": "wider Pilot of the same total size",
    "longer": "Pilot, 2.5 times the steps",
}
COPILOTS = {"tokens": "token Copilot", "pilot": "state Copilot"}


def file_of(name: str) -> Path:
    return RESULTS / f"{name}.json"


def read(name: str) -> dict[str, Any]:
    return json.loads(file_of(name).read_text(encoding="utf-8"))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return table_of_cells(list(head), map(list, rows)) + "\n"


def share(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} %".replace("-", "−")


def figure(metric: str, found: dict[str, Any]) -> str:
    """A mean and its standard error over seeds, where there are several."""
    value, error = found["mean"], found["standard_error"]
    if error is None:
        return f"{value:.3f}" if metric == "nll" else f"{100 * value:.1f} %"
    return f"{value:.3f} ± {error:.3f}" if metric == "nll" else f"{100 * value:.1f} ± {100 * error:.1f} %"


def gain(metric: str, found: dict[str, Any]) -> str:
    """The difference to the Pilot in nats or points, and its 95 % interval."""
    scale, form = (1, "+.3f") if metric == "nll" else (100, "+.1f")
    value, low, high = (f"{scale * found[name]:{form}}".replace("-", "−") for name in ("difference", "low", "high"))
    return f"{value} [{low}, {high}]"


def is_clear(found: dict[str, Any]) -> bool:
    """Whether the interval of the difference leaves zero out."""
    return found["low"] > 0 or found["high"] < 0


def percent(found: Share | None) -> str:
    """A share with its standard error; of no gain there is none."""
    if found is None:
        return "no gain"
    error = "" if found.error is None else f" ± {100 * found.error:.0f}"
    return f"{100 * found.value:.0f}{error} %".replace("-", "−")


def spread(found: dict[str, Any], sign: str = "") -> str:
    """A mean and its standard error over seeds, if there are several."""
    error = found["standard_error"]
    return f"{found['mean']:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def as_printed(name: str) -> Callable[[], str]:
    """A table that its benchmark wrote as Markdown."""
    return lambda: (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip() + "\n"

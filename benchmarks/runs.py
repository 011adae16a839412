"""What the accuracy benchmarks share: runs that are kept, and the paired bootstrap."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap


def kept(file: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, or what an earlier run with the same settings gave."""
    if not is_kept(file, settings):
        keep(file, settings, make())
    return json.loads(file.read_text())["result"]


def is_kept(file: Path, settings: dict[str, Any]) -> bool:
    return file.is_file() and json.loads(file.read_text())["settings"] == _as_json(settings)


def keep(file: Path, settings: dict[str, Any], result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"settings": _as_json(settings), "result": result}))


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


def paired_interval(gains: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float, float]:
    """Mean gain Σ weight · gain / Σ weight over items, and its 95 % interval by BCa bootstrap of the items.

    Args:
        gains: `[items]`, differences of two arms on the same items.
        weights: `[items]`; None weighs all alike.
    """
    weights = np.ones_like(gains) if weights is None else weights
    mean = float(np.average(gains, weights=weights))
    if not gains.any():
        return mean, 0.0, 0.0

    def statistic(gain: np.ndarray, weight: np.ndarray, axis: int = -1) -> np.ndarray:
        return (gain * weight).sum(axis) / weight.sum(axis)

    settings = {"paired": True, "n_resamples": 4000, "batch": 200, "rng": 0}
    interval = bootstrap((gains, weights), statistic, **settings).confidence_interval
    return mean, float(interval.low), float(interval.high)

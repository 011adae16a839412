"""What the benchmarks share: data, tables, times, runs that are kept, and intervals."""

from __future__ import annotations

import gzip
import json
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import bootstrap
from transformers import TrainingArguments

RESULTS = Path(__file__).parent / "results"
CHECKPOINTING = "activation_checkpointing"  # as an argument of every trainer
if CHECKPOINTING not in {argument.name for argument in fields(TrainingArguments)}:
    CHECKPOINTING = "gradient_checkpointing"  # before transformers 5.23
Row = dict[str, Any]


# ---- data -----------------------------------------------------------------------------------------------------------


def read(folder: Path, split: str) -> list[Row]:
    """The rows of `split.jsonl` or `split.jsonl.gz`."""
    found = sorted(folder.glob(f"{split}.jsonl*"))
    if not found:
        raise FileNotFoundError(f"{folder} has no {split}.jsonl or {split}.jsonl.gz: see --data.")
    opener = gzip.open if found[0].suffix == ".gz" else open
    with opener(found[0], "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ---- tables ---------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of dictionaries with the same keys."""
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return table_of_cells(list(rows[0]), cells)


def table_of_cells(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Likewise of columns, whose names may occur twice, and rows of text."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines])


# ---- times ----------------------------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


class Stopwatch:
    """Seconds by name, with the device's work done."""

    def __init__(self, device: str):
        self.device = device
        self.started: dict[Hashable, float] = {}
        self.seconds: dict[Hashable, list[float]] = {}

    @contextmanager
    def time(self, name: Hashable) -> Iterator[None]:
        self.start(name)
        yield
        self.stop(name)

    def start(self, name: Hashable) -> None:
        self.wait()
        self.started[name] = time.perf_counter()

    def stop(self, name: Hashable) -> None:
        self.wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - self.started[name])

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def median(self, name: Hashable) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, name: Hashable, base: Hashable) -> list[float]:
        """Of every repetition, in order of size."""
        return sorted(a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))

    def ratio(self, name: Hashable, base: Hashable) -> float:
        """Median of the paired ratios."""
        return statistics.median(self.ratios(name, base))

    def repeat(self, repetitions: int, warm_up: int, arms: Callable[[], list[Callable[[], None]]]) -> None:
        """Run the functions that `arms()` returns, every second time in reverse order; forget the warm-up's times."""
        for repetition in range(-warm_up, repetitions):
            if repetition == 0:
                self.seconds.clear()
            turn = arms()
            if repetition % 2:
                turn.reverse()
            for arm in turn:
                arm()


# ---- runs that are kept ---------------------------------------------------------------------------------------------


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


# ---- intervals ------------------------------------------------------------------------------------------------------


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


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean over seeds; None for a single one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


class Share(NamedTuple):
    """What one arm has of what another has."""

    value: float
    error: float | None  # standard error over seeds


def share_of(parts: Sequence[float], wholes: Sequence[float]) -> Share | None:
    """Σ parts / Σ wholes over seeds, as large as it is; None where the whole is no gain."""
    whole = statistics.mean(wholes)
    if whole <= 0:
        return None
    value = statistics.mean(parts) / whole
    error = standard_error([part - value * other for part, other in zip(parts, wholes, strict=True)])
    return Share(value, None if error is None else error / whole)

"""Numbers to expect of the recipes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.tables.cells import read, share, table

CURVE_ROWS = 6


def expected() -> str:
    """What each recipe took, the λ that it chose, and its right answers."""
    rows = []
    for name, run in read("expected").items():
        seconds = run["processor_seconds"]
        took = "" if seconds is None else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
        extra = "" if run["share"] is None else f"+{run['share']:.0f} %"
        memory = "" if run["gigabytes"] is None else f"{run['gigabytes']:.1f} GB"
        strength = "" if run["strength"] is None else f"{run['strength']:g}"
        right = [""] * 2 if run["right"] is None else [share(value) for value in run["right"]]
        rows.append([f"`{name}`", took, extra, memory, strength, *right])
    head = ("recipe", "processor time", "training, with the Copilot", "memory", "chosen λ")
    return table((*head, "right: Pilot", "Pilot + Copilot"), rows)


def curve(name: str) -> str:
    """The NLL of both at some evaluations, beside what training logged last before; or what it logged, without any."""
    run = read("expected")[name]
    unit = next(key for key in ("step", "epoch") if key in run["training"][0])
    points = run["evaluation"] or run["training"]
    places = sorted({round(i * (len(points) - 1) / (CURVE_ROWS - 1)) for i in range(CURVE_ROWS)})
    rows = []
    for point in (points[place] for place in places):
        logged = [entry for entry in run["training"] if entry[unit] <= point[unit]]
        before = logged[-1] if logged else {}
        cells = [before.get(key) for key in ("pilot_nll", "rectified_nll", "copilot_loss")]
        cells += [point[key] if run["evaluation"] else None for key in ("pilot_nll", "rectified_nll")]
        rows.append([f"{point[unit]:g}", *("" if value is None else f"{value:.3f}" for value in cells)])
    head = (unit, "`pilot_nll`", "`rectified_nll`", "`copilot_loss`", "`eval_pilot_nll`", "`eval_rectified_nll`")
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "expected": expected,
} | {f"expected-{name}": partial(curve, name) for name in read("expected")}

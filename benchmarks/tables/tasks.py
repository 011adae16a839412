"""The four tasks with small Pilots from scratch, and a T5."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean
from typing import Any

from benchmarks.tables.cells import ARMS, TASKS, figure, gain, is_clear, read, share, table


def helps() -> str:
    """Four tasks, λ = 1, with the training time beside the gain."""
    rows = []
    for task, (metric, title) in TASKS.items():
        found = read(f"accuracy/{task}")
        arms, times = found["arms"], found["costs"]["copilot"]
        cells = {arm: figure(metric, arms[arm][metric]) for arm in ("pilot", "copilot", "deeper", "longer")}
        clear = is_clear(arms["copilot"][metric])
        cells["copilot"] = f"**{cells['copilot']}**" if clear else f"{cells['copilot']} (not clear of zero)"
        rows.append([title, *cells.values(), f"{times['training']:.1f} ×"])
    head = ("task", "Pilot", "+ Copilot", "deeper Pilot, same total size", "Pilot, 2.5 × the steps")
    return table((*head, "training time with the Copilot"), rows)


def by_task(cell: Callable[[str, dict[str, Any]], str], arms: Iterable[str]) -> str:
    """A row for each arm, a column for each task."""
    found = {task: read(f"accuracy/{task}")["arms"] for task in TASKS}
    rows = [
        [ARMS[arm], *(cell(m, found[t][arm][m]) if arm in found[t] else "not run" for t, (m, _) in TASKS.items())]
        for arm in arms
    ]
    return table(("", *(f"`{task}`, {'NLL' if m == 'nll' else m}" for task, (m, _) in TASKS.items())), rows)


def times() -> str:
    found = {task: read(f"accuracy/{task}")["costs"] for task in TASKS}
    works = {"training": "training", "generation": "a generated token"}
    kinds = {"copilot": "token Copilot", "states": "state Copilot"}
    rows = [
        [f"{title}, {kind}", *(f"{found[task][arm][work]:.2f}" for task in TASKS)]
        for work, title in works.items()
        for arm, kind in kinds.items()
    ]
    return table(("time beside the Pilot's", *(f"`{task}`" for task in TASKS)), rows)


def strengths() -> str:
    """MAWPS, where answers and likelihood want different λ."""
    arms, rows = read("accuracy/mawps")["arms"], []
    for arm in ("pilot", "copilot", "copilot, λ by accuracy", "copilot, λ chosen"):
        used = sorted({value for value in arms[arm]["strengths"] if value is not None})
        shown = " to ".join(f"{value:g}" for value in (used[:1] + used[1:][-1:]))
        title = ARMS[arm] if arm == "pilot" else ARMS[arm].removeprefix("+ token Copilot, ")
        cells = (figure(metric, arms[arm][metric]) for metric in ("value right", "nll"))
        rows.append([title, "" if arm == "copilot" else shown, *cells])
    return table(("MAWPS, token Copilot", "λ", "right", "NLL"), rows)


def t5() -> str:
    runs, rows = read("seq2seq_mawps")["runs"], []
    arms = {"pilot": ARMS["pilot"], "copilot": "+ Copilot, λ = 1", "calibrated": "+ Copilot, λ with the least NLL"}
    for arm, title in (arms | {"joint": ARMS["wider"]}).items():
        right, nll = mean(mean(run[arm]["hits"]) for run in runs), mean(run[arm]["nll"] for run in runs)
        rows.append([title, share(right), f"{nll:.3f}"])
    return table(("T5, MAWPS", "right", "NLL"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "helps": helps,
    "tasks": lambda: by_task(figure, ARMS),
    "gains": lambda: by_task(gain, [arm for arm in ARMS if arm not in ("pilot", "paper")]),
    "times": times,
    "strengths": strengths,
    "t5": t5,
}

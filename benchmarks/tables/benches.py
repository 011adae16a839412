"""Folding, moves and ensembles, on the tasks that each has been run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import mean
from typing import Any

from benchmarks.accuracy.shares import OWN, Runs, share_of_gain
from benchmarks.common import share_of, standard_error
from benchmarks.tables.cells import TASKS, figure, file_of, gain, percent, read, table

RIGHT = {task: metric for task, (metric, _) in TASKS.items()} | {"text": "token accuracy"}
FOLDING_ARMS = {
    "pilot": "Pilot",
    "copilot": "+ token Copilot",
    "folded": "folded Pilot",
    "labels": "Pilot, on labels for the time of folding",
    "again": "folded Pilot + a fresh Copilot",
}
MOVES_ARMS = {
    "alone": "alone",
    "moved, λ of home": "moved, λ of home",
    "moved, λ chosen": "moved, λ chosen",
    OWN: "trained there",
    "small logits": "small logits",
}
ENSEMBLE_ARMS = {
    "pilot": "Pilot",
    "copilot": "+ token Copilot",
    "language model": "+ its network as a language model",
    "second": "+ a second Pilot",
}


def tasks_of(bench: str) -> dict[str, dict[str, Any]]:
    """What a bench of its own found, by task: of those that it has been run on."""
    names = {task: f"accuracy/{bench}_{task}" for task in TASKS}
    return {task: read(name) for task, name in names.items() if file_of(name).is_file()}


def seeds(task: str, number: int) -> str:
    return f"`{task}`, {number} seed{'s' * (number > 1)}"


def folding() -> str:
    """Of a Copilot's gain, what the folded Pilot has, and what labels give in the same time."""
    rows = []
    for task, found in tasks_of("folding").items():
        arms, metrics = found["arms"], (RIGHT[task], "nll")
        for arm, title in FOLDING_ARMS.items():
            steps = [f"{found['steps'][arm]:,.0f}" if arm in found["steps"] else ""]
            cells = [figure(metric, arms[arm][metric]) for metric in metrics]
            shares = [of_gain(arms, arm, metric) if arm in found["steps"] else "" for metric in metrics]
            title_of_task = seeds(task, len(arms["pilot"]["nll"]["by_seed"])) if arm == "pilot" else ""
            rows.append([title_of_task, title, *steps, *cells, *shares])
    head = ("task", "arm", "further steps", "right", "NLL", "of the gain in right answers", "and in NLL")
    return table(head, rows)


def of_gain(arms: dict[str, Any], arm: str, metric: str) -> str:
    """Of the Copilot's gain the share that an arm has."""
    sign = -1 if metric == "nll" else 1
    pilot, own, best = (arms[name][metric]["by_seed"] for name in ("pilot", arm, "copilot"))
    gains = [[sign * (a - b) for a, b in zip(other, pilot, strict=True)] for other in (own, best)]
    return percent(share_of(*gains))


def moves(metric: str) -> str:
    """A table for each task: a row for each destination, a column for each arm, and the λ that were chosen for the
    moved Copilot. In NLL with the share of the gain."""
    tables = []
    for task, found in tasks_of("moves").items():
        runs, rows = found["runs"], []
        for place, arms in runs[0].items():
            cells = [moved(runs, place, arm, metric) if arm in arms else "" for arm in MOVES_ARMS]
            chosen = ", ".join(f"{run[place]['moved, λ chosen']['strength']:g}" for run in runs)
            rows.append([place, *cells, *([chosen] if metric == "nll" else [])])
        head = [seeds(task, len(runs)), *MOVES_ARMS.values(), *(["chosen λ"] if metric == "nll" else [])]
        tables.append(table(head, rows))
    return "\n".join(tables)


def moved(runs: Runs, place: str, arm: str, metric: str) -> str:
    """A figure, and of the gain the share where there is one to have."""
    values = [run[place][arm][metric] for run in runs]
    cell = figure(metric, {"mean": mean(values), "standard_error": standard_error(values)})
    if metric != "nll" or arm in ("alone", OWN):
        return cell
    return f"{cell} ({percent(share_of_gain(runs, place, arm))})"


def ensembles() -> str:
    """Other second networks in a Copilot's place, each with its two weights of every seed."""
    rows = []
    for task, found in tasks_of("ensembles").items():
        for arm, title in ENSEMBLE_ARMS.items():
            own = found["arms"][arm]
            cells = [figure(metric, own[metric]) for metric in (RIGHT[task], "nll")]
            cells.append("" if arm == "pilot" else gain("nll", own["nll"]))
            weights = "; ".join(f"{a:g}, {b:g}" for a, b in own["weights"])
            first = seeds(task, len(own["nll"]["by_seed"])) if arm == "pilot" else ""
            rows.append([first, title, *cells, "" if arm == "pilot" else weights])
    head = ("task", "arm", "right", "NLL", "NLL against the Pilot's", "weights of z and of the other")
    return table(head, rows) if rows else "It has not been run.\n"


TABLES: dict[str, Callable[[], str]] = {
    "folding": folding,
    "moves": partial(moves, "nll"),
    "moves-right": partial(moves, "answers right"),
    "ensembles": ensembles,
}

"""Swapped answers that the ledger finds."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.tables.cells import read, spread, table

LEDGER_TASKS = {"mawps": "MAWPS", "text": "GSM8K"}


def rankings() -> str:
    """How well each way to rank rows finds the swapped answers: precision at 5 %, and AUROC."""
    found = read("ledger")
    heads = [f"{LEDGER_TASKS[task]}, {what}" for task in found for what in ("precision at 5 %", "AUROC")]
    names = next(iter(found.values()))["rankings"]
    rows = [
        [name, *(spread(run["rankings"][name][what]) for run in found.values() for what in ("precision", "auroc"))]
        for name in names
    ]
    return table(("rows ranked by", *heads), [*rows, ["by chance", *["0.050", "0.500"] * len(found)]])


def cleaned() -> str:
    """Test NLL with all rows and without those that the ledger flags."""
    rows = [
        [
            f"{LEDGER_TASKS[task]}, {run['rows']:,} rows, {run['steps']} steps, {run['seeds']} seeds",
            *(spread(run["test nll"][arm]) for arm in ("all rows", "without flagged")),
            spread(run["gain"], "+").replace("-", "−"),
        ]
        for task, run in read("ledger").items()
    ]
    return table(("test NLL per token", "trained on all rows", "without what is flagged", "gain"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "ledger-rankings": rankings,
    "ledger-cleaned": cleaned,
}

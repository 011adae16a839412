"""What is worked out on paper beside larger Pilots."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.tables.cells import read, table


def scaled_training() -> str:
    rows = [
        [
            row["pilot"],
            row["copilot"],
            f"{row['pilot_step_s']:.2f} s",
            *(f"{row[name]:.2f}" for name in ("training", "training_compiled", "training_beside")),
            "" if row["training_paper"] is None else f"{row['training_paper']:.3f}",
            f"{row['trained_gb']:.0f} GB",
            f"{row['exchange_s']:.2f} s",
        ]
        for row in read("scaling")["overheads"]
    ]
    head = ("Pilot", "Copilot", "its step", "with the Copilot", "compiled", "and beside, at best", "the paper")
    return table((*head, "weights, gradients, moments", "gradients between nodes"), rows)


def scaled_generation() -> str:
    rows = [
        [
            row["pilot"],
            row["copilot"],
            f"{row['pilot_token_ms']:.0f} ms",
            *(f"{row[name]:.2f}" for name in ("generation", "generation_compiled")),
            "" if row["generation_paper"] is None else f"{row['generation_paper']:.3f}",
        ]
        for row in read("scaling")["overheads"]
    ]
    return table(("Pilot", "Copilot", "its token", "with the Copilot", "compiled", "the paper"), rows)


def scaled_documents() -> str:
    rows = [
        [
            f"{row['length']:,}",
            row["copilot"],
            *(f"{row[name]:.2f}" for name in ("training_some_labelled", "training_all_labelled")),
            f"{row['rounds_in_log']:.1f}",
        ]
        for row in read("scaling")["long_documents"]
    ]
    head = ("tokens of a document", "Copilot", "ten labelled", "all labelled", "rounds in the log")
    return table(head, rows)


def scaled_operators() -> str:
    """At no layer, and for each."""
    names = {"step": "a step", "look": "the look at a forward, by the Pilot's layers", "token": "a generated token"}
    names["token beside a graph"] = "a generated token, beside a CUDA graph"
    rows = [
        [name if name != "pilot" else "the Pilot, a micro-batch for a step", names[part]]
        + [f"{found['base']:.0f}", f"{found['slope']:.0f}"]
        for name, parts in read("scaling")["operators"].items()
        for part, found in parts.items()
    ]
    return table(("operators of", "in", "beside the layers", "each layer"), rows)


def scaling_check() -> str:
    found = read("scaling")["check"]
    rows = [
        ["a step", *(f"{found[f'step_s_{kind}']:.2f} s" for kind in ("predicted", "measured"))],
        ["a generated token", *(f"{found[f'token_ms_{kind}']:.1f} ms" for kind in ("predicted", "measured"))],
    ]
    return table(("of the Copilot that was measured", "predicted", "measured"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "scaling-training": scaled_training,
    "scaling-generation": scaled_generation,
    "scaling-documents": scaled_documents,
    "scaling-operators": scaled_operators,
    "scaling-check": scaling_check,
}

"""What a Copilot costs in time and memory."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.tables.cells import COPILOTS, read, table
from benchmarks.tables.pretrained import Search


def cost_of_training() -> str:
    found, rows = read("cost_cpu")["training_step"], {}
    for row in found:
        key = (
            f"{COPILOTS[row['memory']]}, {row['steps_per_round']} step{'s' * (row['steps_per_round'] > 1)} in a round"
        )
        rows.setdefault(key, {})[f"{100 * row['labelled_share']:.0f} % labelled"] = f"{row['ratio']:.2f}"
    head = ["a training step beside the Pilot's", *next(iter(rows.values()))]
    return table(head, ([key, *cells.values()] for key, cells in rows.items()))


def cost_of_generation() -> str:
    rows: dict[str, dict[str, str]] = {}
    for row in read("cost_cpu")["generated_token"]:
        rows.setdefault(COPILOTS[row["memory"]], {})[f"batch {row['batch']}"] = f"{row['ratio']:.2f}"
    head = ["a generated token beside the Pilot's", *next(iter(rows.values()))]
    return table(head, ([key, *cells.values()] for key, cells in rows.items()))


def cost_on_gpu() -> str:
    """Of a step beside SmolLM2, from the second search: milliseconds, and the whole step beside the Pilot's own."""
    timing, rows = Search("search_h200").results.timings["mawps"], []
    alone = {name: 1e3 * sum(timing["pilots"][name].values()) for name in ("lora", "full")}
    names = {"token": "token Copilot", "states": "state Copilot", "features": "reader of three layers' states"}
    names["lent"] = "state Copilot, the Pilot's vocabulary"
    for times in timing["copilots"]:
        if times["shape"] in names:
            own = [1e3 * times["observe"], 1e3 * times["copilot"]]
            whole = [f"{1 + sum(own) / pilot:.2f}" for pilot in alone.values()]
            title = f"{names[times['shape']]}, {times['steps']} step{'s' * (times['steps'] > 1)} in a round"
            rows.append([title, *(f"{x:.0f} ms" for x in own), *whole])
    beside = [
        f"beside {title} ({alone[name]:.0f} ms)" for name, title in (("lora", "LoRA"), ("full", "full training"))
    ]
    return table(("a training step", "observing", "its steps", *beside), rows)


def vocabularies() -> str:
    rows = [
        [
            row["vocabulary"],
            f"{row['trained_m']:.1f}M",
            f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_largest']:.2f})",
            f"{row['memory_mb']:,.0f} MB",
            f"{row['file_mb']:,.0f} MB",
        ]
        for row in read("vocabulary")["rows"]
    ]
    return table(("vocabulary matrices", "trained", "a step's time", "weights, gradients, moments", "file"), rows)


def served() -> str:
    """Requests in vLLM, with a Copilot and without."""
    rows = []
    for row in read("serving_cpu")["served"]:
        cells = [f"{row[f'ms_per_token_{arm}']:.0f} ms" for arm in ("without", "with")]
        cells += [f"{row[f'tokens_per_s_{arm}']:.0f}" for arm in ("without", "with")]
        rows.append([f"`{row['copilot_input']}`", str(row["requests"]), *cells, f"{row['ratio']:.2f}"])
    head = ("`copilot_input`", "requests", "a step, Pilot alone", "with a Copilot", "tokens a second, Pilot alone")
    return table((*head, "with a Copilot", "ratio"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "cost-training": cost_of_training,
    "cost-generation": cost_of_generation,
    "cost-gpu": cost_on_gpu,
    "vocabularies": vocabularies,
    "served": served,
}

"""The rows: which Pilot with which Copilot on what, trained how, and what the paper measured.

Settings are the paper's Tables 5 to 10, figures its Tables 1, 13 and 14 (accuracy in %, mean of three runs; H@k and
N@k in %).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

HUB = {
    "t5-small": "google-t5/t5-small",
    "t5-base": "google-t5/t5-base",
    "flan-t5-small": "google/flan-t5-small",
    "flan-t5-base": "google/flan-t5-base",
    "flan-t5-large": "google/flan-t5-large",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
}
SOURCES = {  # where a Copilot of the paper starts from, by the Pilot's family and the Copilot's size
    ("t5", "small"): "t5-small",
    ("t5", "base"): "t5-base",
    ("llama", "1b"): "llama-3.2-1b",
    ("llama", "3b"): "llama-3.2-3b",
    ("qwen2.5", "0.5b"): "qwen2.5-0.5b",
    ("qwen2.5", "3b"): "qwen2.5-3b",
}


@dataclass(frozen=True)
class Training:
    """How Pilot and Copilot are trained, and answers decoded.

    Attributes:
        epochs: Of the training rows; `max_steps` goes before it.
        warmup: Steps, or below 1 a share of them.
        rank, alpha: Of LoRA, on both models; 0 trains them in full.
        dropout: Of the Pilot's adapter. A T5 has its own, 0.1.
        preset: The paper's Copilot, or the library's default of two layers.
        strengths: λ to choose among on 120 rows that are held out.
    """

    epochs: float = 3
    max_steps: int = -1
    batch_size: int = 16
    micro_batch_size: int = 4
    max_length: int = 256
    learning_rate: float = 3e-4
    copilot_learning_rate: float = 5e-4
    weight_decay: float = 0.0
    warmup: float = 200
    rank: int = 32
    alpha: int = 64
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.05
    copilot_dropout: float = 0.08
    preset: str = "paper"
    strengths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.8, 1.0)
    num_beams: int = 4
    max_new_tokens: int = 64


@dataclass(frozen=True)
class PaperRow:
    """One row.

    Attributes:
        pilot: A name in `HUB`.
        size: Of the Copilot: with the Pilot's family it says where the first weights come from.
        task: `"commonsense"`, `"arithmetic"`, `"beauty"`, `"lastfm"` or `"metamathqa"`.
        paper: What was measured elsewhere, by figure: the Pilot alone, and with the Copilot.
    """

    pilot: str
    size: str
    task: str
    training: Training
    paper: dict[str, tuple[float, float]]

    @property
    def name(self) -> str:
        return f"{self.pilot}+{self.size}/{self.task}"

    @property
    def copilot(self) -> str | None:
        """A name in `HUB`, or None for the Pilot itself."""
        families = [key for key in SOURCES if key[0] in self.pilot and key[1] == self.size]
        return SOURCES[families[0]] if families else None


# ---- settings -------------------------------------------------------------------------------------------------------

LLAMA = Training()  # Qwen2.5 too
LLAMA_SETTINGS = {
    "commonsense": LLAMA,
    "arithmetic": replace(LLAMA, learning_rate=2e-4, copilot_learning_rate=3e-4, warmup=100, max_new_tokens=256),
    "recommendation": replace(LLAMA, batch_size=32, micro_batch_size=1, rank=16, alpha=16, warmup=100),
}
T5 = Training(
    epochs=12,
    micro_batch_size=16,
    learning_rate=1e-3,
    copilot_learning_rate=3e-3,
    weight_decay=0.01,
    warmup=0.05,
    rank=0,
    copilot_dropout=0.1,
)
T5_SETTINGS = {
    "commonsense": T5,
    "arithmetic": replace(T5, max_new_tokens=256),
    "recommendation": replace(T5, epochs=20, copilot_learning_rate=1e-3),
}
METAMATHQA = Training(  # PEFT's method_comparison/MetaMathQA, and beside its LoRA the default Copilot
    max_steps=5000,
    batch_size=4,
    max_length=768,
    learning_rate=1e-4,
    copilot_learning_rate=3e-4,
    weight_decay=0.1,
    warmup=0.1,
    targets=("q_proj", "v_proj"),
    dropout=0.0,
    copilot_dropout=0.1,
    preset="default",
    num_beams=1,
    max_new_tokens=300,
)


def settings(pilot: str, task: str) -> Training:
    found = (T5_SETTINGS if "t5" in pilot else LLAMA_SETTINGS)[task]
    return replace(found, learning_rate=1e-4) if (pilot, task) == ("llama-3.1-8b", "arithmetic") else found


# ---- what the paper measured ---------------------------------------------------------------------------------------

GROUPS = {
    "commonsense": ("piqa", "winogrande", "hellaswag", "boolq", "siqa", "openbookqa"),
    "arithmetic": ("aqua", "gsm8k", "mawps", "svamp"),
    "recommendation": tuple(f"{kind}@{k}" for kind in "HN" for k in (5, 10, 20, 100)),
}
TABLE_1 = """
flan-t5-small -     60.3 52.1 31.6 57.9 47.8 29.2 19.6  5.6 14.7  5.3
flan-t5-small small 63.1 54.4 34.9 61.7 52.7 32.9 24.8  7.4 20.6  8.0
flan-t5-base  -     65.4 54.6 36.8 61.1 48.6 29.6 22.8  7.2 27.1  6.3
flan-t5-base  base  67.3 56.2 39.7 62.5 54.3 34.7 24.4  9.3 32.4 10.3
flan-t5-large -     70.5 60.4 49.5 62.2 58.1 31.7 23.2  9.9 36.7  9.7
flan-t5-large small 72.2 61.9 51.3 63.2 59.8 32.6 24.7 11.3 37.2 11.6
flan-t5-large base  72.8 63.6 52.3 63.7 60.8 34.2 25.1 11.6 39.8 13.8
llama-3.2-1b  -     77.5 71.1 61.8 63.9 71.9 66.8 25.6 27.3 77.1 47.3
llama-3.2-1b  1b    80.2 73.7 63.3 65.5 74.9 68.9 28.3 32.2 81.5 51.6
llama-3.2-3b  -     83.3 79.6 89.4 69.1 77.4 75.6 33.1 55.3 86.1 64.2
llama-3.2-3b  1b    84.1 82.6 91.1 70.3 78.6 77.2 36.6 58.2 89.1 68.7
llama-3.2-3b  3b    85.6 83.7 91.3 72.8 79.2 81.3 40.1 63.1 91.2 71.4
llama-3.1-8b  -     85.4 84.3 90.9 69.6 79.9 82.6 37.3 63.5 89.1 73.6
llama-3.1-8b  1b    86.2 86.8 93.5 71.8 82.7 83.2 38.9 66.1 90.8 75.4
qwen2.5-3b    -     83.6 77.5 89.8 63.4 77.6 84.6 55.9 71.4 89.6 81.5
qwen2.5-3b    0.5b  85.4 79.1 91.3 66.8 78.1 86.0 57.3 74.2 91.8 82.8
qwen2.5-3b    3b    87.8 81.7 94.0 68.7 79.9 89.4 59.4 76.8 92.6 83.5
qwen2.5-7b    -     87.2 82.1 91.4 71.2 79.3 89.1 61.0 75.3 91.2 84.8
qwen2.5-7b    0.5b  89.3 85.3 93.5 73.6 80.0 92.1 61.4 78.2 93.0 86.5
qwen2.5-7b    3b    92.5 87.2 95.3 74.8 84.3 94.9 64.2 79.7 94.8 88.1
"""
TABLE_13 = """
t5-small      -     1.7 2.9  5.4 14.6 1.0 1.4 3.5 5.7
t5-small      small 2.4 3.4  6.2 17.8 1.6 2.1 4.5 6.4
llama-3.2-1b  -     5.2 7.4 10.0 18.8 3.8 4.4 5.1 6.7
llama-3.2-1b  1b    6.1 8.1 12.5 24.6 4.3 5.1 5.8 7.4
llama-3.1-8b  -     5.8 8.3 11.1 21.5 4.1 4.9 5.6 7.5
llama-3.1-8b  1b    7.1 9.2 13.5 26.4 4.7 6.2 6.4 8.1
"""
TABLE_14 = """
t5-small      -     2.1 3.7  4.2 11.0 1.6 2.0 2.5 3.2
t5-small      small 3.2 4.4  5.7 15.3 1.9 3.2 3.8 4.0
llama-3.2-1b  -     5.0 5.7  9.1 21.9 2.4 3.0 3.9 6.2
llama-3.2-1b  1b    6.4 6.8 11.2 24.7 2.9 3.5 4.3 6.7
llama-3.1-8b  -     4.7 7.3 10.3 25.6 3.1 3.7 4.7 7.0
llama-3.1-8b  1b    6.9 8.6 12.7 28.0 3.9 4.8 5.4 7.9
"""
PEFT = {  # GSM8K in %, seconds of training on one L40S: the league's best, its LoRA, and others
    "lily": (52.6, 1324),
    "hira": (51.3, 1286),
    "rsLoRA r 64": (51.3, 966),
    "LoRA r 32": (47.8, 942),
    "full": (47.2, 2147),
    "DoRA": (46.9, None),
}


def measured(table: str, figures: tuple[str, ...]) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """Figures of a table by Pilot and Copilot: those of the Pilot alone, and with the Copilot."""
    lines = [line.split() for line in table.strip().splitlines()]
    values = {(pilot, size): [float(cell) for cell in cells] for pilot, size, *cells in lines}
    return {
        (pilot, size): dict(zip(figures, zip(values[pilot, "-"], found, strict=True), strict=True))
        for (pilot, size), found in values.items()
        if size != "-"
    }


def make_rows() -> dict[str, PaperRow]:
    """All rows, by name."""
    rows, reasoning = [], GROUPS["commonsense"] + GROUPS["arithmetic"]
    for (pilot, size), figures in measured(TABLE_1, reasoning).items():
        for task in ("commonsense", "arithmetic"):
            own = {name: figures[name] for name in GROUPS[task]}
            rows.append(PaperRow(pilot, size, task, settings(pilot, task), own))
    for task, table in {"beauty": TABLE_13, "lastfm": TABLE_14}.items():
        for (pilot, size), figures in measured(table, GROUPS["recommendation"]).items():
            rows.append(PaperRow(pilot, size, task, settings(pilot, "recommendation"), figures))
    rows.append(PaperRow("llama-3.2-3b", "two-layers", "metamathqa", METAMATHQA, {}))
    return {row.name: row for row in rows}


ROWS = make_rows()

"""The tasks: their data, the small Pilot that learns them from scratch, and how its answers are measured.

Rows are dictionaries with `prompt` and `completion`; a task's `measure` gives figures for every test item.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.scoring import Figures, Rectified
from benchmarks.common import Row, read
from benchmarks.equations import solves
from hf_copilot.cli.scratch import train_tokenizer
from recipes.common import make_tokenizer


class Splits(NamedTuple):
    """Rows to train on, to choose λ on, and to test on."""

    train: list[Row]
    valid: list[Row]
    test: list[Row]


@dataclass
class Task:
    """One task; subclasses say where rows come from and what a right answer is.

    Attributes:
        name: On the command line and in the results.
        metric: The figure of [`measure`] that the task is judged by.
        pilot: LlamaConfig of the small Pilot.
        training: SFTConfig of its training.
        copilot: `copilot_...` arguments of every Copilot, chosen on validation rows.
        pretraining_steps: Of the base that all arms start from.
        max_length: Longest row in tokens.
        max_new_tokens: Of generated answers.
    """

    name: str
    metric: str
    pilot: dict[str, Any]
    training: dict[str, Any]
    copilot: dict[str, Any]
    pretraining_steps: int = 200
    max_length: int = 512
    max_new_tokens: int = 32

    def splits(self, data: Path, seed: int) -> Splits:
        raise NotImplementedError

    def pretraining(self, data: Path) -> list[Row]:
        """Rows for the base: by default the training prompts as plain text."""
        return [{"prompt": "", "completion": row["prompt"]} for row in self.splits(data, seed=0).train]

    def tokenizer(self, data: Path):
        rows = self.splits(data, seed=0).train
        return train_tokenizer([row["prompt"] + row["completion"] for row in rows], 1024)

    def measure(self, model: Rectified, rows: list[Row], data: Path) -> dict[str, Figures]:
        """Figures of the test items beside their likelihood."""
        answers = model.answers([row["prompt"] for row in rows], self.name, self.max_new_tokens)
        hits = [float(self.right(answer, row)) for answer, row in zip(answers, rows, strict=True)]
        return {self.metric: Figures(hits)}

    def right(self, answer: str, row: Row) -> bool:
        raise NotImplementedError

    def check(self, model: Rectified, rows: list[Row], data: Path) -> dict[str, float]:
        """What shows that the figures of this task are what they say, where it needs more than a test."""
        return {}


def widths(width: int) -> dict[str, int]:
    return {"hidden_size": width, "intermediate_size": 11 * width // 4}


def llama(layers: int, width: int) -> dict[str, int]:
    heads = {"num_hidden_layers": layers, "num_attention_heads": 4}
    return widths(width) | heads | {"max_position_embeddings": 1024}


class Arithmetic(Task):
    """Generated problems: sums, differences, products with a digit, and chains of two operations, on numbers of one
    and two digits."""

    def splits(self, data: Path, seed: int) -> Splits:
        rng, seen = random.Random(f"arithmetic-{seed}"), set()
        test = self.problems(1000, random.Random("arithmetic-test"), seen)
        valid = self.problems(1000, rng, seen)
        return Splits(self.problems(24_000, rng, seen), valid, test)

    def problems(self, count: int, rng: random.Random, seen: set[str]) -> list[Row]:
        """`count` problems that are not in `seen`; they are added to it."""
        rows = []
        while len(rows) < count:
            row = problem(rng, most=99)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append(row)
        return rows

    def pretraining(self, data: Path) -> list[Row]:
        """Problems with one digit."""
        rng = random.Random("arithmetic-base")
        return [problem(rng, most=9) for _ in range(4000)]

    def tokenizer(self, data: Path):
        return make_tokenizer([row["prompt"] + row["completion"] for row in self.pretraining(data)])

    def right(self, answer: str, row: Row) -> bool:
        return answer.replace(" ", "") == row["completion"].replace(" ", "")


FORMS = ("n + n", "n - n", "n * d", "n + n + n", "n + n - n", "n * d + n")


def problem(rng: random.Random, most: int) -> Row:
    """A problem over numbers n from 0 to `most` and digits d, and its value."""
    text = re.sub("[nd]", lambda letter: str(rng.randint(0, most if letter[0] == "n" else 9)), rng.choice(FORMS))
    return {"prompt": text + " =", "completion": " " + str(eval(text))}


class Text(Task):
    """Rationales of GSM8K, token by token."""

    def splits(self, data: Path, seed: int) -> Splits:
        train, test = (self.convert(read(data / "gsm8k", split)) for split in ("train", "test"))
        random.Random(f"text-{seed}").shuffle(train)
        return Splits(train[400:], train[:400], test[:500])

    def convert(self, rows: list[Row]) -> list[Row]:
        return [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in rows]

    def tokenizer(self, data: Path):
        rows = self.convert(read(data / "gsm8k", "train"))
        return train_tokenizer([row["prompt"] + row["completion"] for row in rows], 1024)

    def measure(self, model: Rectified, rows: list[Row], data: Path) -> dict[str, Figures]:
        return {}  # the likelihood, which every task has, is all


class Mawps(Task):
    """From question to equation; right is an equation that has the right value."""

    def splits(self, data: Path, seed: int) -> Splits:
        train, valid, test = (self.convert(read(data / "mawps", split)) for split in ("train", "valid", "test"))
        random.Random(f"mawps-{seed}").shuffle(train)
        return Splits(train, valid, test)

    def convert(self, rows: list[Row]) -> list[Row]:
        keep = ("equation", "final")
        return [
            {"prompt": row["question"] + "\n", "completion": row["equation"]} | {name: row[name] for name in keep}
            for row in rows
        ]

    def right(self, answer: str, row: Row) -> bool:
        return answer.strip() == row["equation"] or solves(answer, float(row["final"]))


ARITHMETIC = Arithmetic(
    "arithmetic",
    "exact match",
    pilot=llama(layers=4, width=128),
    training={"max_steps": 3000, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 50},
    copilot={"copilot_learning_rate": 1e-3},
    max_new_tokens=10,
)
TEXT = Text(
    "text",
    "nll",
    pilot=llama(layers=4, width=128),
    training={"max_steps": 400, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 50}
    | {"train_sampling_strategy": "group_by_length"},
    copilot={"copilot_learning_rate": 1e-3},
)
MAWPS = Mawps(
    "mawps",
    "value right",
    pilot=llama(layers=4, width=128),
    training={"max_steps": 1600, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 50},
    copilot={"copilot_learning_rate": 1e-3},
    max_new_tokens=48,
)

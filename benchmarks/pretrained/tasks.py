"""The tasks: rows of prompt and completion, and what a right answer is."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from benchmarks.accuracy.recommendation import RECOMMENDATION
from benchmarks.common import Row, read
from benchmarks.equations import solves
from benchmarks.paper.sets import COMMONSENSE, find_file, instruction_of, read_rows

ASKS = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"  # the Pilot's own chat form


class Splits(NamedTuple):
    """Rows to train on, to choose rates and λ on, and to test on."""

    train: list[Row]
    valid: list[Row]
    test: list[Row]


class Example(NamedTuple):
    """A row as tokens; the completion closes with the end token."""

    prompt: list[int]
    completion: list[int]


def family(name: str) -> str:
    """The task that this one differs from in its training rows alone: "gsm8k" of "gsm8k-all"."""
    return name.partition("-")[0]


@dataclass(frozen=True)
class Task:
    """One task; subclasses say where rows come from and what is right.

    Attributes:
        name: On the command line and in the results; its [`family`] is the folder of its data.
        instruction: Before every question.
        max_new_tokens: Of a generated answer.
        longest: Tokens of a row that is trained on, at most.
        samples: Answers that are sampled for every test row.
        batch_size: Rows in one `generate`.
    """

    name: str
    instruction: str
    max_new_tokens: int
    longest: int
    samples: int
    batch_size: int

    def is_in(self, data: Path) -> bool:
        return (data / family(self.name)).is_dir()

    def splits(self, data: Path) -> Splits:
        raise NotImplementedError

    def right(self, answer: str, row: Row) -> bool:
        raise NotImplementedError

    def row(self, source: Row, completion: str) -> Row:
        prompt = ASKS.format(text=f"{self.instruction}\n{source['question']}")
        return {"prompt": prompt, "completion": completion, "final": source["final"]}


class Mawps(Task):
    """From question to equation; right is an equation that has the right value."""

    def splits(self, data: Path) -> Splits:
        return Splits(*([self.row(row, row["equation"]) for row in read(data / self.name, split)] for split in SPLITS))

    def right(self, answer: str, row: Row) -> bool:
        return answer.strip() == row["completion"] or solves(answer, float(row["final"]))


@dataclass(frozen=True)
class Gsm8k(Task):
    """A rationale and the number behind "####". Of the training set's rows that are not long, 300 to choose on.

    Attributes:
        rows: To train on, at most.
    """

    rows: int

    def splits(self, data: Path) -> Splits:
        train, test = (
            [self.row(row, f"{row['answer']}\n#### {row['final']}") for row in read(data / family(self.name), split)]
            for split in ("train", "test")
        )
        train = [row for row in train if len(row["prompt"] + row["completion"]) <= LONGEST]
        random.Random("gsm8k").shuffle(train)
        rest = train[:1000] + train[1300:]
        return Splits(rest[: self.rows], train[1000:1300], test)

    def right(self, answer: str, row: Row) -> bool:
        found = re.search(r"####\s*(-?[\d,]*\.?\d+)", answer)
        return found is not None and float(found[1].replace(",", "")) == float(row["final"])


class Commonsense(Task):
    """A mixture of four sets in equal parts, in the words of LLM-Adapters; right is the right label."""

    def is_in(self, data: Path) -> bool:
        return all((data / name).is_dir() for name in SETS)

    def splits(self, data: Path) -> Splits:
        parts: list[list[Row]] = [[], [], []]
        for name in SETS:
            train, test = (self.shuffled(data, name, split) for split in ("train", "test"))
            parts[0] += train[:500]
            parts[1] += train[500:575]
            parts[2] += test[:300]
        for part in parts:
            random.Random("commonsense").shuffle(part)
        return Splits(*parts)

    def shuffled(self, data: Path, name: str, split: str) -> list[Row]:
        forms = map(instruction_of, read_rows(find_file(data / name, [split])))
        rows = [
            self.row({"question": question, "final": answer}, output) | {"set": name}
            for question, output, answer in forms
            if len(question) <= LONGEST
        ]
        random.Random(f"{name} {split}").shuffle(rows)
        return rows

    def right(self, answer: str, row: Row) -> bool:
        return SETS[row["set"]].right(answer, row["final"])


class NextItem(Task):
    """The next item of a user, see benchmarks/accuracy/recommendation.py; some rows to train on and to choose on, and
    every user to test on."""

    def splits(self, data: Path) -> Splits:
        train, valid, test = RECOMMENDATION.splits(data, seed=0)
        random.Random(self.name).shuffle(valid)
        return Splits(*(list(map(self.asked, rows)) for rows in (train[:6000], valid[:300], test)))

    def asked(self, row: Row) -> Row:
        item = row["completion"].strip()
        return self.row({"question": row["prompt"], "final": item}, item)

    def right(self, answer: str, row: Row) -> bool:
        return answer.strip() == row["final"]


SETS = {one.name: one for one in COMMONSENSE if one.name in ("boolq", "piqa", "winogrande", "openbookqa")}
SPLITS = ("train", "valid", "test")
LONGEST = 900  # characters
MAWPS = Mawps("mawps", "Write one equation in x that solves the problem.", 64, 128, 4, 320)
GSM8K = Gsm8k("gsm8k", "Solve the problem step by step. End with #### and the number.", 220, 256, 0, 256, 1000)
ALL_OF_GSM8K = replace(GSM8K, name="gsm8k-all", rows=10_000)
MIXTURE = Commonsense("commonsense", "Answer in the given format.", 16, 256, 0, 400)
LASTFM = NextItem("lastfm", "Recommend one item.", 16, 256, 0, 400)
TASKS = {task.name: task for task in (MAWPS, GSM8K, ALL_OF_GSM8K, MIXTURE, LASTFM)}


def encode(tokenizer: PreTrainedTokenizerBase, row: Row) -> Example:
    prompt, completion = (
        tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "completion")
    )
    return Example(prompt, [*completion, tokenizer.eos_token_id])

"""PIQA, BoolQ, WinoGrande and OpenBookQA: the answer whose completion has the highest rectified likelihood."""

from __future__ import annotations

import random
import re
from pathlib import Path

from benchmarks.accuracy.scoring import Figures, Rectified, encode
from benchmarks.accuracy.tasks import Splits, Task, llama
from benchmarks.common import Row, read

SETS = ("piqa", "boolq", "winogrande", "openbookqa")
ANSWERS = re.compile(r"Answer format:\s*([\w/]+)\s*$")
VALID, TEST = 100, 250  # rows of each set


class MultipleChoice(Task):
    """One Pilot for the four sets together."""

    def splits(self, data: Path, seed: int) -> Splits:
        train, valid, test = [], [], []
        for name in SETS:
            rows = [convert(row, name) for row in read(data / name, "train")]
            random.Random(f"multiple-choice-{seed}").shuffle(rows)
            valid += rows[:VALID]
            train += rows[VALID:]
            test += [convert(row, name) for row in read(data / name, "test")][:TEST]
        for rows in (train, valid):
            random.Random(f"multiple-choice-{seed}").shuffle(rows)
        return Splits(train, valid, test)

    def measure(self, model: Rectified, rows: list[Row], data: Path) -> dict[str, Figures]:
        choices = [(row, choice) for row in rows for choice in row["choices"]]
        examples = [
            encode(model.tokenizer, row | {"completion": completion(choice)}, self.max_length)
            for row, choice in choices
        ]
        scores = iter(model.log_likelihoods(examples)[:, 0].tolist())
        hits, by_set = [], {name: [] for name in SETS}
        for row in rows:
            likelihoods = {choice: next(scores) for choice in row["choices"]}
            hits.append(float(max(likelihoods, key=likelihoods.get) == row["answer"]))
            by_set[row["set"]].append(hits[-1])
        return {self.metric: Figures(hits)} | {name: Figures(by_set[name]) for name in SETS}


def completion(choice: str) -> str:
    return f"the correct answer is {choice}"


def convert(row: Row, name: str) -> Row:
    """
    Raises:
        ValueError: If the instruction does not end with its answer format.
    """
    found = ANSWERS.search(row["instruction"])
    if found is None:
        raise ValueError(f"A row of {name} does not end with 'Answer format: a/b': {row['instruction'][-80:]!r}")
    choices = found.group(1).split("/")
    prompt = row["instruction"] + "\n"
    return {"prompt": prompt, "completion": completion(row["answer"])} | {
        "choices": choices,
        "answer": row["answer"],
        "set": name,
    }


MULTIPLE_CHOICE = MultipleChoice(
    "multiple-choice",
    "accuracy",
    pilot=llama(layers=4, width=128),
    training={"max_steps": 300, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 50},
    copilot={"copilot_learning_rate": 1e-3},
    max_length=256,
)

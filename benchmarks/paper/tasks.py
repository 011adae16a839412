"""What a row is trained and measured on: reasoning sets, the next item of a user, and PEFT's MetaMathQA comparison.

A figure is a pair of values for every test item, of the Pilot alone and of Pilot + Copilot.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.accuracy.recommendation import RECOMMENDATION, Recommendation, figures_of
from benchmarks.accuracy.scoring import Rectified
from benchmarks.common import Row
from benchmarks.paper.rows import Training
from benchmarks.paper.sets import ARITHMETIC, COMMONSENSE, ReasoningSet, find_file, last_number, lone_letter, read_rows
from hf_copilot import score
from hf_copilot.evaluation.rows import ids_with_end

VALID = 120  # rows that are held out to choose λ, as many as in LLM-Adapters
BATCH = 16
ITEMS_AT_ONCE = 256
Pairs = list[tuple[float, float]]  # of every test item: the Pilot alone, and with the Copilot


class Splits(NamedTuple):
    """Rows to train on, to choose λ on, and to test on; which files they are of is told by `sources`."""

    train: list[Row]
    valid: list[Row]
    test: list[Row]
    sources: dict[str, int]


def split(train: list[Row], test: list[Row], sources: dict[str, int], limit: int | None, seed: int) -> Splits:
    """Shuffle, hold out, and keep at most `limit` rows to train on."""
    random.Random(seed).shuffle(train)
    held_out = max(1, min(VALID, len(train) // 10, limit or VALID))
    valid, train = train[:held_out], train[held_out:]
    return Splits(train[:limit], valid, test, sources)


@dataclass(frozen=True)
class Pair:
    """A Pilot alone, and with its Copilot."""

    alone: Rectified
    beside: Rectified

    def answers(self, rows: list[Row], title: str, training: Training) -> tuple[list[str], list[str]]:
        """Of both, decoded as the row says."""
        prompts = [row["prompt"] for row in rows]
        generation = {"num_beams": training.num_beams, "batch_size": BATCH}
        alone, beside = (
            model.answers(prompts, title, training.max_new_tokens, **generation) for model in (self.alone, self.beside)
        )
        return alone, beside


def hits(texts: tuple[list[str], list[str]], rows: list[Row], rule: Callable[[str, str], bool]) -> Pairs:
    """1 where an answer is right."""
    answers = [row["answer"] for row in rows]
    alone, beside = ([float(rule(a, b)) for a, b in zip(own, answers, strict=True)] for own in texts)
    return list(zip(alone, beside, strict=True))


# ---- reasoning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reasoning:
    """Sets that one Pilot learns together: from the published mixture where it is there, else from their own files."""

    sets: tuple[ReasoningSet, ...]
    mixture: str

    def splits(self, data: Path, limit: int | None, seed: int) -> Splits:
        test, train, sources = [], [], {}
        for each in self.sets:
            test += each.rows(data, 1)[:limit]
        if (data / self.mixture).is_file():
            train = [ReasoningSet(self.mixture).row(row) for row in read_rows(data / self.mixture)]
            sources[self.mixture] = len(train)
        else:
            for each in self.sets:
                own = self.training_rows(each, data)
                train, sources = train + own, sources | {each.name: len(own)}
        return split(train, test, sources, limit, seed)

    def training_rows(self, each: ReasoningSet, data: Path) -> list[Row]:
        """SVAMP has no training file in the mixtures either; any other that is missing raises."""
        try:
            return each.rows(data, 0)
        except FileNotFoundError:
            if each.name != "svamp":
                raise
            return []

    def measure(self, pair: Pair, rows: list[Row], data: Path, training: Training) -> dict[str, Pairs]:
        by_set: dict[str, list[Row]] = {}
        for row in rows:
            by_set.setdefault(row["set"], []).append(row)
        found: dict[str, Pairs] = {}
        for each in self.sets:
            texts = pair.answers(by_set[each.name], each.name, training)
            found[each.name] = hits(texts, by_set[each.name], each.right)
            if each.name == "aqua":
                found["aqua, lone letter"] = hits(
                    texts, by_set["aqua"], lambda text, right: lone_letter(text) == right
                )
        return found


# ---- recommendation -------------------------------------------------------------------------------------------------


class Interactions(Recommendation):
    """In the paper's prompt form, for tokenizers that exist. Also reads the published form, `<dataset>.txt` with a
    user and their items in a line. Numbers have leading zeros, so that all items have as many tokens."""

    def users(self, data: Path) -> list[Row]:
        published = data / self.dataset.lower() / f"{self.dataset}.txt"
        if not published.is_file():
            return super().users(data)
        lines = [[int(cell) for cell in line.split()] for line in published.read_text().splitlines()]
        return [{"user": user, "items": items} for user, *items in lines]

    def item_texts(self, data: Path) -> dict[int, str]:
        return {item: text.replace("item_ ", "item_") for item, text in super().item_texts(data).items()}

    def row(self, user: int, history: list[int], item: int, texts: dict[int, str]) -> Row:
        row = super().row(user, history, item, texts)
        changes = {"user_ ": "user_", " ,": ",", " . ": ". ", " ?": "?"}
        for spaced, close in changes.items():
            row["prompt"] = row["prompt"].replace(spaced, close)
        return row


@dataclass(frozen=True)
class NextItem:
    """All items are ranked exactly: a decoder's in one trie, an encoder-decoder's one by one."""

    dataset: str

    def interactions(self) -> Interactions:
        known = {field.name: getattr(RECOMMENDATION, field.name) for field in fields(Recommendation)}
        return Interactions(**(known | {"dataset": self.dataset}))

    def splits(self, data: Path, limit: int | None, seed: int) -> Splits:
        found = self.interactions().splits(data, seed)
        sources = {self.dataset: len(found.train)}
        return Splits(found.train[:limit], found.valid[: min(VALID, limit or VALID)], found.test[:limit], sources)

    def measure(self, pair: Pair, rows: list[Row], data: Path, training: Training) -> dict[str, Pairs]:
        task = self.interactions()
        if pair.alone.pilot.config.is_encoder_decoder:
            ranks = [self.ranks_one_by_one(pair, row, task.item_texts(data)) for row in tqdm(rows, desc="ranking")]
            figures = [figures_of(list(own)) for own in zip(*ranks, strict=True)]
        else:
            figures = [task.measure(model, rows, data) for model in (pair.alone, pair.beside)]
        alone, beside = figures
        return {name: list(zip(alone[name].values, beside[name].values, strict=True)) for name in alone}

    def ranks_one_by_one(self, pair: Pair, row: Row, texts: dict[int, str]) -> tuple[int, int]:
        """The rank of the right item, by the Pilot and by both: every item is scored as a label."""
        tokenizer, model = pair.alone.tokenizer, pair.beside
        prompt = ids_with_end(tokenizer, row["prompt"])
        examples = [{"input_ids": prompt, "labels": ids_with_end(tokenizer, text)} for text in texts.values()]
        strengths = [0.0, model.strength]
        found = score(model.pilot, model.learner.copilot, examples, strengths, ITEMS_AT_ONCE)
        right = list(texts.values()).index(row["completion"])
        sums = [[item.log_likelihoods[i].sum().item() for item in found] for i in range(2)]
        alone, beside = (1 + sum(value > own[right] for value in own) for own in sums)
        return alone, beside


# ---- MetaMathQA -----------------------------------------------------------------------------------------------------

QUERY = "Question: {query} Think step by step.\nAnswer:"
LONGEST = 1300  # characters of query and response
DELIMITERS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def concluded_number(text: str) -> float | None:
    """The number behind the last "The answer is", its fractions computed; None where there is no such number."""
    at = max(text.rfind(delimiter) + len(delimiter) if delimiter in text else -1 for delimiter in DELIMITERS)
    if at < 0:
        return None
    said = text[at:].strip().split("\n")[0].strip(" .!?$%").replace(",", "")
    found = re.fullmatch(r"(-?\d*\.?\d+)(?:\s*/\s*(\d*\.?\d+))?", said)
    if found is None or (found[2] and float(found[2]) == 0):
        return None
    return float(found[1]) / float(found[2] or 1)


@dataclass(frozen=True)
class MetaMathQA:
    """Trained on MetaMathQA, tested on GSM8K, as in PEFT's method comparison."""

    def splits(self, data: Path, limit: int | None, seed: int) -> Splits:
        file = find_file(data / "metamathqa", ["MetaMathQA-395K", "train"])
        train = [
            {"prompt": QUERY.format(query=row["query"]), "completion": row["response"]}
            for row in read_rows(file)
            if len(f"{row['query']} {row['response']}") <= LONGEST
        ]
        test = [
            {"prompt": QUERY.format(query=row["question"]), "answer": row["final"]}
            for row in read_rows(find_file(data / "gsm8k", ["test"]))
        ]
        return split(train, test[:limit], {file.name: len(train)}, limit, seed)

    def measure(self, pair: Pair, rows: list[Row], data: Path, training: Training) -> dict[str, Pairs]:
        texts = pair.answers(rows, "gsm8k", training)
        right = hits(texts, rows, lambda text, answer: concluded_number(text) == last_number(answer))
        return {"gsm8k": right}


TASKS = {
    "commonsense": Reasoning(COMMONSENSE, "commonsense_170k.json"),
    "arithmetic": Reasoning(ARITHMETIC, "math_10k.json"),
    "beauty": NextItem("Beauty"),
    "lastfm": NextItem("LastFM"),
    "metamathqa": MetaMathQA(),
}

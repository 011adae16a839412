"""The next item of a user, in the paper's prompt form; item numbers are digit tokens, all items are ranked exactly.

python -m benchmarks.accuracy.recommendation --data DIR    # what ranking by counts gives, without a model
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor

from benchmarks.accuracy.report import mean_of
from benchmarks.accuracy.scoring import Figures, Rectified
from benchmarks.accuracy.tasks import Splits, Task, llama
from benchmarks.accuracy.trie import Trie, item_scores
from benchmarks.common import Row, read
from recipes.common import make_tokenizer

CUTOFFS = (5, 10, 20, 100)
HISTORY = 10  # latest items in the prompt
CHECKED_USERS, CHECKED_BEAMS, TOLERANCE = 50, 20, 1e-2


@dataclass
class Recommendation(Task):
    """Leave-one-out: the last item of each user is the test, the one before it validation. Reads
    `DIR/<dataset in lower case>/interactions.jsonl[.gz]` with `user` and `items`, oldest first; items get random
    numbers."""

    dataset: str = "LastFM"

    def users(self, data: Path) -> list[Row]:
        return read(data / self.dataset.lower(), "interactions")

    def item_texts(self, data: Path) -> dict[int, str]:
        """The answer for every item: a random number with leading zeros."""
        items = sorted({item for user in self.users(data) for item in user["items"]})
        numbers = list(range(1, len(items) + 1))
        random.Random("items").shuffle(numbers)
        width = len(str(len(items)))
        return {item: f" {self.dataset} item_ {number:0{width}d}" for item, number in zip(items, numbers, strict=True)}

    def row(self, user: int, history: list[int], item: int, texts: dict[int, str]) -> Row:
        seen = " ,".join(texts[i].removeprefix(f" {self.dataset}") for i in history[-HISTORY:])
        prompt = f"Considering {self.dataset} user_ {user} has interacted with {self.dataset} items{seen} . "
        return {"prompt": prompt + "What is the next recommendation for the user ?", "completion": texts[item]}

    def splits(self, data: Path, seed: int) -> Splits:
        texts, train, valid, test = self.item_texts(data), [], [], []
        for user in self.users(data):
            number, items = user["user"], user["items"]
            train += [self.row(number, items[:i], items[i], texts) for i in range(1, len(items) - 2)]
            if len(items) > 2:
                valid.append(self.row(number, items[:-2], items[-2], texts))
                test.append(self.row(number, items[:-1], items[-1], texts))
        random.Random(f"recommendation-{seed}").shuffle(train)
        return Splits(train, valid, test)

    def tokenizer(self, data: Path):
        return make_tokenizer([row["prompt"] + row["completion"] for row in self.splits(data, 0).test])

    def trie(self, model: Rectified, data: Path) -> tuple[Trie, list[str]]:
        texts = list(self.item_texts(data).values())
        return Trie.of([model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]), texts

    def measure(self, model: Rectified, rows: list[Row], data: Path) -> dict[str, Figures]:
        trie, texts = self.trie(model, data)
        number = {text: i for i, text in enumerate(texts)}
        ranks = []
        for row in tqdm(rows, desc=f"{self.name}, λ = {model.strength:g}"):
            scores = item_scores(model, trie, model.tokenizer(row["prompt"])["input_ids"])  # [items]
            ranks.append(1 + int((scores > scores[number[row["completion"]]]).sum()))
        return figures_of(ranks)

    def by_count(self, data: Path) -> dict[str, Figures]:
        """What no model at all gives: items ranked by how often they occur in the training rows, ties behind."""
        splits = self.splits(data, seed=0)
        counts = Counter(row["completion"] for row in splits.train)
        every = [counts[text] for text in self.item_texts(data).values()]
        return figures_of([sum(count >= counts[row["completion"]] for count in every) for row in splits.test])

    def check(self, model: Rectified, rows: list[Row], data: Path) -> dict[str, float]:
        """The exact scores beside constrained beam search, on a few users.

        Raises:
            ValueError: If a score differs by more than `TOLERANCE`.
        """
        if model.learner.copilot.config.error_feedback != "realized":
            return {}  # beams are fed predictions, the trie is not
        trie, _ = self.trie(model, data)
        largest, found = check_with_beams(model, trie, [row["prompt"] for row in rows[:CHECKED_USERS]])
        if largest > TOLERANCE:
            raise ValueError(f"Exact scores of items and those of constrained beam search differ by {largest:.3g}.")
        return {"largest difference of a score": largest, "exact top items that the beams find": found}


def figures_of(ranks: list[int]) -> dict[str, Figures]:
    """H@k and N@k of every user, from the rank of the right item, 1 for the first."""
    hits = {f"H@{k}": Figures([float(rank <= k) for rank in ranks]) for k in CUTOFFS}
    gains = {k: [1 / math.log2(rank + 1) if rank <= k else 0.0 for rank in ranks] for k in CUTOFFS}
    return hits | {f"N@{k}": Figures(gains[k]) for k in CUTOFFS}


@torch.no_grad()
def check_with_beams(model: Rectified, trie: Trie, prompts: list[str]) -> tuple[float, float]:
    """Constrained beam search beside the exact scores: the largest difference of a found item's score, and the share
    of the exact top items that the beams found."""
    end = model.tokenizer.eos_token_id
    children: dict[tuple[int, ...], list[int]] = {}
    sequences = [tuple(sequence) for sequence in trie.item_tokens.tolist()]
    for sequence in sequences:
        for depth, token in enumerate(sequence):
            children.setdefault(sequence[:depth], []).append(token)
    allowed = {prefix: sorted(set(tokens)) for prefix, tokens in children.items()}
    item_of = {sequence: i for i, sequence in enumerate(sequences)}
    largest, found, wanted = 0.0, 0, 0
    for prompt in tqdm(prompts, desc="constrained beam search"):
        ids = model.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.pilot.device)
        length = ids["input_ids"].shape[1]
        constrained = PrefixConstrainedLogitsProcessor(
            lambda _, sent, length=length: allowed.get(tuple(sent[length:].tolist()), [end]), CHECKED_BEAMS
        )
        with model.processor() as processor:
            processors = [constrained] if processor is None else [processor, constrained]
            out = model.pilot.generate(
                **ids,
                logits_processor=LogitsProcessorList(processors),
                num_beams=CHECKED_BEAMS,
                num_return_sequences=CHECKED_BEAMS,
                max_new_tokens=trie.item_tokens.shape[1],
                do_sample=False,
                length_penalty=0.0,
                return_dict_in_generate=True,
                output_scores=True,
                pad_token_id=model.tokenizer.pad_token_id,
            )
        exact = item_scores(model, trie, ids["input_ids"][0].tolist())  # [items]
        items = [item_of[tuple(row)] for row in out.sequences[:, length:].tolist()]
        largest = max(largest, (exact[items] - out.sequences_scores.cpu()).abs().max().item())
        found += len(set(items) & set(exact.topk(CHECKED_BEAMS).indices.tolist()))
        wanted += CHECKED_BEAMS
    return largest, found / wanted


RECOMMENDATION = Recommendation(
    "recommendation",
    "H@10",
    pilot=llama(layers=4, width=128),
    training={"max_steps": 600, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 50},
    copilot={"copilot_learning_rate": 1e-3},
    pretraining_steps=1500,
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="as in run.py")
    for name, figures in RECOMMENDATION.by_count(parser.parse_args().data).items():
        print(f"{name} {mean_of(figures):.1%}")

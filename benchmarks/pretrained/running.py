"""One arm: train, measure, and give what the tables need."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.pretrained.arms import TIMED_COPILOTS, TIMED_PILOTS, Arm, Result, lora
from benchmarks.pretrained.folding import Folding
from benchmarks.pretrained.measuring import ALONE, Likelihoods, Model, Weights
from benchmarks.pretrained.steps import longest
from benchmarks.pretrained.tasks import TASKS, Example, Row, Splits, encode, family
from benchmarks.pretrained.training import CopilotSpec, PilotSpec, Trained, train
from hf_copilot.generation.cuda_graphs import Record, recorder

OTHER_ROWS = 100  # of another task, to see harm
SHOTS = 8  # training rows before each question


@dataclass(frozen=True)
class Limits:
    """Fewer rows and steps, to try things out; None is all."""

    rows: int | None = None
    steps: int | None = None

    def cut(self, rows: list[Row]) -> list[Row]:
        return rows[: self.rows]


@dataclass
class Bench:
    """What the arms of one process share."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: Path
    limits: Limits

    def __post_init__(self):
        self.splits: dict[str, Splits] = {}
        self.kept: dict[str, list[Example]] = {}  # to train on
        for name, task in TASKS.items():
            if task.is_in(self.data):
                train_rows, valid, test = task.splits(self.data)
                self.splits[name] = Splits(train_rows, self.limits.cut(valid), self.limits.cut(test))

    def encoded(self, rows: list[Row]) -> list[Example]:
        return [encode(self.tokenizer, row) for row in rows]

    def to_train(self, task: str) -> list[Example]:
        if task not in self.kept:
            found = self.encoded(self.splits[task].train)
            self.kept[task] = [row for row in found if longest([row]) <= TASKS[task].longest]
        return self.kept[task]

    def steps(self, arm: Arm) -> int:
        steps = arm.pilot.steps(len(self.to_train(arm.task)))
        return min(steps, self.limits.steps or steps)

    def train(
        self,
        examples: list[Example],
        pilot: PilotSpec,
        copilots: Sequence[CopilotSpec],
        steps: int,
        seed: int,
        base: PreTrainedModel | None = None,
    ) -> Trained:
        """[`train`] from `base` or the bench's own, with a recorded step of the Pilot on a GPU."""
        base = self.base if base is None else base
        record = recorder(base.device) if base.device.type == "cuda" else None
        return train(base, self.tokenizer, examples, pilot, copilots, steps, seed, record)

    def run(self, arms: Sequence[Arm]) -> Iterator[Result]:
        """The figures of arms beside one Pilot, arm by arm."""
        try:
            yield from self._run(arms)
        finally:
            free_memory()

    def _run(self, arms: Sequence[Arm]) -> Iterator[Result]:
        begin, one = time.perf_counter(), arms[0]
        examples, steps = self.to_train(one.task), self.steps(one)
        copilots = [arm.copilot for arm in arms if arm.copilot is not None]
        trained = self.train(examples, one.pilot, copilots, steps, one.seed)
        second = self.train(examples, one.pilot, [], steps, one.seed + 100).pilot if one.second else None
        learners = iter(trained.learners)
        models = [
            Model(trained.pilot, self.tokenizer, next(learners) if arm.copilot else None, second) for arm in arms
        ]
        free_memory()
        after_training = time.perf_counter()
        for arm, model in zip(arms, models, strict=True):
            start = time.perf_counter()
            result: Result = {"arm": arm.settings(), "name": arm.name, "steps": steps, "seconds": trained.seconds}
            if model.learner is not None:
                result["copilot_parameters"] = sum(p.numel() for p in model.learner.copilot.parameters())
                result["skipped_steps"] = trained.skipped[copilots.index(arm.copilot)]
                result["replays"] = arm.copilot.replays(len(examples))
            result |= self.measure(arm, model, self.splits[arm.task])
            strength = result["chosen"]["nll"][1]
            if arm.folds and strength > 0:
                result["after"] = Folding(self, arm, model, strength).run()
            result |= {"copilots": len(copilots), "training_seconds": after_training - begin}
            yield result | {"measuring_seconds": time.perf_counter() - start}

    def measure(self, arm: Arm, model: Model, splits: Splits) -> Result:
        if arm.pilot.method == "few-shot":
            splits = self.with_shots(splits)
        valid = model.likelihoods(self.encoded(splits.valid))
        chosen = {by: valid.best(by) for by in ("nll", "accuracy")}
        test_examples = self.encoded(splits.test)
        test = model.likelihoods(test_examples)
        kept = [ALONE, chosen["nll"], chosen["accuracy"], (1.0, 1.0)]
        kept = [weights for weights in dict.fromkeys(kept) if weights in test.grid]
        result: Result = {
            "grid": test.grid,
            "chosen": chosen,
            "valid": means_of(valid),
            "test": means_of(test) | {"tokens": test.tokens.tolist()},
            "rows": [{"weights": weights} | test.at(weights) for weights in kept],
            "other": self.elsewhere(arm, model, chosen["nll"]),
        }
        if arm.answers:
            has_more = len(test.grid) > 1
            asked = [weights for weights in kept if not has_more or weights != ALONE or chosen["nll"] == ALONE]
            result |= self.answers(arm, model, splits.test, test_examples, asked, chosen["nll"])
        return result

    def with_shots(self, splits: Splits) -> Splits:
        """Questions that come after answered ones."""
        end = f"{self.tokenizer.eos_token}\n"
        shots = "".join(row["prompt"] + row["completion"] + end for row in splits.train[:SHOTS])
        asked = ([row | {"prompt": shots + row["prompt"]} for row in rows] for rows in splits[1:])
        return Splits(splits.train, *asked)

    def elsewhere(self, arm: Arm, model: Model, chosen: Weights) -> dict[str, Any]:
        """NLL on rows of other tasks, alone and at the chosen weights: what fine-tuning and Copilot do there."""
        found = {}
        for name, splits in self.splits.items():
            if name == family(name) != family(arm.task):
                likelihoods = model.likelihoods(self.encoded(splits.test[:OTHER_ROWS]))
                nll = likelihoods.means()[0]
                found[name] = {"alone": nll[0], "chosen": nll[likelihoods.grid.index(chosen)]}
        return found

    def answers(
        self,
        arm: Arm,
        model: Model,
        rows: list[Row],
        examples: list[Example],
        asked: list[Weights],
        chosen: Weights,
    ) -> Result:
        task = TASKS[arm.task]
        greedy = [
            {"weights": weights, "right": [int(x) for x in model.right(rows, examples, task, weights)]}
            for weights in asked
        ]
        if not (arm.samples and task.samples):
            return {"greedy": greedy}
        torch.manual_seed(0)
        sampled = model.right(rows, examples, task, chosen, task.samples)
        return {"greedy": greedy, "sampled": [{"weights": chosen, "right": sampled}]}

    def time(self, task: str, steps: int = 6, skip: int = 2) -> dict[str, Any]:
        """Seconds of a step by part, with nothing else on the machine, for every shape of Pilot and Copilot: operator
        by operator, as a trainer takes it, and on a GPU the Pilot's step as it is taken here."""
        examples = self.to_train(task)

        def seconds(
            pilot: PilotSpec, copilot: CopilotSpec | None = None, record: Record | None = None
        ) -> dict[str, float]:
            copilots = [] if copilot is None else [copilot]
            arguments = (self.base, self.tokenizer, examples, pilot, copilots, steps, 0, record)
            found = train(*arguments, exact_clock=True, skip_in_clock=skip).seconds
            return {part: value / (steps - skip) for part, value in found.items()}

        plain = lora(1e-3, 1.0)
        seconds(plain)  # warms up
        pilots = {"lora": seconds(plain)}
        copilots = []
        for copilot in TIMED_COPILOTS if task == "mawps" else TIMED_COPILOTS[:2]:
            copilots.append({"shape": copilot.shape, "steps": copilot.steps} | seconds(plain, copilot))
        for method in TIMED_PILOTS if task == "mawps" else ():
            pilots[method] = seconds(PilotSpec(method, 1e-4, 1.0))
        if self.base.device.type == "cuda":
            pilots["lora, one graph"] = seconds(plain, record=recorder(self.base.device))
        return {"pilots": pilots, "copilots": copilots}


def free_memory() -> None:
    """Other processes share the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def means_of(likelihoods: Likelihoods) -> dict[str, list[float]]:
    nll, accuracy = likelihoods.means()
    return {"nll": [round(x, 6) for x in nll], "accuracy": [round(x, 6) for x in accuracy]}

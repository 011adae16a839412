"""Honest mistakes: other sources of errors, and other ways to keep and draw them, than the last 128 training rounds.

Every way has the same data and the same steps of Pilot and Copilot; what it costs besides is said where it is built.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.accuracy.scoring import BATCH, Rectified, beside
from benchmarks.accuracy.training import Setting, Trained, Variant
from benchmarks.common import Row
from hf_copilot import CopilotArguments, CopilotLearner, CopilotModel, MistakeLog, copilot_for
from hf_copilot.training.mistake_log import MistakeRecord

ALL_ROUNDS, ALL_BYTES = 100_000, 2**34


class ReservoirLog(MistakeLog):
    """A uniform sample of all rounds so far: when it is full, round t takes a random place with probability
    max_rounds / t."""

    def clear(self) -> None:
        super().clear()
        self.seen, self.random = 0, random.Random(0)

    def append(self, records: list[MistakeRecord]) -> None:
        self.seen += 1
        if len(self.rounds) == self.max_rounds:
            place = self.random.randrange(self.seen)
            if place >= self.max_rounds:
                return
            self._drop(self.rounds[place])
            del self.rounds[place]
        super().append(records)


class WeightedLog(MistakeLog):
    """Draws documents in proportion to their mean error, ½ Σ_k |ℓ_k|, about 1 − p̂(y)."""

    def sample(self, count: int, generator: torch.Generator) -> list[MistakeRecord]:
        records = [record for round_ in self.rounds for record in round_]
        if len(records) <= count:
            return records
        errors = torch.stack([record.values.abs().sum(-1).mean() / 2 for record in records])  # [records]
        picked = torch.multinomial(errors.clamp_min(1e-6), count, generator=generator).tolist()
        return [records[i] for i in picked]


class ReservoirLearner(CopilotLearner):
    def __init__(self, *args: Any, log: MistakeLog, **kwargs: Any):
        super().__init__(*args, log=ReservoirLog(log.max_rounds, log.max_bytes), **kwargs)


class WeightedLearner(CopilotLearner):
    def __init__(self, *args: Any, log: MistakeLog, **kwargs: Any):
        super().__init__(*args, log=WeightedLog(log.max_rounds, log.max_bytes), **kwargs)


def cross_fit(
    setting: Setting, tokenizer, rows: list[Row], seed: int, variant: Variant, trained: Trained
) -> Rectified:
    """Two Pilots, each trained on one half of the rows, log the other half; the Copilot learns from both logs, for as
    many steps as a Pilot takes, and is attached to the Pilot of `trained`, which has seen everything. Costs a second
    training of the Pilot, in two halves, and a pass over the data."""
    halves = rows[::2], rows[1::2]
    steps = setting.task.training["max_steps"]
    learners = []
    for own, other in (halves, halves[::-1]):
        pilot = setting.train(setting.base(tokenizer, seed), tokenizer, own, seed, max_steps=steps // 2).pilot
        copilot = learners[0].copilot if learners else None
        learners.append(log_rows(setting, tokenizer, pilot, other, seed, variant, copilot))
    teach(learners, steps, setting.task.training["per_device_train_batch_size"])
    return beside(Rectified(trained.pilot, tokenizer), CopilotLearner(learners[0].copilot, trained.pilot))


def log_rows(
    setting: Setting,
    tokenizer,
    pilot: PreTrainedModel,
    rows: list[Row],
    seed: int,
    variant: Variant,
    copilot: CopilotModel | None = None,
) -> CopilotLearner:
    """A learner, of this Copilot or a new one, whose log holds these rows as the Pilot, which stays as it is, sees
    them."""
    copilot = copilot or copilot_for(setting.base(tokenizer, seed), variant.copilot_config())
    args = CopilotArguments(**({"copilot_strength": "config"} | setting.task.copilot | variant.arguments))
    learner = CopilotLearner(
        copilot,
        pilot,
        learning_rate=args.copilot_learning_rate,
        weight_decay=args.copilot_weight_decay,
        warmup_steps=50,
        log=MistakeLog(ALL_ROUNDS, ALL_BYTES),
        steps_per_round=args.copilot_steps_per_round,
        seed=seed,
    )
    learner.start(setting.task.training["max_steps"])
    model = Rectified(pilot, tokenizer)
    examples = setting.encoded(tokenizer, rows)
    for start in range(0, len(examples), BATCH):
        inputs = model.collate(examples[start : start + BATCH])
        learner.log.append(learner.visit(inputs, lambda inputs=inputs: pilot(**inputs)))
    learner.close()
    return learner


def teach(learners: list[CopilotLearner], steps: int, documents: int) -> None:
    """The Copilot, the same of all learners, learns from their logs in turn, with the first one's optimizer."""
    optimizer = learners[0].optimizer
    for step in range(steps):
        learner = learners[step % len(learners)]
        for _ in range(learner.steps_per_round):
            optimizer.step(learner.forced, learner.log.sample(documents, learner.generator), learner.max_positions)
        optimizer.scheduler.step()

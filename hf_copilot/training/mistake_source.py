"""Whose errors the Mistake Log holds (`copilot_mistake_source`): one class for each source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import Trainer, TrainerState
from transformers.utils import logging

from ..pilot.inspect import without_logits
from .learner import CopilotLearner
from .mistake_log import MistakeRecord
from .row_ids import without_row_ids

logger = logging.get_logger(__name__)


class MistakeSource:
    """One source of mistakes."""

    def check(self, learner: CopilotLearner, state: TrainerState) -> None:
        """Say what this source can't do in the run that begins."""

    def records(self, learner: CopilotLearner, state: TrainerState) -> list[MistakeRecord] | None:
        """What the log is given in place of this round's own records; None keeps these."""
        return None


class TrainingErrors(MistakeSource):
    """`"train"`: every forward of the Pilot's training (the paper)."""


class FirstVisit(MistakeSource):
    """`"first_visit"`: the forwards of the first epoch, before the Pilot has seen the document."""

    def check(self, learner: CopilotLearner, state: TrainerState) -> None:
        """
        Raises:
            ValueError: If the run resumes after the first epoch without the log of it: nothing would be learnt any
                more.
        """
        if (state.epoch or 0) >= 1 and not len(learner.log):
            raise ValueError(
                "The first epoch is over and its Mistake Log is not in the checkpoint: with copilot_mistake_source="
                "'first_visit' the Copilot has nothing to learn from. Resume with copilot_mistake_source='train', or "
                "from a checkpoint that holds the log (copilot_save_mistake_log=True, as many processes)."
            )
        head = learner.head.pilot.get_output_embeddings()
        if learner.copilot.config.objective == "cross_entropy" and any(p.requires_grad for p in head.parameters()):
            logger.warning(
                "copilot_mistake_source='first_visit' keeps hidden states of the first epoch while the Pilot's head "
                "is trained on: the logits that the Copilot learns to correct are of old states and the new head. "
                "Freeze the head (LoRA), or use copilot_mistake_source='train' or 'holdout'."
            )

    def records(self, learner: CopilotLearner, state: TrainerState) -> list[MistakeRecord] | None:
        return [] if state.epoch > 1 else None


class Holdout(MistakeSource):
    """`"holdout"`: a slice of the training data that the Pilot never trains on, batch by batch; after the last row
    comes the first.

    Args:
        rows: The slice.
        collate: Makes the Pilot's inputs of some rows.
        batch_size: Rows of one batch.
        processes, index: How many there are, and which this one is: they take batches in turn.
        device: Of the Pilot's inputs.
        context: Gives the context of the Pilot's forward.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        collate: Callable[[list[Any]], dict[str, Any]],
        batch_size: int,
        processes: int = 1,
        index: int = 0,
        device: torch.device | str = "cpu",
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.rows, self.collate, self.batch_size = rows, collate, batch_size
        self.processes, self.index, self.device, self.context = processes, index, device, context

    def batch(self, index: int) -> dict[str, Any]:
        """The inputs of batch `index`; counted over all processes, it depends on nothing else."""
        start = index * self.batch_size
        return self.collate([self.rows[i % len(self.rows)] for i in range(start, start + self.batch_size)])

    def records(self, learner: CopilotLearner, state: TrainerState) -> list[MistakeRecord]:
        inputs = send_to_device(self.batch(learner.steps * self.processes + self.index), self.device)
        pilot = learner.head.trained
        with self.context():
            return learner.visit(inputs, lambda: pilot(**without_logits(pilot, inputs)))


def split_holdout(rows: Any, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows held out, at random.

    Raises:
        ValueError: If the share is not between 0 and 1, leaves no row on one side, or the rows can't be split.
    """
    if not isinstance(rows, Dataset):
        raise ValueError(
            f"copilot_mistake_source='holdout' splits a `datasets.Dataset`, not a {type(rows).__name__}: pass one, or "
            "leave it at 'train'."
        )
    held_out = round(share * len(rows))
    if not 0 < held_out < len(rows):
        raise ValueError(
            f"copilot_holdout={share} of {len(rows)} rows leaves none to hold out or none to train on: it is a share "
            "between 0 and 1."
        )
    parts = rows.train_test_split(held_out, seed=seed)
    return parts["train"], parts["test"]


def hold_out(trainer: Trainer, share: float) -> Holdout:
    """Take a share of a trainer's rows out of its training, by its seed."""
    args = trainer.args
    trainer.train_dataset, rows = split_holdout(trainer.train_dataset, share, args.seed)
    loader = trainer.get_test_dataloader(without_row_ids(rows))  # that of evaluation may be kept, and given out again
    return Holdout(
        loader.dataset,
        loader.collate_fn,
        args.per_device_train_batch_size,
        processes=args.world_size,
        index=args.process_index,
        device=args.device,
        context=trainer.compute_loss_context_manager,
    )

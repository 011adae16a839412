"""The Copilot's optimizer steps: gradients of a draw over micro-batches and processes; what fails is left out."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from ..model.fields import is_whole
from ..model.modeling_copilot import CopilotModel
from .batch import ROOM, CopilotBatch
from .distributed import num_processes, sum_count, sum_over_processes
from .mistake_log import MistakeRecord
from .teacher_forced import TeacherForced

logger = logging.getLogger(__name__)

SKIPS_TO_WARN = 5  # steps in a row


def check_ranges(
    steps_per_round: int, learning_rate: float, weight_decay: float, max_grad_norm: float, prefix: str = ""
) -> None:
    """Raise a `ValueError` for a number that no training can have."""
    if not (is_whole(steps_per_round) and steps_per_round >= 1):
        raise ValueError(f"{prefix}steps_per_round={steps_per_round}: must be at least one step (the paper takes 1).")
    if not max_grad_norm >= 0:
        raise ValueError(f"{prefix}max_grad_norm={max_grad_norm}: must be at least 0, which does not clip.")
    for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{prefix}{name}={value}: must be finite and at least 0.")


class CopilotOptimizer:
    """AdamW and its schedule, for the parameters of a Copilot that learn; matrices alone decay.

    Args:
        copilot: Whose parameters these are.
        num_training_steps: Rounds of the schedule.
        learning_rate, weight_decay, max_grad_norm: Of AdamW; a norm of 0 does not clip.
        warmup_steps, lr_scheduler_type, lr_scheduler_kwargs: Of its schedule, as in transformers.
    """

    def __init__(
        self,
        copilot: CopilotModel,
        *,
        num_training_steps: int,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float,
        warmup_steps: int,
        lr_scheduler_type: str,
        lr_scheduler_kwargs: dict[str, Any],
    ):
        self.copilot, self.max_grad_norm = copilot, max_grad_norm
        copilot.zero_grad()  # of a step that was interrupted
        self.limit: int | None = None  # positions of one batch, where memory ran out
        self.skips = torch.zeros(2, dtype=torch.int64, device=copilot.device)  # in all, and in a row
        self.has_warned = False  # of those in a row
        decay = [p for p in self.parameters() if p.ndim > 1]
        no_decay = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
        self.scheduler = get_scheduler(
            lr_scheduler_type,
            self.adamw,
            warmup_steps,
            max(num_training_steps, 1),
            scheduler_specific_kwargs=lr_scheduler_kwargs,
        )

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.copilot.parameters() if parameter.requires_grad]

    def room_beside(self, max_positions: int) -> int:
        """Positions that one batch may have: as many as the Pilot's largest, or what usually fits; fewer where memory
        ran out."""
        room = max(max_positions, ROOM)
        return room if self.limit is None else min(room, self.limit)

    def step(
        self, forced: TeacherForced, records: Sequence[MistakeRecord], max_positions: float = math.inf
    ) -> torch.Tensor | None:
        """One step on these documents of this process and those of the others; gives the loss, a mean over targets or
        sequences. It is NaN if the step was left out, where loss or gradient is not finite, or memory ran out, in any
        process; the device decides that, the CPU does not wait for it. Without a target the loss is None.

        Args:
            forced: Gives the loss.
            max_positions: Of one batch.
        """
        per_sequence = self.copilot.config.objective == "rmse"
        count = sum(r.num_sequences if per_sequence else len(r.labels) for r in records)
        total = sum_count(count, forced.device)
        if not total:
            return None
        self.copilot.train()
        loss = self._backward(forced, records, total, max_positions)
        norm = self._sum_gradients(loss)
        failed = ~(loss + norm).isfinite()  # []
        self.adamw.found_inf = failed.float()  # the fused step leaves all as it was where this is 1
        self.adamw.step()
        self.adamw.zero_grad()
        self.skips = self.skips.to(failed.device)
        self.skips += failed  # in place, see OwnStream
        self.skips[1] *= failed
        return loss.masked_fill(failed, torch.nan)

    def _backward(
        self, forced: TeacherForced, records: Sequence[MistakeRecord], total: int, max_positions: float
    ) -> torch.Tensor:
        """This process's part of the loss, with its gradients. Where memory ran out NaN, and less room after; where
        compiling failed the same without."""
        loss, batch = torch.zeros((), device=forced.device), None
        try:
            for batch in forced.batches(records, max_positions):
                self._keep_gradients(forced)
                with forced.autocast():
                    part = forced.loss(batch) / total
                part.backward()
                loss += part.detach()
        except torch.OutOfMemoryError:
            loss.fill_(torch.nan)
            self.adamw.zero_grad()
            self._lower_limit(batch)
        except Exception as error:
            forced.give_up_compiling(error)
            self.adamw.zero_grad()
            return self._backward(forced, records, total, max_positions)
        return loss

    def _lower_limit(self, failed: CopilotBatch | None) -> None:
        """To half of the batch that failed; a document that does not fit by itself says nothing of others."""
        rows, positions = 2, self.limit or ROOM
        if failed is not None:
            rows, longest = failed.inputs["memory"].shape[:2]
            positions = rows * longest
        if rows > 1:
            self.limit = max(1, min(self.limit or positions, positions // 2))

    def _keep_gradients(self, forced: TeacherForced) -> None:
        """Copy those of the batches so far, which the next pass of a CUDA graph would write over."""
        learnt = [parameter for parameter in self.parameters() if parameter.grad is not None]
        if learnt and forced.has_graphs:
            for parameter in learnt:
                parameter.grad = parameter.grad.clone()

    def _sum_gradients(self, loss: torch.Tensor) -> torch.Tensor:
        """Sum loss and gradients over the processes, one of which may have had no document; clip; the norm before."""
        parameters = self.parameters()
        if num_processes() > 1:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        sum_over_processes([loss, *(p.grad for p in parameters if p.grad is not None)])
        return nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)

    def say_what_stays(self, groups: Sequence[dict[str, Any]]) -> None:
        """Where a run resumes from these groups of AdamW's parameters with other arguments: it goes on as it was, as
        the Pilot's does."""
        for name, argument in (("initial_lr", "copilot_learning_rate"), ("weight_decay", "copilot_weight_decay")):
            before, now = (max(group[name] for group in both) for both in (groups, self.adamw.param_groups))
            if before != now:
                logger.warning(f"{argument} stays {before:g}, which the run was started with; {now:g} is not taken.")

    def count_skips(self) -> int:
        """Steps that were left out; warns of many in a row."""
        total, in_a_row = self.skips.tolist()
        if in_a_row >= SKIPS_TO_WARN and not self.has_warned:
            logger.warning(
                "The Copilot's step was left out %d times in a row: its loss or gradient is not finite, or its memory "
                "ran out. The Pilot's training goes on. Lower copilot_learning_rate or copilot_max_grad_norm; for "
                "memory lower per_device_train_batch_size, or train a smaller Copilot or one with an adapter "
                "(copilot_peft_config).",
                in_a_row,
            )
        self.has_warned = in_a_row >= SKIPS_TO_WARN
        return total

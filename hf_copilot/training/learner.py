"""The co-training engine, for any PyTorch loop: observe the Pilot's forwards, step the Copilot once per round.

learner = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=len(loader))
for batch in loader:
    with learner.observe(batch):
        loss = pilot(**batch).loss
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    learner.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from ..model.modeling_copilot import CopilotModel
from ..pilot.compatibility import check_teacher_forced
from ..pilot.inspect import eval_mode, isolated_rng
from .adapter import add_adapter, merged_copy
from .beside import BesideThePilot, OwnStream
from .distributed import copy_from_main_process, process_index
from .ledger import LedgerWriter
from .metrics import (
    STRENGTHS,
    RunningMetrics,
    choose_strength,
    empty_sums,
    measure,
    over_processes,
    say_if_little,
    strengths_to_try,
    use_calibration,
)
from .mistake_log import MistakeLog, MistakeRecord
from .optimizer import CopilotOptimizer, check_ranges
from .records import PendingRecords, random_start
from .teacher_forced import TeacherForced

NOTHING_OBSERVED = (
    "No forward of the Pilot was observed in this round, so its Copilot would learn nothing. In a loop of your own: "
    "put `with learner.observe(batch):` around the Pilot's forward. In a subclass of CopilotTrainer with a "
    "compute_loss of its own: call super().compute_loss, or put "
    "`with (self.learner.observe if self.model.training else self.learner.evaluate)(inputs):` around the model's "
    "forward. With CopilotCallback: the Pilot's own forward must be called, in training mode, with its labels."
)
NOT_STARTED = "The Copilot has no schedule yet: pass num_training_steps, or call start() with it first."


class CopilotLearner(BesideThePilot):
    """Owns the Copilot, its optimizer, scheduler, Mistake Log and random generator (Algorithm 1 of the paper).

    The Pilot is only read: its losses, weights and the global random state are what they were without a learner.
    With several processes (DDP) each has its own log and draws; losses, gradients and metrics are summed over them, so
    every process must call `start`, `step` and `pop_metrics`. The Copilots stay the same on all.
    `exported().save_pretrained(...)` saves the Copilot; `hf_copilot.training.checkpoint` all that a run goes on from.

    Args:
        copilot: Trained in place; moved to the device of the Pilot's head.
        pilot: The model that is fine-tuned, wrapped or not.
        num_training_steps: Steps of the schedule; or call `start` later.
        learning_rate, weight_decay, max_grad_norm: Of the Copilot's AdamW; a norm of 0 does not clip.
        warmup_steps, lr_scheduler_type, lr_scheduler_kwargs: Of its schedule, as in transformers.
        log, log_dtype: Defaults to `MistakeLog()`; the type of the hidden states in it.
        steps_per_round: Optimizer steps of the Copilot in one round, each on documents of its own draw.
        seed, autocast_dtype: Of the draws and of the Copilot's dropout; its type under autocast, None for its own.
        compile_backend: Compiles the Copilot's blocks with this backend of `torch.compile`; None does not.
        peft_config: Trains the Copilot with this adapter; its new modules are trained in full.
        ledger: Written of every round; see [`LedgerWriter`].
        own_stream: Runs rounds on a CUDA stream of their own, beside what comes next; see [`join`].

    Raises:
        ValueError, NotImplementedError: For what does not fit or is not supported; it says what to use instead.
    """

    teacher_forced_class = TeacherForced

    def __init__(
        self,
        copilot: CopilotModel,
        pilot: nn.Module,
        num_training_steps: int | None = None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        max_grad_norm: float = 1.0,
        warmup_steps: int = 0,
        lr_scheduler_type: str = "cosine",
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        log: MistakeLog | None = None,
        log_dtype: torch.dtype = torch.bfloat16,
        steps_per_round: int = 4,
        seed: int = 42,
        autocast_dtype: torch.dtype | None = None,
        compile_backend: str | None = None,
        peft_config: PeftConfig | None = None,
        ledger: LedgerWriter | None = None,
        own_stream: bool = False,
    ):
        check_ranges(steps_per_round, learning_rate, weight_decay, max_grad_norm)
        self.stream = OwnStream(own_stream)
        self.forced = self.teacher_forced_class(copilot, pilot, autocast_dtype, compile_backend)
        self.head, self.copilot = self.forced.head, copilot
        with isolated_rng(self.device, seed):
            self.peft_model = None if peft_config is None else add_adapter(copilot, peft_config, autocast_dtype)
        self.warmup_steps, self.ledger = warmup_steps, ledger
        settings = {"lr_scheduler_type": lr_scheduler_type, "lr_scheduler_kwargs": lr_scheduler_kwargs or {}}
        settings |= {"learning_rate": learning_rate, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        self.make_optimizer = partial(CopilotOptimizer, copilot, **settings)
        self.log = log if log is not None else MistakeLog()
        self.row_ids: dict[str, Any] = {}  # of the next batch, where it does not hold them itself
        self.log_dtype, self.steps_per_round, self.seed = log_dtype, steps_per_round, seed
        self.optimizer: CopilotOptimizer | None = None  # from `start` on
        self.calibrating: tuple[Sequence[float], torch.Tensor] | None = None  # λ and sums, inside `calibrate`
        self._forget()
        if num_training_steps is not None:
            self.start(num_training_steps)

    @property
    def skipped_steps(self) -> int:
        """The Copilot's steps that were left out."""
        return 0 if self.optimizer is None else self.optimizer.count_skips()

    @property
    def device(self) -> torch.device:
        return self._forced.device

    @property
    def round(self) -> list[MistakeRecord]:
        """The documents observed since the last step, waited for."""
        return [record for pending in self.pending for record in pending.records]

    def _forget(self) -> None:
        """Begin with an empty log."""
        self.generator = torch.Generator().manual_seed(self.seed + process_index())
        self.pending: list[PendingRecords] = []  # of the round's forwards
        self.steps, self.max_positions = 0, 1  # of the Pilot's largest micro-batch
        self.has_observed = False  # whether the round has a forward, be it without a target
        self.log.clear()
        self.metrics = RunningMetrics(self.strengths, self.device)

    def start(self, num_training_steps: int) -> None:
        """Begin a run: check the Pilot's head, put the hooks in place, build optimizer and schedule, empty the log.
        The Copilot's weights stay; those of the main process are copied to all."""
        check_teacher_forced(self.copilot, self.head.trained)  # the Pilot may have changed since it was given
        self.head.check()
        self.copilot.vocabulary(self.forced.lent)  # raises where the Pilot can't lend its own
        self.forced.follow_pilot()
        self.stream.start(self.head.trained, self.device)
        self.forced.tap.open()
        self._forget()
        self.copilot.config.forget_results()
        copy_from_main_process(self.copilot.parameters())
        self.optimizer = self.make_optimizer(num_training_steps=num_training_steps, warmup_steps=self.warmup_steps)

    def close(self) -> None:
        """Remove the hooks from the Pilot, which the next `observe` or `evaluate` puts back, and write the ledger."""
        self.forced.close()
        self.stream.close()
        if self.optimizer is not None:
            self.optimizer.count_skips()  # warns
        if self.ledger is not None:
            self.ledger.flush()

    # ---- observing -------------------------------------------------------------------------------------------------

    @contextmanager
    def observe(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Log the first forward of the Pilot inside the block; leave it before `backward()`.

        Args:
            inputs: The batch: `input_ids`, `labels` `[B, T]`, and `attention_mask` or (padding-free) `position_ids`;
                for the ledger `row_ids` `[B]`, the indices of the rows in the data set.

        Raises:
            ValueError: If there are no labels, or the Pilot's decoder does not run inside the block.
        """
        with self._forced.watch(inputs):
            yield
        self.has_observed = True
        note = None if self.ledger is None else self.ledger.collect
        self.pending.append(self._begin_records({**self.row_ids, **inputs}, note))
        self.row_ids = {}

    @contextmanager
    def evaluate(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Add the first forward inside the block to the evaluation's metrics; nothing is logged."""
        with self.forced.watch(inputs):
            yield
        with self.head.gathered():
            size = self.forced.positions
            strengths, sums = self.calibrating or (self.strengths, self.metrics.sums["eval"])
            sums += measure(self.forced, self.forced.records(inputs), strengths, size)

    @torch.no_grad()
    def visit(self, inputs: Mapping[str, Any], forward: Callable[[], Any]) -> list[MistakeRecord]:
        """Records for [`step`], as the log holds them, of documents that the Pilot does not train on: it is run in
        [`eval_mode`], and the global random state is left as it was."""
        with isolated_rng(self.device), eval_mode(self.head.trained), self._forced.watch(inputs):
            forward()
        return self._begin_records(inputs).records

    def _begin_records(self, inputs: Mapping[str, Any], note: Callable | None = None) -> PendingRecords:
        self.max_positions = max(self.max_positions, self._forced.positions)
        with self.head.gathered():
            return self._forced.begin_records(inputs, self.log_dtype, "cpu", note)

    # ---- learning --------------------------------------------------------------------------------------------------

    def step(self, measure: bool = False, mistakes: list[MistakeRecord] | None = None) -> None:
        """Learn after one round: `steps_per_round` steps, each on as many documents as the round had, drawn from the
        log.

        Without a labelled token in the round of any process there is nothing to learn and only the schedule goes on.
        A step whose loss or gradient is not finite, or that runs out of memory, is left out on all processes and
        counted in `skipped_steps`.

        Args:
            measure: First add this round's documents, which the Copilot has not seen, to the training metrics.
            mistakes: Records to log instead of this round's own; an empty list leaves the log as it is.

        Raises:
            ValueError: Before `start`, or if no forward was observed since the last step.
        """
        if self.optimizer is None or not self.has_observed:
            raise ValueError(NOT_STARTED if self.optimizer is None else NOTHING_OBSERVED)
        records, self.pending, self.has_observed = self.round, [], False
        has_encoder = self.copilot.config.pilot_is_encoder_decoder
        seed = self.seed + 1_000_003 * self.steps + process_index()
        with self.stream.beside(), self.head.gathered(), isolated_rng(self.device, seed):
            if records and measure:
                self.metrics.add_round(self.forced, records, self.strengths, self.room)
            mistakes = records if mistakes is None else mistakes
            if mistakes:
                self.log.append(mistakes)
            for _ in range(self.steps_per_round):
                drawn = self.log.sample(len(records), self.generator)
                self.update([random_start(record, self.generator, has_encoder) for record in drawn])
            self.optimizer.scheduler.step()
        self.steps += 1
        if self.ledger is not None:
            self.ledger.end_round()

    @property
    def room(self) -> int:
        """Positions that one batch of the Copilot may have."""
        return self.optimizer.room_beside(self.max_positions)

    def update(self, records: Sequence[MistakeRecord]) -> None:
        """One optimizer step on these documents; see [`CopilotOptimizer.step`]."""
        loss = self.optimizer.step(self.forced, records, self.room)
        if loss is not None:
            self.metrics.add_loss(loss)

    # ---- measuring -------------------------------------------------------------------------------------------------

    @property
    def strengths(self) -> tuple[float, float]:
        """λ of the metrics: the Pilot's and the Copilot's own."""
        return 0.0, self.copilot.config.strength

    @contextmanager
    def calibrate(self, strengths: Sequence[float] = STRENGTHS, data: str = "", metric: str = "nll") -> Iterator[None]:
        """Choose λ: inside the block `evaluate` measures at all `strengths`, and 0, the Pilot alone; at its end the
        best one becomes the Copilot's, so that by this metric it is never worse than the Pilot there. All of it is
        kept in `copilot.config.calibration`, and what was measured at the best one in `copilot.config.results`.

        Args:
            data: What is measured on, in words.
            metric: `"nll"`, for text that is sampled and for likelihoods, or `"token_accuracy"`, for greedy answers.

        Raises:
            ValueError: If a λ is negative or not finite, the block measures no labelled token, or for another metric.
        """
        strengths = strengths_to_try(strengths, metric)
        sums = empty_sums(strengths)
        self.calibrating = strengths, sums
        try:
            yield
        finally:
            self.calibrating = None
        found = choose_strength(over_processes(sums, self.device), strengths, data, metric)
        say_if_little(found)
        use_calibration(self.copilot.config, found)

    def pop_metrics(self, mode: str = "train") -> dict[str, float]:
        """The metrics since the last call, over all processes: means over targets, and in training the mean of the
        Copilot's loss."""
        metrics = self.metrics.pop(mode, self.device)
        if mode == "train" and (skipped_steps := self.skipped_steps):
            metrics["copilot_skipped_steps"] = skipped_steps
        if mode == "train" and self.log.capped:
            metrics["copilot_log_rounds"] = len(self.log.rounds)
        return metrics

    def exported(self, device: str | torch.device | None = None) -> CopilotModel:
        """The Copilot as plain weights: itself, or a copy of now with its adapter merged, and with the same config.
        The copy is made on `device`, by default where the Copilot is."""
        return self.copilot if self.peft_model is None else merged_copy(self.peft_model, device or self.device)

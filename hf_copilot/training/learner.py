"""The co-training engine, for any PyTorch loop: observe the Pilot's forwards, step the Copilot once per round.

learner = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=len(loader))
for batch in loader:
    with learner.observe(batch):
        loss = pilot(**batch).loss
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    learner.step()
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import get_scheduler

from ..model.configuration_copilot import check_strength
from ..model.discrepancy import cross_entropy_loss, rmse_loss, row_chunks
from ..model.modeling_copilot import CopilotModel, Vocabulary
from ..pilot.compatibility import check_pilot
from ..pilot.head import PilotEmbedding, PilotHead
from ..pilot.inspect import eval_mode, is_sharded, isolated_rng
from ..pilot.tap import PilotStates, PilotTap
from ..pilot.vocabulary import lent_vocabulary
from .adapter import add_adapter, merged_copy
from .batch import CopilotBatch, group_by_length, make_records
from .distributed import copy_from_main_process, num_processes, process_index, sum_count, sum_over_processes
from .metrics import METRICS_OF_STRENGTH, STRENGTHS, calibration_of, no_sums, sums_of
from .mistake_log import MistakeLog, MistakeRecord

logger = logging.getLogger(__name__)

METRICS = ("pilot_nll", "pilot_token_accuracy", "rectified_nll", "rectified_token_accuracy", "copilot_dropped_mass")
SKIPS_TO_WARN = 5  # steps in a row


class CopilotLearner:
    """Owns the Copilot, its optimizer, scheduler, Mistake Log and random generator (Algorithm 1 of the paper).

    The Pilot is only read: its losses, weights and the global random state are what they were without a learner.

    With several processes (DDP) each has its own log and draws; losses, gradients and metrics are summed over them, so
    every process must call `start`, `step` and `pop_metrics`. The Copilots stay the same on all.

    `exported().save_pretrained(...)` saves the Copilot; [`hf_copilot.training.learner_state`] saves and loads what a
    run that goes on needs besides.

    Args:
        copilot: Trained in place; moved to the device of the Pilot's head.
        pilot: The model that is fine-tuned, wrapped or not.
        num_training_steps: Steps of the schedule; or call `start` later.
        learning_rate, weight_decay, max_grad_norm: Of the Copilot's AdamW; a norm of 0 does not clip.
        warmup_steps, lr_scheduler_type, lr_scheduler_kwargs: Of its schedule, as in transformers.
        log: Defaults to `MistakeLog()`.
        log_dtype: Of the hidden states in the log.
        steps_per_round: Optimizer steps of the Copilot in one round, each on documents of its own draw.
        seed: Of the draws from the log and of the Copilot's dropout.
        autocast_dtype: Runs the Copilot under autocast in this type; None for its own.
        compile_backend: Compiles the Copilot's forward with this backend of `torch.compile`; None does not.
        peft_config: Trains the Copilot with this adapter; its new modules are trained in full.
    """

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
    ):
        self.head, self.embedding = PilotHead(pilot), PilotEmbedding(pilot)
        if is_sharded(copilot):
            raise NotImplementedError(
                "The Copilot is sharded (fully_shard), but each process must hold it whole: where it is too large, "
                "train it with an adapter (copilot_peft_config=LoraConfig(...))."
            )
        if copilot.config.vocab_size != self.head.vocab_size:
            raise ValueError(
                f"The Copilot has {copilot.config.vocab_size} output rows and the Pilot {self.head.vocab_size}: to "
                "learn or be measured it needs as many. Take a Pilot that has, or build a Copilot with "
                "copilot_for(pilot); only generation, CopilotLogitsProcessor(..., tokenizer=...), takes other padding "
                "rows of the same tokenizer."
            )
        check_pilot(copilot, pilot)
        if steps_per_round < 1:
            raise ValueError(f"steps_per_round={steps_per_round}: must be at least one step (the paper takes 1).")
        if not max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: must be at least 0, which does not clip.")
        self.steps_per_round = steps_per_round
        self.device = self.head.device
        self.copilot = copilot.to(self.device)
        with isolated_rng(self.device, seed):
            self.peft_model = add_adapter(copilot, peft_config) if peft_config is not None else None
        self.forward = torch.compile(copilot, backend=compile_backend, dynamic=True) if compile_backend else copilot
        self.learning_rate, self.weight_decay, self.max_grad_norm = learning_rate, weight_decay, max_grad_norm
        self.warmup_steps, self.lr_scheduler_type = warmup_steps, lr_scheduler_type
        self.lr_scheduler_kwargs = lr_scheduler_kwargs or {}
        self.log = log if log is not None else MistakeLog()
        self.log_dtype, self.seed, self.autocast_dtype = log_dtype, seed, autocast_dtype
        self._forget()
        self.optimizer: torch.optim.Optimizer | None = None  # from `start` on
        self.calibration: tuple[Sequence[float], torch.Tensor] | None = None  # λ and sums, inside `calibrate`
        self._listening, self._caught = False, None
        self.tap = PilotTap(pilot, copilot.config, self._catch, lambda: self._listening)
        if num_training_steps is not None:
            self.start(num_training_steps)

    def _forget(self) -> None:
        """Begin with an empty log."""
        self.generator = torch.Generator().manual_seed(self.seed + process_index())
        self.steps = self.skipped_steps = self.skips_in_a_row = 0
        self.round: list[MistakeRecord] = []
        self.log.clear()
        self.largest_batch = 1  # positions of the Pilot's largest micro-batch, the bound of the Copilot's own
        self.sums = {mode: no_sums(self.strengths) for mode in ("train", "eval")}
        self.loss_sum = torch.zeros((), device=self.device)
        self.loss_count = 0

    def start(self, num_training_steps: int) -> None:
        """Begin a run: check the Pilot's head, put the hooks in place, build optimizer and schedule, empty the log.
        The Copilot's weights stay; those of the main process are copied to all."""
        self.head.check()
        self.copilot.vocabulary(self.lent)  # raises where the Pilot can't lend its own
        self.tap.open()
        self._follow_pilot()
        self._forget()
        self.copilot.config.forget_results()
        copy_from_main_process(self.copilot.parameters())
        decay = [p for p in self.trainable_parameters() if p.ndim > 1]
        no_decay = [p for p in self.trainable_parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": self.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)
        self.scheduler = get_scheduler(
            self.lr_scheduler_type,
            self.optimizer,
            self.warmup_steps,
            max(num_training_steps, 1),
            scheduler_specific_kwargs=self.lr_scheduler_kwargs,
        )

    def _follow_pilot(self) -> None:
        """Move the Copilot to where the Pilot is now: FSDP and full evaluation in half precision move it late."""
        if self.device != self.head.device:
            self.device = self.head.device
            self.copilot.to(self.device)

    def close(self) -> None:
        """Remove the hooks from the Pilot; the next `observe` or `evaluate` puts them back."""
        self.tap.close()

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.copilot.parameters() if parameter.requires_grad]

    # ---- observing -------------------------------------------------------------------------------------------------

    @contextmanager
    def observe(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Log the first forward of the Pilot inside the block; leave it before `backward()`.

        Args:
            inputs: The batch: `input_ids`, `labels` `[B, T]`, and `attention_mask` or (padding-free) `position_ids`.

        Raises:
            ValueError: If there are no labels, or the Pilot's decoder does not run inside the block.
        """
        with self._watch(inputs):
            yield
        with self.head.gathered():
            self.round += self._records_to_log(inputs)

    @contextmanager
    def evaluate(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Add the first forward inside the block to the evaluation's metrics; nothing is logged."""
        with self._watch(inputs):
            yield
        with self.head.gathered():
            size = self._caught.positions
            records = self._records(inputs)
            if self.calibration is None:
                self.sums["eval"] += self.score(records, max_positions=size)
            else:
                strengths, sums = self.calibration
                sums += self.score(records, strengths, size)

    def read(self, inputs: Mapping[str, Any], forward: Callable[[], Any]) -> list[MistakeRecord]:
        """The records of one forward, neither logged nor measured; the hooks are gone afterwards."""
        with self._watch(inputs):
            forward()
        self.close()
        with self.head.gathered():
            return self._records(inputs)

    @torch.no_grad()
    def visit(self, inputs: Mapping[str, Any], forward: Callable[[], Any]) -> list[MistakeRecord]:
        """Records for [`step`], as the log holds them, of documents that the Pilot does not train on: it is run in
        [`eval_mode`], and the global random state is left as it was."""
        with isolated_rng(self.device), eval_mode(self.head.trained), self._watch(inputs):
            forward()
        with self.head.gathered():
            return self._records_to_log(inputs)

    @contextmanager
    def _watch(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        if inputs.get("labels") is None:
            raise ValueError("The Mistake Log needs the `labels` of the batch that the Pilot is given.")
        self.tap.open()
        self._caught, self._listening = None, True
        try:
            yield
        finally:
            self._listening = False
        if self._caught is None:
            raise ValueError("The Pilot's decoder did not run inside the block: is it the Pilot of this learner?")
        self._follow_pilot()

    def _catch(self, states: PilotStates) -> None:
        self._caught, self._listening = states, False

    def _records(self, inputs: Mapping[str, Any], **kwargs: Any) -> list[MistakeRecord]:
        states, self._caught = self._caught, None
        with self._autocast():
            return make_records(states, inputs, self.head, self.embedding, self.copilot.config.top_k, **kwargs)

    def _records_to_log(self, inputs: Mapping[str, Any]) -> list[MistakeRecord]:
        self.largest_batch = max(self.largest_batch, self._caught.positions)
        return self._records(inputs, dtype=self.log_dtype, device="cpu")

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
            ValueError: Before `start`.
        """
        if self.optimizer is None:
            raise ValueError(
                "The Copilot has no schedule yet: pass num_training_steps, or call start() with it first."
            )
        records, self.round = self.round, []
        with self.head.gathered(), isolated_rng(self.device, self.seed + 1_000_003 * self.steps + process_index()):
            if records and measure:
                self._measure(records)
            if mistakes is None:
                mistakes = records
            if mistakes:
                self._append(mistakes)
            for _ in range(self.steps_per_round):
                drawn = self.log.sample(len(records), self.generator)
                self._update([self._random_start(record) for record in drawn])
        self.steps += 1
        self.scheduler.step()

    def _measure(self, records: list[MistakeRecord]) -> None:
        try:
            self.sums["train"] += self.score(records)
        except torch.OutOfMemoryError:
            logger.warning("Memory ran out while the Copilot was measured: these documents are not in the metrics.")

    def _append(self, records: list[MistakeRecord]) -> None:
        was_capped = self.log.capped
        self.log.append(records)
        if self.log.capped and not was_capped:
            logger.warning(
                "The Mistake Log has reached %d MiB and keeps %d rounds of %d: raise its bound in bytes "
                "(copilot_log_max_bytes) to keep more.",
                self.log.max_bytes // 2**20,
                len(self.log.rounds),
                self.log.max_rounds,
            )

    def _random_start(self, record: MistakeRecord) -> MistakeRecord:
        """Where the run is the whole document (no prompt, no encoder that holds it), start it at a random target, so
        that training looks like continuing a prompt; what comes before is memory only."""
        if record.positions[0] != 0 or self.copilot.config.pilot_is_encoder_decoder:
            return record
        return record.starting_at(int(torch.randint(len(record.positions), (), generator=self.generator)))

    def _update(self, records: list[MistakeRecord]) -> None:
        per_sequence = self.copilot.config.objective == "rmse"
        count = sum(int(r.is_start.sum()) if per_sequence else len(r.labels) for r in records)
        total = sum_count(count, self.device)
        if not total:
            return
        self.copilot.train()
        loss = self._backward(records, total)
        parameters = self.trainable_parameters()
        for parameter in parameters if num_processes() > 1 else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        sum_over_processes([loss, *(p.grad for p in parameters if p.grad is not None)])
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)
        if bool((loss + norm).isfinite()):
            self.optimizer.step()
            self.loss_sum += loss
            self.loss_count += 1
            self.skips_in_a_row = 0
        else:
            self._skip()
        self.optimizer.zero_grad()

    def _backward(self, records: list[MistakeRecord], total: int) -> torch.Tensor:
        """This process's part of the loss, with its gradients; NaN where memory ran out."""
        loss = torch.zeros((), device=self.device)
        try:
            for batch in self.batches(records):
                with self._autocast():
                    part = self.batch_loss(batch) / total
                part.backward()
                loss += part.detach()
        except torch.OutOfMemoryError:
            loss.fill_(torch.nan)
        return loss

    def _skip(self) -> None:
        self.skipped_steps += 1
        self.skips_in_a_row += 1
        if self.skips_in_a_row == SKIPS_TO_WARN:
            logger.warning(
                "The Copilot's step was left out %d times in a row: its loss or gradient is not finite, or its memory "
                "ran out. The Pilot's training goes on. Lower copilot_learning_rate or copilot_max_grad_norm; for "
                "memory lower per_device_train_batch_size, or train a smaller Copilot or one with an adapter "
                "(copilot_peft_config).",
                SKIPS_TO_WARN,
            )

    def batches(self, records: list[MistakeRecord], max_positions: int | None = None) -> Iterator[CopilotBatch]:
        """The records, padded, in groups of at most `max_positions`, by default those of the Pilot's largest
        micro-batch in training."""
        max_positions = max_positions or self.largest_batch
        dtype = self.copilot.norm.weight.dtype
        has_encoder = self.copilot.config.pilot_is_encoder_decoder
        for group in group_by_length(records, max_positions, has_encoder):
            yield CopilotBatch.collate(group, self.embedding, self.copilot.config, self.device, dtype)

    def _outputs(self, batch: CopilotBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """What f = W h is made of at the batch's queries: h `[Q, e]`, in the type of its matrix products, and W
        `[V, e]`."""
        lent = self.lent
        hidden = self.forward(**batch.inputs, lent=lent).last_hidden_state[batch.valid]  # [Q, e]
        weight = self.copilot.vocabulary(lent).head  # [V, e]
        return hidden.to(self.autocast_dtype or weight.dtype), weight

    @property
    def lent(self) -> Vocabulary | None:
        """The Pilot's matrices as they are now, where the Copilot uses them."""
        uses_them = self.copilot.config.vocab_projection == "pilot"
        return lent_vocabulary(self.head.pilot, self.device) if uses_them else None

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def batch_loss(self, batch: CopilotBatch) -> torch.Tensor:
        """The objective, summed: over positions (cross-entropy) or over sequences (RMSE, Eq. 7)."""
        hidden, weight = self._outputs(batch)  # [Q, e], [V, e]
        if self.copilot.config.objective == "rmse":
            return rmse_loss(hidden, weight, batch.target, batch.sequence, batch.num_sequences)
        return cross_entropy_loss(hidden, weight, lambda rows: self.head(batch.final_states[rows]), batch.labels)

    # ---- measuring -------------------------------------------------------------------------------------------------

    @property
    def strengths(self) -> tuple[float, float]:
        """λ of the metrics: the Pilot's and the Copilot's own."""
        return 0.0, self.copilot.config.strength

    @contextmanager
    def calibrate(self, strengths: Sequence[float] = STRENGTHS, data: str = "", metric: str = "nll") -> Iterator[None]:
        """Choose λ: inside the block `evaluate` measures at all `strengths`, and 0, the Pilot alone; at its end the
        best one becomes the Copilot's, so that by this metric it is never worse than the Pilot there. All of it is
        kept in `copilot.config.calibration`.

        Args:
            data: What is measured on, in words.
            metric: `"nll"`, for text that is sampled and for likelihoods, or `"token_accuracy"`, for greedy answers.

        Raises:
            ValueError: If a λ is negative or not finite, the block measures no labelled token, or for another metric.
        """
        if metric not in METRICS_OF_STRENGTH:
            raise ValueError(f"metric={metric!r}: λ is chosen by one of {METRICS_OF_STRENGTH}.")
        strengths = sorted({0.0, *(check_strength(strength) for strength in strengths)})
        self.calibration = strengths, no_sums(strengths)
        try:
            yield
            sums = self.calibration[1]
        finally:
            self.calibration = None
        sums = self._over_processes(sums)
        config = self.copilot.config
        config.calibration = calibration_of(sums, strengths, data, metric)
        config.strength = config.calibration["strength"]

    def scores(self, batch: CopilotBatch) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Chunks of the batch's queries: which, the Pilot's logits z and the correction f, each `[c, V]` float32."""
        with torch.no_grad(), self._autocast():
            hidden, weight = self._outputs(batch)  # [Q, e], [V, e]
            weight = weight.to(hidden.dtype)
        for rows in row_chunks(len(hidden), len(weight)):
            with torch.no_grad(), self._autocast():
                chunk = rows, self.head(batch.final_states[rows]), (hidden[rows] @ weight.T).float()
            yield chunk

    @torch.no_grad()
    def score(
        self,
        records: list[MistakeRecord],
        strengths: Sequence[float] | None = None,
        max_positions: int | None = None,
    ) -> torch.Tensor:
        """Sums over the records' targets, teacher-forced, at each λ of `strengths`, on the CPU: see [`sums_of`]."""
        strengths = self.strengths if strengths is None else strengths
        parts = []
        was_training = self.copilot.training
        self.copilot.eval()
        for batch in self.batches(records, max_positions):
            labels, dropped = batch.labels, batch.target.dropped  # [Q], [Q]
            for rows, pilot, correction in self.scores(batch):
                fusion = self.copilot.config.fusion
                parts.append(sums_of(pilot, correction, labels[rows], dropped[rows], strengths, fusion))
        self.copilot.train(was_training)
        return torch.stack(parts).cpu().double().sum(0) if parts else no_sums(strengths)

    def _over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        if num_processes() == 1:
            return sums  # not every device has float64
        sums = sums.to(self.device)
        sum_over_processes([sums])
        return sums

    def forget_metrics(self, mode: str) -> None:
        """Begin the sums of "train" or "eval" anew, on this process."""
        self.sums[mode] = no_sums(self.strengths)

    def pop_metrics(self, mode: str = "train") -> dict[str, float]:
        """The metrics since the last call, over all processes: means over targets, and in training the mean of the
        Copilot's loss."""
        sums, self.sums[mode] = self.sums[mode], no_sums(self.strengths)
        *totals, targets = self._over_processes(sums).flatten().tolist()
        metrics = {name: total / targets for name, total in zip(METRICS, totals, strict=True)} if targets else {}
        if mode == "train" and self.loss_count:
            metrics["copilot_loss"] = self.loss_sum.item() / self.loss_count
            self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0
        if mode == "train" and self.skipped_steps:
            metrics["copilot_skipped_steps"] = self.skipped_steps
        if mode == "train" and self.log.capped:
            metrics["copilot_log_rounds"] = len(self.log.rounds)
        return metrics

    def exported(self, device: str | torch.device | None = None) -> CopilotModel:
        """The Copilot as plain weights: itself, or a copy of now with its adapter merged, and with the same config.

        Args:
            device: Where the copy is made; by default where the Copilot is.
        """
        return self.copilot if self.peft_model is None else merged_copy(self.peft_model, device or self.device)

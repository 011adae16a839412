"""Folding: the rectified distribution p̃ teaches the Pilot's own weights, so that its gain costs nothing afterwards.

    fold_copilot(pilot, copilot, rows, TrainingArguments("folded", learning_rate=2e-4))

Shapes: B rows of T tokens, m targets of a row, M of a batch, k tokens that are kept of p̃, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..model.discrepancy import fuse
from ..model.modeling_copilot import CopilotModel
from .metrics import strength_on_rows, use_calibration
from .records import IGNORE
from .refusals import check_folding
from .teacher_forced import TeacherForced, padded, score

logger = logging.get_logger(__name__)

TOP_K = 32
IMPOSSIBLE = -100.0  # log-probability of what is banned: its product with probability 0 is 0
ROUNDING = 1e-6  # of a float32 sum of probabilities near 1


class SoftTargets(NamedTuple):
    """The k likeliest tokens of p̃ at the m targets of one row."""

    tokens: torch.Tensor  # [m, k] int32
    log_probs: torch.Tensor  # [m, k] float32, in nats


def teach(
    pilot: nn.Module,
    copilot: CopilotModel,
    rows: Sequence[Mapping[str, Any]],
    strength: float | None = None,
    top_k: int = TOP_K,
    batch_size: int = 16,
) -> list[SoftTargets]:
    """The rectified distribution at every labelled token, teacher-forced, both models in eval mode.

    Args:
        rows: As [`score`] takes them.
        strength: λ; by default the Copilot's own.
        top_k: How many tokens are kept of each distribution: 8 bytes each.
        batch_size: Rows in one forward.

    Returns:
        One [`SoftTargets`] for each row, on the CPU.

    Raises:
        ValueError: As [`score`]; for a `top_k` below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: at least one token is kept of each distribution.")
    strength = copilot.config.strength_or_own(strength)

    def likeliest(logits: torch.Tensor, correction: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fused = fuse(logits.log_softmax(-1), correction, strength, copilot.config.fusion)  # [c, V]
        log_probs, tokens = fused.topk(min(top_k, fused.shape[-1]), dim=-1)  # [c, k]
        return tokens.int(), log_probs.clamp_min(IMPOSSIBLE)

    with TeacherForced(copilot, pilot) as forced:
        return [SoftTargets(*found) for found in forced.measured(rows, likeliest, batch_size)]


def folding_loss(logits: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """How far the Pilot's p is from p̃, in nats, summed over M targets. All tokens but the k likeliest count as one:

        KL(p̃ ‖ p) = Σ_k p̃_k (log p̃_k − log p_k) + r̃ (log r̃ − log r),    r = 1 − Σ_k p_k

    Args:
        logits: The Pilot's z `[M, V]`.
        tokens, log_probs: Of [`SoftTargets`], `[M, k]`.
    """
    teacher = log_probs.exp()  # [M, k]
    student = logits.float().log_softmax(-1).gather(-1, tokens.long())  # [M, k]
    rest_of_teacher, rest_of_student = _rest(teacher), _rest(student.exp())  # [M] each
    of_rest = rest_of_teacher * (_log(rest_of_teacher) - _log(rest_of_student))  # [M], with 0 log 0 = 0
    return (teacher * (log_probs - student)).sum() + of_rest.sum()


def _rest(probabilities: torch.Tensor) -> torch.Tensor:
    """What is left of 1 `[M]`; nothing where it is only rounding."""
    rest = 1 - probabilities.sum(-1)
    return rest.where(rest > ROUNDING, 0.0)


def _log(rest: torch.Tensor) -> torch.Tensor:
    """Finite at 0 too, and so is its gradient."""
    return rest.clamp_min(ROUNDING).log()


class FoldingTrainer(Trainer):
    """[`transformers.Trainer`] whose labels are distributions: those of its model with a Copilot, which it asks once.

    Takes `copilot`, `rows`, `strength` and `top_k` of [`fold_copilot`].
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        copilot: CopilotModel,
        rows: Sequence[Mapping[str, Any]],
        strength: float | None,
        top_k: int,
    ):
        check_folding(model, args)
        args = copy.copy(args)
        args.remove_unused_columns = False  # Trainer knows no labels but its own
        super().__init__(model, args, collate)  # moves the model to its device
        targets = teach(self.model, copilot, rows, strength, top_k, args.per_device_eval_batch_size)
        self.train_dataset = with_soft_targets(rows, targets)
        if not self.train_dataset:
            raise ValueError("No row has a labelled token, so there is nothing to fold.")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens, log_probs = inputs.pop("teacher_tokens"), inputs.pop("teacher_log_probs")  # [M, k]
        labels, is_encoder_decoder = inputs["labels"], self.model.config.is_encoder_decoder  # [B, T]
        if not is_encoder_decoder:
            labels = inputs.pop("labels")[:, 1:]  # [B, T - 1]
        outputs = model(**inputs)
        logits = outputs.logits  # [B, T, V]
        if not is_encoder_decoder:
            logits = logits[:, -labels.shape[1] - 1 : -1]  # [B, T - 1, V], without those of virtual tokens
        loss = folding_loss(logits[labels != IGNORE], tokens, log_probs)
        loss = loss / (len(tokens) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def with_soft_targets(
    rows: Sequence[Mapping[str, Any]], targets: Sequence[SoftTargets]
) -> list[dict[str, torch.Tensor]]:
    """Rows of [`FoldingTrainer`]: those that have a target."""
    return [
        {
            "input_ids": torch.as_tensor(row["input_ids"]),
            "labels": torch.as_tensor(row["labels"]),
            "teacher_tokens": found.tokens,
            "teacher_log_probs": found.log_probs,
        }
        for row, found in zip(rows, targets, strict=True)
        if len(found.tokens)
    ]


def collate(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right; their targets one after the other, in the order of the labels."""
    soft = {name: torch.cat([row[name] for row in rows]) for name in ("teacher_tokens", "teacher_log_probs")}
    return padded(rows, torch.device("cpu")) | soft


def fold_copilot(
    pilot: nn.Module,
    copilot: CopilotModel,
    rows: Sequence[Mapping[str, Any]],
    args: TrainingArguments,
    strength: float | None = None,
    top_k: int = TOP_K,
) -> TrainOutput:
    """Train what is trainable of the Pilot towards Pilot + Copilot, by [`folding_loss`] on the rows' targets.

    The teacher is the Pilot as it is now, with its Copilot: it runs once over the rows, before the first step. The
    folded Pilot needs no Copilot, and the Copilot's λ is no longer right beside it: choose it anew, or leave it off.

    Args:
        pilot: A causal LM or an encoder-decoder, trained in place: its adapter, or all of it.
        rows: `input_ids` and `labels` (−100 where nothing is taught) of each, as [`score`] takes them. Prompts and
            generated texts may be labelled too.
        args: Of the training; rows are drawn, accumulated and scheduled as in [`transformers.Trainer`], and
            `resume_from_checkpoint` goes on with a run of the same Pilot, Copilot and rows.
        strength: λ of the teacher; by default the Copilot's own.
        top_k: Tokens that are kept of each distribution, 8 bytes each.

    Returns:
        What [`transformers.Trainer.train`] returns.

    Raises:
        ValueError: If λ is 0, top_k below 1, no weight of the Pilot is trainable, a row can't be read or none has a
            target, or the two do not fit.
        NotImplementedError: With several processes or devices.
    """
    if copilot.config.strength_or_own(strength) == 0:
        raise ValueError("λ is 0: Pilot + Copilot is the Pilot, and there is nothing to fold. Pass strength=...")
    trainer = FoldingTrainer(pilot, args, copilot, rows, strength, top_k)
    return trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)


class FoldingMixin:
    """`fold_copilot` for a trainer with a Copilot."""

    def fold_copilot(
        self,
        train_dataset=None,
        num_train_epochs: float = 1.0,
        learning_rate: float | None = None,
        strength: float | None = None,
        top_k: int = TOP_K,
    ) -> dict[str, float]:
        """Fold the trained Copilot into the Pilot, on the training rows; see [`fold_copilot`].

        Afterwards λ is chosen anew on `eval_dataset`, or 0 without one: what was learnt is in the Pilot now. Batch
        size, optimizer and schedule are those of the trainer's arguments.

        Args:
            train_dataset: Other rows, prepared like the trainer's own.
            learning_rate: By default the trainer's.

        Returns:
            With an `eval_dataset` the NLL per token of Pilot, Pilot + Copilot and folded Pilot, and `kept`, the share
            of the Copilot's gain that the folded Pilot has; and the training's `train_loss`.

        Raises:
            ValueError, NotImplementedError: As [`fold_copilot`]; for streams, packed rows and several evaluation sets.
        """
        args = folding_args(self.args, num_train_epochs, learning_rate)
        check_folding(self.model, args)
        rows = labelled_rows(self, self.train_dataset if train_dataset is None else train_dataset)
        held_out = [] if self.eval_dataset is None else labelled_rows(self, self.eval_dataset)
        pilot, copilot = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False), self.copilot
        strength = copilot.config.strength_or_own(strength)
        before = mean_nll(pilot, copilot, held_out, [0.0, strength])
        training = fold_copilot(pilot, copilot, rows, args, strength, top_k)
        config = self.learner.copilot.config
        config.strength, config.calibration, config.results = 0.0, None, None
        if not held_out:
            logger.warning("The Copilot is folded into the Pilot, so its λ is 0 now. calibrate(data) chooses it anew.")
            return {"train_loss": training.training_loss}
        found = strength_on_rows(pilot, self.learner.copilot, held_out, data=f"{len(held_out)} rows, after folding")
        use_calibration(config, found)
        return {"train_loss": training.training_loss, **share_kept(*before, found["nll"][0])}


def share_kept(pilot: float, rectified: float, folded: float) -> dict[str, float]:
    """NLL per token before, with the Copilot, and after; and which share of the Copilot's gain is left (NaN where it
    had none)."""
    gain = pilot - rectified
    kept = (pilot - folded) / gain if gain > 0 else math.nan
    return {"pilot_nll": pilot, "rectified_nll": rectified, "folded_nll": folded, "kept": kept}


def mean_nll(
    pilot: nn.Module, copilot: CopilotModel, rows: Sequence[Mapping[str, Any]], strengths: Sequence[float]
) -> list[float]:
    """Nats per labelled token at each λ; NaN without one."""
    found = [torch.zeros(len(strengths), 0), *(row.log_likelihoods for row in score(pilot, copilot, rows, strengths))]
    return (-torch.cat(found, dim=1).double().mean(1)).tolist()


def folding_args(args: TrainingArguments, num_train_epochs: float, learning_rate: float | None) -> TrainingArguments:
    """A trainer's arguments for folding: the same steps, and nothing evaluated, saved or pushed on the way."""
    args = copy.copy(args)
    args.num_train_epochs, args.max_steps = num_train_epochs, -1
    args.learning_rate = args.learning_rate if learning_rate is None else learning_rate
    args.eval_strategy = args.save_strategy = "no"
    args.resume_from_checkpoint = None
    args.load_best_model_at_end = args.push_to_hub = args.do_eval = args.eval_on_start = False
    return args


def labelled_rows(trainer: Trainer, dataset) -> list[dict[str, torch.Tensor]]:
    """The rows of a prepared data set as the trainer's evaluation reads them, without padding.

    Raises:
        NotImplementedError: For a stream, for rows that hold several documents, or for several evaluation sets.
    """
    if isinstance(dataset, dict):
        raise NotImplementedError(
            "Folding is measured on one evaluation set: set trainer.eval_dataset to one of them."
        )
    if not hasattr(dataset, "__len__"):
        raise NotImplementedError(
            "A stream can't be folded on: pass train_dataset=list(stream.take(n)), prepared alike."
        )
    if getattr(trainer.args, "packing", False) or getattr(trainer.args, "padding_free", False):
        raise NotImplementedError(
            "Rows with several documents can't be folded on: load Pilot and Copilot, and call hf_copilot.fold_copilot "
            "with one document in each row."
        )
    has_encoder = trainer.model.config.is_encoder_decoder
    return [row for batch in trainer.get_eval_dataloader(dataset) for row in unpadded(batch, has_encoder)]


def unpadded(batch: Mapping[str, torch.Tensor], has_encoder: bool) -> list[dict[str, torch.Tensor]]:
    """The rows of a batch, on the CPU. Labels stand at a decoder's ids; beside an encoder they are a text of their
    own."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()  # [B, T], [B, T or of their own]
    masks = batch["attention_mask"].cpu().bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
    labels = labels if has_encoder else [row[mask] for row, mask in zip(labels, masks, strict=True)]
    pairs = zip(ids, labels, masks, strict=True)
    return [{"input_ids": row[mask], "labels": of_row} for row, of_row, mask in pairs]

"""Metrics at several λ, and the choice of λ.

λ = 0 is the Pilot alone. Shapes: c targets, s strengths λ, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..model.configuration_copilot import CopilotConfig, check_strength
from ..model.fields import FIGURES, QUANTITIES
from ..model.modeling_copilot import CopilotModel
from ..pilot.inspect import eval_mode
from .distributed import num_processes, process_index, sum_over_processes
from .mistake_log import MistakeRecord
from .teacher_forced import TeacherForced, label_figures, score

logger = logging.getLogger(__name__)

METRICS = (*FIGURES, "copilot_dropped_mass")  # in the order of the sums
# λ of the paper's Table 17 and around it
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0)
# λ where nobody can choose it: docs/results.md ("Which λ?") has what it keeps of the best one, and what it costs
UNCHOSEN_STRENGTH = 0.5
LITTLE = 0.01  # of the Pilot's NLL


class NothingMeasured(ValueError):
    """λ can't be chosen: no labelled token was measured."""


def empty_sums(strengths: Sequence[float]) -> torch.Tensor:
    """Zeros to add what [`sum_metrics`] gives, on the CPU."""
    return torch.zeros(len(strengths) + 1, 2, dtype=torch.float64)


def sum_metrics(
    logits: torch.Tensor,
    correction: torch.Tensor,
    labels: torch.Tensor,
    dropped: torch.Tensor,
    strengths: Sequence[float],
    fusion: str,
) -> torch.Tensor:
    """Sums over c targets, `[s + 1, 2]` float32: for every λ the negative log-likelihood (nats) and the top-1 hits of
    the fused distribution; in the last row the probability mass left out of ℓ, and c.

    Args:
        logits, correction: The Pilot's z and the Copilot's f, `[c, V]` float32.
        labels: `[c]` int64.
        dropped: `[c]` float32, the mass left out of each ℓ.
        strengths: λ; 0 gives the Pilot's own figures.
    """
    likelihoods, hits = label_figures(logits, correction, labels, strengths, fusion)  # [s, c] twice
    sums = torch.stack([-likelihoods.sum(-1), hits.sum(-1)], dim=-1)  # [s, 2]
    left_out = torch.stack([dropped.sum(), dropped.new_tensor(len(labels))])  # [2]
    return torch.cat([sums, left_out[None]])


@torch.no_grad()
def measure(
    forced: TeacherForced,
    records: Sequence[MistakeRecord],
    strengths: Sequence[float],
    max_positions: float = math.inf,
) -> torch.Tensor:
    """[`sum_metrics`] over the records' targets, by the Copilot in eval mode, on the CPU."""
    parts, fusion = [], forced.copilot.config.fusion
    with eval_mode(forced.copilot):
        for batch in forced.batches(records, max_positions):
            for rows, logits, correction in forced.corrections(batch):
                labels, dropped = batch.labels[rows], batch.target.dropped[rows]  # [c], [c]
                parts.append(sum_metrics(logits, correction, labels, dropped, strengths, fusion))
    return torch.stack(parts).cpu().double().sum(0) if parts else empty_sums(strengths)


def over_processes(sums: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum of what all processes have measured; each must call it."""
    if num_processes() == 1:
        return sums  # not every device has float64
    sums = sums.to(device)
    sum_over_processes([sums])
    return sums


class RunningMetrics:
    """The sums of training and of evaluation since they were last asked for."""

    def __init__(self, strengths: Sequence[float], device: torch.device):
        self.sums = {mode: empty_sums(strengths) for mode in ("train", "eval")}
        self.loss_sum = torch.zeros((), device=device)
        self.loss_count = torch.zeros((), device=device)

    def add_round(
        self,
        forced: TeacherForced,
        records: Sequence[MistakeRecord],
        strengths: Sequence[float],
        max_positions: float,
    ) -> None:
        """The documents of a round of training, unless memory runs out."""
        try:
            self.sums["train"] += measure(forced, records, strengths, max_positions)
        except torch.OutOfMemoryError:
            logger.warning("Memory ran out while the Copilot was measured: these documents are not in the metrics.")

    def add_loss(self, loss: torch.Tensor) -> None:
        """The Copilot's loss of one step, over all processes; NaN is of one that was left out."""
        counts = loss.isfinite()
        self.loss_sum += loss.where(counts, 0.0)
        self.loss_count += counts

    def forget(self, mode: str) -> None:
        self.sums[mode] = torch.zeros_like(self.sums[mode])

    def pop(self, mode: str, device: torch.device) -> dict[str, float]:
        """Means over targets, and in training the mean of the Copilot's loss; every process must call it, with the
        device that they exchange tensors on."""
        *totals, targets = over_processes(self.sums[mode], device).flatten().tolist()
        self.forget(mode)
        metrics = {name: total / targets for name, total in zip(METRICS, totals, strict=True)} if targets else {}
        if mode == "train":
            loss, count = torch.stack([self.loss_sum, self.loss_count]).tolist()
            if count:
                metrics["copilot_loss"] = loss / count
            self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), torch.zeros_like(self.loss_count)
        return metrics


def strengths_to_try(strengths: Sequence[float], metric: str) -> list[float]:
    """These λ and 0, in order; raises a `ValueError` for one that is negative or not finite, or for an unknown
    metric."""
    if metric not in QUANTITIES:
        raise ValueError(f"metric={metric!r}: λ is chosen by one of {QUANTITIES}.")
    return sorted({0.0, *(check_strength(strength) for strength in strengths)})


def choose_strength(sums: torch.Tensor, strengths: Sequence[float], data: str, metric: str = "nll") -> dict[str, Any]:
    """Means over targets at every λ, and the best λ by one of them: `"nll"`, the least negative log-likelihood, or
    `"token_accuracy"`, the most top-1 hits, and of equals the least negative log-likelihood.

    Raises:
        NothingMeasured: A `ValueError`, if nothing was.
    """
    targets = int(sums[-1, 1])
    if not targets:
        raise NothingMeasured("No labelled token was measured: calibrate on a data set with labels.")
    nll, accuracy = (sums[:-1] / targets).T.tolist()
    found = {"metric": metric, "strengths": list(strengths), "nll": nll, "token_accuracy": accuracy}
    return {"strength": best_strength(found, metric), **found, "targets": targets, "data": data}


def use_calibration(config: CopilotConfig, calibration: dict[str, Any]) -> None:
    """Write what [`choose_strength`] found into a Copilot's config: λ, its results, and all of it."""
    config.calibration = calibration
    config.strength = calibration["strength"]
    config.results = results_at_chosen(calibration)


def use_unchosen_strength(config: CopilotConfig) -> bool:
    """Set λ where it is not chosen, by the user either: `UNCHOSEN_STRENGTH`. With Eq. 8 it stays the paper's. Returns
    whether it was set."""
    is_own = config.strength == type(config).strength and config.fusion == "logit"
    if is_own:
        config.strength = UNCHOSEN_STRENGTH
    return is_own


def say_if_little(calibration: dict[str, Any]) -> None:
    """Where the Copilot is off, or gains so little that it may be chance; in one of the processes."""
    if process_index():
        return
    strength, on = calibration["strength"], f"{calibration['targets']:,} tokens"
    if strength == 0:
        logger.warning(
            "No λ beats the Pilot alone on these %s: λ is 0, and the Copilot is off. What to try is in "
            "docs/it_does_not_help.md.",
            on,
        )
        return
    at_chosen = results_at_chosen(calibration)
    pilot, rectified = (at_chosen[f"{name}_nll"] for name in ("pilot", "rectified"))
    if calibration["metric"] == "nll" and pilot - rectified < LITTLE * pilot:
        logger.warning(
            "The best λ, %g, takes the NLL of these %s from %.4f to %.4f, so little that it may be chance: "
            "hf-copilot eval shows an interval. What to try is in docs/it_does_not_help.md.",
            *(strength, on, pilot, rectified),
        )


def best_strength(calibration: dict[str, Any], metric: str) -> float:
    """λ with the least `"nll"`, or with the highest `"token_accuracy"`, of equals that with the least NLL."""
    figures = zip(calibration["nll"], calibration["token_accuracy"], calibration["strengths"], strict=True)
    if metric == "token_accuracy":
        return min((-accuracy, nll, strength) for nll, accuracy, strength in figures)[-1]
    return min((nll, strength) for nll, _, strength in figures)[-1]


def results_at_chosen(calibration: dict[str, Any]) -> dict[str, float]:
    """The evaluation's metrics at the λ that was chosen."""
    strengths = calibration["strengths"]
    at = {"pilot": strengths.index(0.0), "rectified": strengths.index(calibration["strength"])}
    return {f"{name}_{metric}": calibration[metric][i] for name, i in at.items() for metric in QUANTITIES}


def calibrate_on_rows(
    pilot: nn.Module,
    copilot: CopilotModel,
    rows: Sequence[Mapping[str, Any]],
    strengths: Sequence[float] = STRENGTHS,
    data: str = "",
    metric: str = "nll",
    batch_size: int = 16,
) -> dict[str, Any]:
    """Choose the Copilot's λ on rows, as [`score`] takes them, without a learner. λ and all figures go into its
    config, as with [`CopilotLearner.calibrate`]; returns `copilot.config.calibration`."""
    found = strength_on_rows(pilot, copilot, rows, strengths, data, metric, batch_size)
    say_if_little(found)
    use_calibration(copilot.config, found)
    return found


def strength_on_rows(
    pilot: nn.Module,
    copilot: CopilotModel,
    rows: Sequence[Mapping[str, Any]],
    strengths: Sequence[float] = STRENGTHS,
    data: str = "",
    metric: str = "nll",
    batch_size: int = 16,
) -> dict[str, Any]:
    """As [`choose_strength`], on rows."""
    strengths = strengths_to_try(strengths, metric)
    found = score(pilot, copilot, rows, strengths, batch_size)
    likelihoods = torch.cat([row.log_likelihoods for row in found], dim=1)  # [s, M]
    hits = torch.cat([row.is_likeliest for row in found], dim=1)  # [s, M]
    sums = torch.stack([-likelihoods.double().sum(1), hits.double().sum(1)], dim=-1)  # [s, 2]
    targets = sums.new_tensor([[0, likelihoods.shape[1]]])  # [1, 2]
    return choose_strength(torch.cat([sums, targets]), strengths, data, metric)

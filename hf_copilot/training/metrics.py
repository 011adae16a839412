"""What the Copilot changes: sums over targets at several strengths, and the strength that they speak for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..model.discrepancy import fuse

# λ of the paper's Table 17 and around it; 0 is the Pilot alone
METRICS_OF_STRENGTH = ("nll", "token_accuracy")
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0)


def no_sums(strengths: Sequence[float]) -> torch.Tensor:
    """Zeros to add what [`sums_of`] gives, on the CPU."""
    return torch.zeros(len(strengths) + 1, 2, dtype=torch.float64)


def sums_of(
    logits: torch.Tensor,
    correction: torch.Tensor,
    labels: torch.Tensor,
    dropped: torch.Tensor,
    strengths: Sequence[float],
    fusion: str,
) -> torch.Tensor:
    """Sums over c targets, `[len(strengths) + 1, 2]` float32: for every λ the negative log-likelihood (nats) and the
    top-1 hits of the fused distribution; in the last row the probability mass left out of ℓ, and c.

    Args:
        logits, correction: The Pilot's z and the Copilot's f, `[c, V]` float32.
        labels: `[c]` int64.
        dropped: `[c]` float32, the mass left out of each ℓ.
        strengths: λ; 0 gives the Pilot's own figures.
    """
    pilot, label = logits.log_softmax(-1), labels[:, None]  # [c, V], [c, 1]
    rows = []
    for strength in strengths:
        fused = fuse(pilot, correction, strength, fusion)  # [c, V]
        hits = (fused.argmax(-1, keepdim=True) == label).sum()
        rows.append(torch.stack([-fused.gather(-1, label).sum(), hits]))
    rows.append(torch.stack([dropped.sum(), dropped.new_tensor(len(labels))]))
    return torch.stack(rows)


def calibration_of(sums: torch.Tensor, strengths: Sequence[float], data: str, metric: str = "nll") -> dict[str, Any]:
    """Means over targets at every λ, and the best λ by one of them: `"nll"`, the least negative log-likelihood, or
    `"token_accuracy"`, the most top-1 hits, and of equals the least negative log-likelihood.

    Raises:
        ValueError: If nothing was measured.
    """
    targets = int(sums[-1, 1])
    if not targets:
        raise ValueError("No labelled token was measured: calibrate on a data set with labels.")
    nll, accuracy = (sums[:-1] / targets).T.tolist()
    found = {"metric": metric, "strengths": list(strengths), "nll": nll, "token_accuracy": accuracy}
    return {"strength": best_strength(found, metric), **found, "targets": targets, "data": data}


def best_strength(calibration: dict[str, Any], metric: str) -> float:
    """λ with the least `"nll"`, or with the highest `"token_accuracy"`, of equals that with the least NLL."""
    figures = zip(calibration["nll"], calibration["token_accuracy"], calibration["strengths"], strict=True)
    by_accuracy = metric == "token_accuracy"
    return min((-accuracy * by_accuracy, nll, strength) for nll, accuracy, strength in figures)[-1]


def results_of(calibration: dict[str, Any]) -> dict[str, float]:
    """The evaluation's metrics at the λ that was chosen."""
    strengths, metrics = calibration["strengths"], ("nll", "token_accuracy")
    at = {"pilot": strengths.index(0.0), "rectified": strengths.index(calibration["strength"])}
    return {f"{name}_{metric}": calibration[metric][i] for name, i in at.items() for metric in metrics}

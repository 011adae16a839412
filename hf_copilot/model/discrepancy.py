"""The mathematics of the Mistake Log: sparse discrepancies, the two losses and the two fusions.

Pure functions. Notation of the paper: p̂ the Pilot's distribution, z its logits, ℓ the discrepancy, f the Copilot's
output, h here the Copilot's last hidden state, W its output matrix `[V, d]` (so f = W h), λ the strength.
Shapes: m target positions, k kept entries, V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24  # entries of one [chunk, V] float32 buffer: 64 MiB
PROBABILITY_FLOOR = 1e-9  # fused probabilities are clamped here (Eq. 8 can turn negative)
SMALLEST_SQUARE = 1e-12  # under the root of Eq. 7, whose gradient is infinite at 0
BANNED_LOG_PROBABILITY = -100.0  # below it a token is banned, by whatever number: no Pilot is as sure by itself


class SparseDiscrepancy(NamedTuple):
    """ℓ at m positions, kept at the Pilot's k likeliest tokens and the label."""

    indices: torch.Tensor  # [m, k + 1] int64; the label in the last column
    values: torch.Tensor  # [m, k + 1] float32; 0 in the last column where the label is among the k
    dropped: torch.Tensor  # [m] float32, the Pilot's probability mass that is left out


def row_chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of rows such that one `[chunk, V]` buffer holds at most `CHUNK_ELEMENTS` numbers."""
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def sparse_discrepancy(logits: torch.Tensor, labels: torch.Tensor, top_k: int) -> SparseDiscrepancy:
    """ℓ = onehot(y) − softmax(z) at the k likeliest tokens and the label.

    Args:
        logits: z, `[m, V]` float32.
        labels: y, `[m]` int64.
        top_k: Entries of p̂ to keep besides the label; exact when it is at least V.
    """
    normalizer = logits.logsumexp(-1, keepdim=True)  # [m, 1]
    kept, indices = logits.topk(min(top_k, logits.shape[-1]), dim=-1)  # [m, k]
    kept = (kept - normalizer).exp()  # [m, k] p̂ of the kept tokens
    label = labels[:, None]  # [m, 1]
    is_label = indices == label  # [m, k]
    label_is_kept = is_label.any(-1, keepdim=True)  # [m, 1]
    label_probability = (logits.gather(-1, label) - normalizer).exp().masked_fill(label_is_kept, 0.0)  # [m, 1]
    label_value = 1.0 - label_is_kept.float() - label_probability  # [m, 1] 0 where the label is among the k
    return SparseDiscrepancy(
        torch.cat([indices, label], dim=-1),
        torch.cat([is_label.float() - kept, label_value], dim=-1),
        (1.0 - kept.sum(-1) - label_probability[:, 0]).clamp_min(0.0),
    )


def discrepancy(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, labels: torch.Tensor, top_k: int
) -> SparseDiscrepancy:
    """ℓ_i = onehot(y_i) − softmax(z_i) (the paper's "mistake"), in chunks of positions.

    Args:
        head: The Pilot's output head, `[c, d] -> [c, V]` float32 logits with every scale and soft cap.
        hidden: `[m, d]`, the decoder's output at the targets.
        labels: `[m]` int64.
        top_k: Entries of p̂ to keep; the result is exact when it is at least V.
    """
    vocab_size = head(hidden[:1]).shape[-1]
    parts = [
        sparse_discrepancy(head(hidden[rows]), labels[rows], top_k) for rows in row_chunks(len(labels), vocab_size)
    ]
    return SparseDiscrepancy(*(torch.cat(column) for column in zip(*parts, strict=True)))


def squared_norm(hidden: torch.Tensor, weight: torch.Tensor, gram: bool | None = None) -> torch.Tensor:
    """||W h||² for every row of `hidden` `[m, d]`, with `weight` `[V, d]`: `[m]`.

    By the Gram identity hᵀ(WᵀW)h, which costs V·d² once, or by chunks of W h, which cost m·V·d. `gram=None` takes the
    cheaper one: Gram where there are more positions than hidden units.
    """
    if gram is None:
        gram = len(hidden) > hidden.shape[-1]
    if gram:
        return (hidden @ (weight.T @ weight) * hidden).sum(-1)  # [m]

    def chunk(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (rows @ weight.T).square().sum(-1)  # [c]

    chunks = [hidden[rows] for rows in row_chunks(len(hidden), len(weight))]
    if len(chunks) == 1:
        return chunk(hidden, weight)
    return torch.cat([checkpoint(chunk, rows, weight, use_reentrant=False) for rows in chunks])


def rmse_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: SparseDiscrepancy,
    sequence: torch.Tensor,
    num_sequences: int,
) -> torch.Tensor:
    """Eq. 7: Σ over sequences of sqrt(Σ_i ||f_i − ℓ_i||²), with f = W h. Divide by the sequences for the mean.

    ||f − ℓ||² = ||W h||² − 2 h·(Σ_k ℓ_k W_k) + Σ_k ℓ_k², exact for the kept entries; no `[m, V]` buffer is held.

    Args:
        hidden: `[m, d]`, the Copilot's last hidden states.
        weight: `[V, d]`.
        target: ℓ at the same m positions.
        sequence: `[m]` int64, which sequence each position belongs to.
        num_sequences: How many sequences there are.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight = hidden.float(), weight.float()
        projected = F.embedding_bag(target.indices, weight, per_sample_weights=target.values, mode="sum")  # [m, d]
        squares = squared_norm(hidden, weight) - 2 * (hidden * projected).sum(-1)
        squares = squares + target.values.square().sum(-1)  # [m]
        per_sequence = squares.new_zeros(num_sequences).index_add(0, sequence, squares)  # [s]
        return (per_sequence.clamp_min(0.0) + SMALLEST_SQUARE).sqrt().sum()


class FusedCrossEntropy(torch.autograd.Function):
    """Σ_i −log softmax(z_i + W h_i)[y_i], chunk by chunk in one `[c, V]` buffer.

    The gradients are formed in the forward pass, while the buffer holds g = softmax(z + f) − onehot(y):
    dL/dh = g W and, where W learns, dL/dW = gᵀ h. Nothing of size `[m, V]` outlives a chunk.
    """

    @staticmethod
    def forward(ctx, hidden, weight, pilot_logits, labels):
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden)  # [m, d]
        learns = ctx.needs_input_grad[1]
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if learns else None  # [V, d]
        cast_weight = weight.to(hidden.dtype)
        for rows in row_chunks(len(labels), len(weight)):
            fused = pilot_logits(rows) + hidden[rows] @ cast_weight.T  # [c, V] float32
            label = labels[rows, None]  # [c, 1]
            normalizer = fused.logsumexp(-1, keepdim=True)  # [c, 1]
            loss += (normalizer - fused.gather(-1, label)).sum()
            gradient = fused.sub_(normalizer).exp_()  # [c, V] softmax
            gradient.scatter_add_(-1, label, -torch.ones_like(normalizer))
            gradient = gradient.to(hidden.dtype)
            d_hidden[rows] = gradient @ cast_weight  # [c, d]
            if learns and gradient.dtype == d_weight.dtype:
                d_weight.addmm_(gradient.T, hidden[rows])  # [V, d]
            elif learns:
                d_weight += gradient.T @ hidden[rows]  # [V, d]
        ctx.gradients = d_hidden, d_weight.to(weight.dtype) if learns else None
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.gradients
        del ctx.gradients  # scaled in place: this graph can be walked once
        return d_hidden.mul_(d_loss), d_weight.mul_(d_loss) if d_weight is not None else None, None, None


def cross_entropy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    pilot_logits: Callable[[slice], torch.Tensor],
    labels: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of the fused logits z + f, summed over positions: the residual form of Eq. 8 in logit space.

    Args:
        hidden: `[m, d]`, the Copilot's last hidden states.
        weight: `[V, d]`, W: the Copilot's output matrix, or the Pilot's, into which no gradient flows.
        pilot_logits: Gives z `[c, V]` float32 for a slice of positions; no gradient flows into it.
        labels: `[m]` int64.
    """
    return FusedCrossEntropy.apply(hidden, weight, pilot_logits, labels)


def fuse(scores: torch.Tensor, correction: torch.Tensor, strength: float, fusion: str) -> torch.Tensor:
    """Rectify the Pilot's scores s with the correction f, both `[..., V]` float32. λ = 0 returns s itself.

    `"logit"`: s + λf − (lse(s + λf) − lse(s)). `"probability"` (Eq. 8): p̃ = max(p̂ + λf, floor), put back on the scale
    of s. Either way the result is normalised where s was (log-probabilities stay log-probabilities), raw logits stay
    raw logits, and tokens banned with −inf stay banned, be it all of a row; in probability space so do those that a
    large finite number bans. A row of s that holds +inf (a forced token) or NaN stays as it is.
    """
    if strength == 0:
        return scores
    normalizer = scores.logsumexp(-1, keepdim=True)  # [..., 1]
    if fusion == "logit":
        fused = scores + strength * correction  # [..., V]
        total = fused.logsumexp(-1, keepdim=True)  # [..., 1]
    else:
        log_pilot = scores - normalizer  # [..., V]
        pilot = log_pilot.exp()  # [..., V] p̂
        fused = torch.maximum(pilot + strength * correction, pilot.clamp_max(PROBABILITY_FLOOR))
        fused = fused.masked_fill((scores == -torch.inf) | (log_pilot < BANNED_LOG_PROBABILITY), 0.0)
        total, fused = fused.sum(-1, keepdim=True).log(), fused.log()  # [..., 1], [..., V]
    return torch.where(normalizer.abs() < torch.inf, fused + (normalizer - total), scores)

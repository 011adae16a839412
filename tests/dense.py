"""The method, whole and dense: one document with one run of m targets, all V tokens, no chunks, no cache, no batch."""

import torch
from torch.nn.functional import one_hot


def mistake(z, y):
    """ℓ_i = onehot(y_i) − softmax(z_i): Pilot's logits [m, V] and labels [m] -> [m, V]."""
    return one_hot(y, z.shape[-1]) - z.softmax(-1)


def fed(ell, y, E, start, copilot_input):
    """What the Copilot is fed at target i, [m, d]: ℓ_{i−1} E, E[y_{i−1}], or their sum; at 0 a learned vector."""
    parts = {"discrepancy": ell @ E, "token": E[y], "both": ell @ E + E[y]}  # E is [V, d]
    return torch.cat([start, parts[copilot_input][:-1]])


def reads(positions, n, lag):
    """Where a query at j may read tokens (or X̃) and states h: i ≤ j, and i ≤ j − lag; [m, n] twice."""
    i = torch.arange(n)
    return i <= positions[:, None], i <= positions[:, None] - lag


def loss(objective, f, z, ell, y):
    """Eq. 7, sqrt(Σ_i ||f_i − ℓ_i||²); or −Σ_i log softmax(z_i + f_i)[y_i]."""
    if objective == "rmse":
        return (f - ell).square().sum().sqrt()
    return -(z + f).log_softmax(-1).gather(1, y[:, None]).sum()


def rectified(z, f, strength, fusion):
    """log p̃: z + λ f, normalised; or Eq. 8, p̂ + λ f, kept above 0 and normalised. [m, V]."""
    if fusion == "logit":
        return (z + strength * f).log_softmax(-1)
    p = z.softmax(-1)
    p = torch.maximum(p + strength * f, p.clamp(max=1e-9))
    return (p / p.sum(-1, keepdim=True)).log()

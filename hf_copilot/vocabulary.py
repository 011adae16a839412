"""The matrices between tokens and vectors: a Copilot's own, or its Pilot's (`vocab_projection="pilot"`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .pilot_tap import is_sharded, unwrap


class Vocabulary(NamedTuple):
    """E, whose rows make an input, and W of f = W h: `[V, e]`, with e = d, or d_P where the Pilot lends them."""

    embedding: torch.Tensor
    head: torch.Tensor


def lent_vocabulary(pilot: nn.Module, device: torch.device) -> Vocabulary:
    """What a Pilot, wrapped or not, lends: its matrices as they are now, detached, without scale, bias or adapter.

    Raises:
        NotImplementedError: If processes share them (FSDP2).
        ValueError: If they are quantised, or not both `[V, d_P]`.
    """
    base, way_out = unwrap(pilot), "Use CopilotConfig(vocab_projection='own')."
    if is_sharded(base):
        raise NotImplementedError(f"A sharded Pilot can't lend its vocabulary to the Copilot. {way_out}")
    matrices = [module.weight for module in (base.get_input_embeddings(), base.get_output_embeddings())]
    if not all(matrix.is_floating_point() for matrix in matrices):
        raise ValueError(f"The Pilot's embedding or head is quantised and can't be lent to the Copilot. {way_out}")
    shapes, size = [tuple(matrix.shape) for matrix in matrices], base.config.get_text_config().hidden_size
    if shapes[0] != shapes[1] or shapes[0][1] != size:
        raise ValueError(
            f"The Pilot's embedding {shapes[0]} and head {shapes[1]} must both be [vocabulary, {size}] to be lent to "
            f"the Copilot. {way_out}"
        )
    return Vocabulary(*(matrix.detach().to(device) for matrix in matrices))

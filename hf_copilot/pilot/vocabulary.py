"""The matrices between tokens and vectors: a Copilot's own, or its Pilot's (`vocab_projection="pilot"`)."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

from ..model.modeling_copilot import Vocabulary
from .inspect import is_sharded, unwrap

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
USE_OWN = "Use CopilotConfig(vocab_projection='own')."


def lent_vocabulary(pilot: nn.Module, device: torch.device) -> Vocabulary:
    """What a Pilot, wrapped or not, lends: its matrices as they are now, detached, without scale, cap or bias.

    Raises:
        NotImplementedError: If processes share them (FSDP2, tensor parallelism), or they are offloaded.
        ValueError: If they are quantised, have an adapter that a merge would move into them, or are not `[V, d_P]`.
    """
    base = unwrap(pilot)
    modules = base.get_input_embeddings(), base.get_output_embeddings()
    if is_sharded(base) or any(isinstance(getattr(module, "weight", None), DTensor) for module in modules):
        raise NotImplementedError(f"A sharded Pilot can't lend its vocabulary to the Copilot. {USE_OWN}")
    embedding, head = (_matrix(module) for module in modules)
    tied = modules[0].weight is modules[1].weight
    size = base.config.get_text_config().hidden_size
    if embedding.shape != head.shape or embedding.shape[1] != size:
        raise ValueError(
            f"The Pilot's embedding {tuple(embedding.shape)} and head {tuple(head.shape)} must both be [vocabulary, "
            f"{size}] to be lent to the Copilot. {USE_OWN}"
        )
    lent = embedding.to(device)
    return Vocabulary(lent, lent if tied else head.to(device))


def _matrix(module: Any) -> torch.Tensor:
    weight = getattr(module, "weight", None)
    if isinstance(module, BaseTunerLayer):
        raise ValueError(
            "The Pilot's embedding or head has an adapter, which would change the Copilot when it is merged: leave "
            f"both out of target_modules (modules_to_save is fine). {USE_OWN}"
        )
    if weight is None or weight.dtype not in FLOATS:
        raise ValueError(f"The Pilot's embedding or head is quantised and can't be lent to the Copilot. {USE_OWN}")
    if weight.is_meta:
        raise NotImplementedError(f"An offloaded Pilot can't lend its vocabulary to the Copilot. {USE_OWN}")
    return weight.detach()

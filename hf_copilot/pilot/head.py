"""The Pilot's own maps between tokens and vectors: X̃ from token ids, and logits from its decoder's output.

Shapes: d_P the Pilot's hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .inspect import eval_mode, find_decoder, is_encoder_decoder, is_sharded, isolated_rng, unwrap, without_dropout


class PilotEmbedding:
    """X̃ from token ids, for a Pilot whose embedding matrix is frozen: then the log need not hold X̃."""

    def __init__(self, pilot: nn.Module):
        self.pilot = unwrap(pilot)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[...]` int64 -> `[..., d_P]`, past every hook of the module (NEFTune's noise, for one)."""
        weight = self.pilot.get_input_embeddings().weight.detach()
        return F.embedding(input_ids.to(weight.device), weight)

    def gives(self, embeddings: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Whether these token ids will give exactly this X̃ from now on: nothing trains the matrix, and layer 0 is fed
        its rows as they are (no positions, scale or noise on top). Never where the Pilot is sharded: the matrix would
        have to be gathered for every draw. `[]` bool, which nothing has waited for; None where the answer is no
        anyway."""
        module = self.pilot.get_input_embeddings()
        if not isinstance(module, nn.Embedding) or module.weight.requires_grad or is_sharded(self.pilot):
            return None
        own = self(input_ids)
        if own.shape != embeddings.shape:
            return None
        if own.device.type == "cpu":
            return torch.tensor(torch.equal(own, embeddings.to(own.device)))
        return (own.to(embeddings.device) == embeddings).all()


class PilotHead:
    """z = softcap(scale * (W_P x + b)) + c: the Pilot's logits from its decoder's output, as the model makes them.

    Knows the scalings that TRL's fused head knows, T5's, and BART's bias c; [`check`] compares with the model's own
    logits.
    """

    def __init__(self, pilot: nn.Module):
        self.trained, self.pilot = extract_model_from_parallel(pilot, keep_torch_compile=False), unwrap(pilot)
        head = self.pilot.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(self.pilot).__name__} has no output head (`get_output_embeddings()` is None).")
        for name, module in (("output head", head), ("input embedding", self.pilot.get_input_embeddings())):
            if not isinstance(getattr(module, "weight", None), torch.Tensor):
                raise ValueError(
                    f"The {name} of {type(self.pilot).__name__} is a {type(module).__name__} without a `weight` of "
                    "its own: hf_copilot reads the vocabulary's size and device there. Wrap its forward, not the "
                    "module, or give the wrapper a property `weight`."
                )
        config = self.pilot.config.get_text_config()
        self.scale = _logit_scale(config)
        self.softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        self.gathered_parameters: dict[str, torch.Tensor] = {}  # of the head, inside `gathered`

    @property
    def device(self) -> torch.device:
        return stored_weight(self.pilot.get_output_embeddings()).device

    @property
    def vocab_size(self) -> int:
        head = self.pilot.get_output_embeddings()
        return getattr(head, "out_features", None) or head.weight.shape[0]  # a weight of 4 bits is packed

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., d_P]` -> z `[..., V]` float32, without gradient."""
        head, device = self.pilot.get_output_embeddings(), hidden.device
        stored = stored_weight(head)
        with torch.no_grad():
            hidden = hidden.to(stored.device, stored.dtype if stored.is_floating_point() else None)
            if isinstance(head, FSDPModule) or self.gathered_parameters:  # a call opens its group
                weight = self.gathered_parameters.get("weight", head.weight)  # [V, d_P]
                logits = F.linear(hidden, weight, self.gathered_parameters.get("bias", head.bias)).float()
            else:
                with without_dropout(head):  # of an adapter; its draws are the Pilot's training's
                    logits = head(hidden).float()
            if self.scale != 1.0:
                logits = logits * self.scale
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            bias = getattr(self.pilot, "final_logits_bias", None)  # [1, V]
            if bias is not None:
                logits = logits + bias.to(logits)
        return logits.to(device)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold the whole head inside the block where processes share it (FSDP2): every process must enter. Right
        after a forward it usually is whole, and nothing is sent.

        Raises:
            NotImplementedError: For a sharded head with an adapter.
        """
        parameters = dict(self.pilot.get_output_embeddings().named_parameters())
        if not parameters.keys() <= {"weight", "bias"} and is_sharded(self.pilot):
            raise NotImplementedError(
                "The Pilot is sharded and its head has an adapter, which can't be gathered: leave lm_head out of "
                "target_modules and modules_to_save, or use DDP."
            )
        self.gathered_parameters = {
            name: value.full_tensor() for name, value in parameters.items() if isinstance(value, DTensor)
        }
        try:
            yield
        finally:
            self.gathered_parameters = {}

    def check(self) -> None:
        """Compare with the model's own logits on a few tokens: forked random state; eval mode, unless quantised.

        Raises:
            ValueError: If they differ by more than 2 % of the largest logit.
        """
        pilot, caught = self.trained, []
        device = self.pilot.get_input_embeddings().weight.device
        input_ids = torch.arange(8, device=device)[None] % self.vocab_size  # [1, 8]
        inputs = {"input_ids": input_ids}
        if is_encoder_decoder(pilot):
            inputs["decoder_input_ids"] = input_ids
        handle = find_decoder(pilot).register_forward_hook(lambda module, args, output: caught.append(output[0]))
        try:
            with torch.no_grad(), isolated_rng(device), eval_mode(pilot):
                expected = pilot(**inputs, use_cache=False).logits.float()  # [1, 8, V]
        finally:
            handle.remove()
        with self.gathered():
            found = self(caught[0]).to(expected.device)  # [1, 8, V]
        error, largest = (found - expected).abs().max().item(), expected.abs().max().item()
        if not error <= 0.02 * largest + 1e-6:
            raise ValueError(
                f"The logits of {type(self.pilot).__name__} can't be recomputed from its decoder's output and head: "
                f"they differ by {error:.3g} (largest logit {largest:.3g}). It scales or caps them in a way that "
                "hf_copilot does not know; please report the model."
            )


def stored_weight(head: nn.Module) -> torch.Tensor:
    """What a head's type and device are those of: of a module that PEFT trains whole the active copy; else the first
    parameter, since a `weight` may be made anew at each look (trainable tokens)."""
    parameter = None if isinstance(head, ModulesToSaveWrapper) else next(head.parameters(), None)
    return head.weight if parameter is None else parameter


def _logit_scale(config: Any) -> float:
    """The factor on the head's output: T5 by its width; Cohere, MPT, Muse Glimmer, Falcon-H1; Granite and MiniCPM3
    divide by theirs."""
    if getattr(config, "scale_decoder_outputs", False):
        return config.d_model**-0.5
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return scale
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling

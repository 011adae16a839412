"""The hooks that read a Pilot's decoder and its layers, for training, generation and scoring.

Shapes: B rows, T positions of one forward of the decoder, S of the encoder, d_P the Pilot's hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from ..model.configuration_copilot import CopilotConfig
from .cache import CachedPositions, find_cache
from .forward_arguments import OF_CROSS_ATTENTION, OF_DECODERS, ForwardArguments
from .inspect import find_decoder, find_layers, is_encoder_decoder, unwrap


@dataclass
class PilotStates:
    """What one forward of the Pilot's decoder showed; every tensor is detached."""

    input_ids: torch.Tensor | None  # [B, T]; None if the forward was given embeddings
    attention_mask: Any  # as the decoder was given it: 2D, 4D, a mapping of these, or None
    past_length: int  # positions that were in the Pilot's cache before
    cache: ref[Cache] | None = None  # the Pilot's own, as it is now
    # X̃ and h, None where the tap reads no layers
    embeddings: torch.Tensor | None = None  # X̃, [B, T, d_P], the input of layer 0; or [B, S, d_P], of the encoder
    encoder_length: int | None = None  # S; None without an encoder
    encoder_attention_mask: torch.Tensor | None = None  # [B, S]; None without an encoder, or without padding
    hidden_states: torch.Tensor | None = None  # h, [B, T, d_P], the pooled outputs of the layers
    last_hidden_state: torch.Tensor | None = None  # [B, T, d_P], the decoder's output
    next_logits: torch.Tensor | None = None  # [B, V], the model's logits at the last position, where it made any

    @property
    def is_over(self) -> bool:
        """Whether the decoder has given its output."""
        return self.last_hidden_state is not None

    @property
    def shape(self) -> torch.Size:
        """(B, T), the rows and positions of this forward."""
        return (self.last_hidden_state if self.is_over else self.input_ids).shape[:2]

    @property
    def length(self) -> int:
        """T."""
        return self.shape[1]

    @property
    def positions(self) -> int:
        """B x T, and with an encoder B x S beside it."""
        encoder = 0 if self.encoder_length is None else self.encoder_length
        return len(self.last_hidden_state) * (self.length + encoder)

    @property
    def mask(self) -> Any:
        """That of full attention, where each kind of layer has its own."""
        masks = self.attention_mask
        return masks.get("full_attention", next(iter(masks.values()))) if isinstance(masks, dict) else masks

    def visible_from(self, start: int) -> torch.Tensor:
        """Which positions from `start` to the end n of this forward are not padding, by its mask in whatever form it
        came: `[B, n - start]` bool, or the last of them, where a window slides."""
        mask, n = self.mask, self.past_length + self.length
        if mask is None:
            return torch.ones(self.shape[0], n - start, dtype=torch.bool)
        if isinstance(mask, BlockMask):  # of flex attention
            mask = create_mask(mask.mask_mod, *mask.shape, device=mask.kv_num_blocks.device)  # [B, 1, T, n] bool
        if mask.ndim == 2:
            return mask[:, start:n] != 0
        columns = mask[:, 0, :, :n][..., -(n - start) :]  # [B, T, n - start], bool or additive; of a window fewer
        return (columns if mask.dtype == torch.bool else columns == 0).any(1)  # to any query

    @property
    def hides_past(self) -> bool:
        """Whether the mask does not go back to the first position, since a window slides."""
        return self.mask is not None and self.mask.shape[-1] < self.past_length + self.length


compiled_without_guards = True  # perhaps, before a tap was opened


def never() -> bool:
    return False


def guard_hooks() -> None:
    """Have compiled forwards look whether there are hooks now: a static cache compiles the Pilot, with or without
    hooks. What was compiled before the first call does not look, and is compiled anew. (The setting is one of the
    thread, what is compiled one of the process.)"""
    global compiled_without_guards
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    if compiled_without_guards:
        torch.compiler.reset()
    compiled_without_guards = False


class PilotTap:
    """Reads every forward of the Pilot's decoder while `listen()` is true and hands it to `sink`.

    Hooks on the decoder open and close a window, hooks on its layers collect only inside it, so recomputation under
    gradient checkpointing adds nothing. `open()` and `close()`, or a `with`; removes its own handles and no others.

    Args:
        pilot: A causal LM or an encoder-decoder of transformers, wrapped or not.
        config: Of the Copilot: with `memory="pilot"` its `pooled_layers` form h by its `pooling`; with `"tokens"` no
            layer is read, and no hook is on one.
        sink: Called with the [`PilotStates`] at the end of each forward.
        listen: Asked at the start of each forward.
    """

    def __init__(
        self,
        pilot: nn.Module,
        config: CopilotConfig,
        sink: Callable[[PilotStates], None],
        listen: Callable[[], bool],
    ):
        self.model = unwrap(pilot)
        self.decoder = find_decoder(pilot)
        self.layers = find_layers(pilot) if config.reads_states else nn.ModuleList()
        half = (len(self.layers) + 1) // 2
        parts = {"all": self.layers, "first_half": self.layers[:half], "second_half": self.layers[-half:]}
        self.pooled = parts[config.pooled_layers]
        self.pooling, self.sink, self.listen = config.pooling, sink, listen
        self.handles: list[RemovableHandle] = []
        self.cached = CachedPositions()
        self.states: PilotStates | None = None  # of a forward that we listen to, until its logits are read

    def open(self) -> None:
        """Register the hooks, unless they are there. From the first time on, compiled forwards of this process look
        whether there are hooks (`torch._dynamo.config.skip_nnmodule_hook_guards`).

        Raises:
            NotImplementedError: If the decoder's forward lacks an argument that they read.
        """
        if self.handles:
            return
        guard_hooks()
        self.arguments = ForwardArguments(self.decoder)
        self.arguments.require(OF_DECODERS)
        self.arguments.require_cache()
        if is_encoder_decoder(self.model):
            self.arguments.require(OF_CROSS_ATTENTION)
        first = self.layers[:1]
        self.layer_arguments = ForwardArguments(first[0]) if first else None
        self.handles = [
            self.decoder.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            *(layer.register_forward_pre_hook(self._read_embeddings, with_kwargs=True) for layer in first),
            *(layer.register_forward_hook(self._pool) for layer in self.pooled),
            self.decoder.register_forward_hook(self._end_forward, always_call=True),
            self.model.register_forward_hook(self._read_logits),
        ]

    def close(self) -> None:
        """Remove the hooks; the Pilot is as it was. May be called again."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.states = [], None

    def __enter__(self) -> PilotTap:
        self.open()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the Pilot (a moving average, a file, another process) has its hooks: there they stay silent, and
        hold nothing."""
        held = ("sink", "cached", "states", "model", "decoder", "layers", "pooled")
        return self.__dict__ | dict.fromkeys(held) | {"listen": never, "handles": []}

    def _begin_forward(self, decoder: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """Without `kwargs` if another thread takes the hook off just now."""
        self.states = None
        if kwargs is None or not self.listen():
            return
        given = self.arguments.named(args, kwargs)
        cache = self.arguments.cache(given)
        states = PilotStates(given.get("input_ids"), given.get("attention_mask"), self.cached.before(cache))
        states.cache = None if cache is None else ref(cache)
        if given.get("encoder_hidden_states") is not None:
            states.embeddings = given["encoder_hidden_states"].detach()
            states.encoder_length = states.embeddings.shape[1]
            states.encoder_attention_mask = given.get("encoder_attention_mask")
        self.states = states

    def _read_embeddings(self, layer: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        states = self.states
        if kwargs is not None and states is not None and not states.is_over and states.embeddings is None:
            states.embeddings = self.layer_arguments.first(args, kwargs).detach()

    def _pool(self, layer: nn.Module, args: tuple, output: Any) -> None:
        states = self.states
        if states is None or states.is_over:
            return
        hidden = (output[0] if isinstance(output, tuple) else output).detach()  # [B, T, d_P]
        pooled = states.hidden_states
        if pooled is None:
            states.hidden_states = hidden.to(torch.float32, copy=True)
        elif self.pooling == "max":
            torch.maximum(pooled, hidden.to(pooled), out=pooled)
        else:
            pooled += hidden.to(pooled.device)

    def _end_forward(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        states = self.states
        if states is None or output is None or (self.pooled and states.hidden_states is None):
            self.states = None  # not listening, or the forward failed
            return
        if self.pooled and self.pooling == "mean":
            states.hidden_states /= len(self.pooled)
        states.last_hidden_state = output[0].detach()
        cache = None if states.cache is None else states.cache()
        if cache is None:  # the decoder may have made one
            cache = find_cache(output.values() if isinstance(output, dict) else output)
        self.cached.count(cache, states.past_length + states.length)
        self.sink(states)

    def _read_logits(self, model: nn.Module, args: tuple, output: Any) -> None:
        states, self.states = self.states, None
        logits = getattr(output, "logits", None)
        if states is not None and states.is_over and logits is not None:
            states.next_logits = logits[:, -1].detach().clone()


left_out = torch.compiler.disable(reason="a CopilotLogitsProcessor reads the Pilot here: compile with fullgraph=False")


class GenerationTap(PilotTap):
    """A tap of a Pilot that several threads may run at a time: what a forward shows belongs to its thread. What is
    compiled can't ask for its thread, so no hook is.

    Args:
        begun: Called with the [`PilotStates`] at the start of each forward that is listened to.
    """

    def __init__(self, *args: Any, begun: Callable[[PilotStates], None]):
        self.of_threads: dict[int, PilotStates] = {}
        self.begun = begun
        super().__init__(*args)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"of_threads": {}, "begun": None}

    @property
    def states(self) -> PilotStates | None:
        return self.of_threads.get(get_ident())

    @states.setter
    def states(self, states: PilotStates | None) -> None:
        self.of_threads[get_ident()] = states
        if states is None:
            del self.of_threads[get_ident()]

    @left_out
    def _begin_forward(self, decoder: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        super()._begin_forward(decoder, args, kwargs)
        if self.states is not None:
            self.begun(self.states)

    _read_embeddings = left_out(PilotTap._read_embeddings)
    _pool = left_out(PilotTap._pool)
    _end_forward = left_out(PilotTap._end_forward)
    _read_logits = left_out(PilotTap._read_logits)

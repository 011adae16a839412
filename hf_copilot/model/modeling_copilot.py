"""The Copilot: a small decoder that reads tokens, or the Pilot's states, and predicts its discrepancies.

It knows no Pilot, no hook and no trainer: tensors in, tensors out. Shapes: B rows (documents), m queries (target
positions), n positions of the Pilot's decoder, S of its encoder, d hidden size, d_P the Pilot's hidden size, V
vocabulary, k kept entries of a discrepancy, e the width of the matrices E and W of [`Vocabulary`], s entries of the
memory that are not in the cache yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .attention import CopilotAttention, Span, as_mask, rotation
from .caches import Caches
from .configuration_copilot import CopilotConfig
from .fields import SIZES
from .hub import CopilotPreTrainedModel
from .memory import memory_of


class Vocabulary(NamedTuple):
    """E, whose rows make an input, and W of f = W h: `[V, e]`, with e = d, or d_P where the Pilot lends them."""

    embedding: torch.Tensor
    head: torch.Tensor


def rotary_positions(config: CopilotConfig, queries: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments of [`CopilotModel.forward`] that say where queries `[B, m]` and the memory's tokens `[B, s]` stand
    (X̃_i and h_i both at i); none for a Copilot without positions."""
    if config.position_embedding != "rotary":
        return {}
    return {"positions": queries, "memory_positions": memory_of(config).positions(tokens)}


class CopilotMLP(nn.Module):
    """W_down (act(W_gate x) * W_up x), or W_down act(W_up x) without a gate."""

    def __init__(self, config: CopilotConfig):
        super().__init__()
        self.gated = config.mlp_gated
        if self.gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up if self.gated else self.act_fn(up))


class CopilotLayer(GradientCheckpointingLayer):
    """One pre-norm decoder block: attention ("self" over the Copilot's own states, "cross" over the memory, "both" one
    after the other), MLP.

    The names are those of the Llama family, so that its weights fit. The memory is normed first: the scale of the
    Pilot's residual stream differs from layer to layer.
    """

    def __init__(self, config: CopilotConfig, layer_type: str, cache_index: int):
        super().__init__()
        self.layer_type = layer_type
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = CopilotAttention(config, cache_index)
        if layer_type != "self":
            self.memory_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if layer_type == "both":
            self.cross_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.cross_attention = CopilotAttention(config, cache_index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = CopilotMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor,
        memory_mask: torch.Tensor | Span,
        self_mask: torch.Tensor | Span | None,
        cache: Caches | None,
        rotations: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """`[B, m, d]` -> `[B, m, d]`; see [`CopilotModel.forward`] for the other arguments."""
        own, shared = (None, None) if cache is None else cache
        own_rotations = None if rotations is None else (rotations[0], rotations[0])
        normed = self.input_layernorm(hidden_states)  # [B, m, d]
        if self.layer_type == "cross":
            attended = self.attention(normed, self.memory_layernorm(memory), memory_mask, shared, rotations)
        else:
            attended = self.attention(normed, normed, self_mask, own, own_rotations)
        hidden_states = hidden_states + self.dropout(attended)
        if self.layer_type == "both":
            normed, memory = self.cross_layernorm(hidden_states), self.memory_layernorm(memory)
            hidden_states = hidden_states + self.dropout(
                self.cross_attention(normed, memory, memory_mask, shared, rotations)
            )
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


@dataclass
class CopilotOutput(ModelOutput):
    """`last_hidden_state` `[B, m, e]`, what f = W h is made of, and, where asked for, `logits` f `[B, m, V]`."""

    last_hidden_state: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class CopilotModel(CopilotPreTrainedModel):
    """Predicts the Pilot's discrepancy f at every query from the memory and the discrepancies before it.

    `CopilotModel(config)` has random weights; `hf_copilot.copilot_for(pilot, config)` starts from a decoder.
    The last map starts at zero (W, or the one before it where the Pilot lends W), so a fresh Copilot changes nothing.
    """

    base_model_prefix = "copilot"
    main_input_name = "input_values"
    _no_split_modules = ["CopilotLayer"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: CopilotConfig):
        config.resolve_defaults()
        config.init = config.init or "random"
        super().__init__(config)
        sizes = [name for name in SIZES if name != "pilot_hidden_size" or config.reads_states]
        missing = [name for name in sizes if getattr(config, name) is None]
        if missing:
            raise ValueError(
                f"This CopilotConfig (memory={config.memory!r}) has no {missing} yet: build the Copilot with "
                "hf_copilot.copilot_for(pilot, config), which takes them from the Pilot."
            )
        types, own = config.attention_types, config.vocab_projection == "own"
        size, pilot_size = config.hidden_size, config.pilot_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size) if own else None
        self.input_proj = nn.Identity() if own else nn.Linear(pilot_size, size, bias=False)
        self.start = nn.Embedding(1, size)
        aligns = config.reads_states and pilot_size != size
        self.memory_proj = nn.Linear(pilot_size, size) if aligns else nn.Identity()
        self.layers = nn.ModuleList(
            CopilotLayer(config, kind, cache_index=types[:i].count(kind)) for i, kind in enumerate(types)
        )
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.output_proj = nn.Identity() if own else nn.Linear(size, pilot_size, bias=False)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False) if own else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if module is self.get_submodule(self.last_map):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    @property
    def last_map(self) -> str:
        """The name of the module that starts at zero."""
        return "lm_head" if self.config.vocab_projection == "own" else "output_proj"

    def vocabulary(self, lent: Vocabulary | None) -> Vocabulary:
        """E and W: the Copilot's own, or those that its Pilot lends, without padding rows that the Copilot lacks."""
        if self.config.vocab_projection == "own":
            return Vocabulary(self.embed_tokens.weight, self.lm_head.weight)
        if lent is None:
            raise ValueError("This Copilot uses its Pilot's vocabulary: pass `lent=lent_vocabulary(pilot, device)`.")
        return Vocabulary(*(matrix[: self.config.vocab_size] for matrix in lent))

    def embed(
        self, indices: torch.Tensor, values: torch.Tensor, is_start: torch.Tensor, embedding: torch.Tensor
    ) -> torch.Tensor:
        """The input of a query: Σ_k (a ℓ_k + b [k = y]) E_k, mapped where E is the Pilot's, or the start vector.

        ℓ is the discrepancy before it, y the token just read (the last entry of ℓ), E the embedding matrix;
        (a, b) is (1, 0) for `copilot_input="discrepancy"` (the paper), (0, 1) for `"token"`, (1, 1) for `"both"`.

        Args:
            indices, values: `[B, m, k + 1]`, the discrepancy before each query (see [`SparseDiscrepancy`]).
            is_start: `[B, m]` bool, True where a run starts and nothing comes before.
            embedding: E, `[V, e]`.
        """
        if self.config.copilot_input == "token":
            inputs = F.embedding(indices[..., -1], embedding)  # [B, m, e]
        else:
            if self.config.copilot_input == "both":
                values = torch.cat([values[..., :-1], values[..., -1:] + 1.0], dim=-1)  # [B, m, k + 1]
            weights = values.flatten(0, 1).to(embedding.dtype)
            bag = F.embedding_bag(indices.flatten(0, 1), embedding, per_sample_weights=weights, mode="sum")
            inputs = bag.unflatten(0, indices.shape[:2])  # [B, m, e]
        return torch.where(is_start[..., None], self.start.weight, self.project_input(inputs))

    def embed_memory(self, memory: torch.Tensor) -> torch.Tensor:
        """The Pilot's states `[B, s, d_P]`, or ids of tokens `[B, s]` with `memory="tokens"`, -> `[B, s, d]`."""
        dtype = self.norm.weight.dtype
        if self.config.reads_states:
            return self.memory_proj(memory.to(dtype)).to(dtype)  # autocast gives another
        ids, is_unknown = self.known(memory)
        embedded = F.embedding(ids, self.embed_tokens.weight)  # [B, s, d]
        return torch.where(is_unknown[..., None], self.start.weight, embedded).to(dtype)

    def known(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids `[...]` of rows that there are, and `[...]` bool, which had none (padding rows of a Pilot): these are
        read as the start vector."""
        last = self.config.vocab_size - 1
        return ids.clamp(max=last), ids > last

    def logits(self, hidden_states: torch.Tensor, lent: Vocabulary | None = None) -> torch.Tensor:
        """f = W h: `[..., e]` -> `[..., V]`."""
        head = self.vocabulary(lent).head  # [V, e]
        return F.linear(hidden_states.to(head.dtype), head)

    def project_input(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[B, m, e]` -> `[B, m, d]`, in the Copilot's type."""
        return self.input_proj(inputs.to(self.norm.weight.dtype))

    def forward(
        self,
        input_indices: torch.Tensor,
        input_values: torch.Tensor,
        is_start: torch.Tensor,
        memory: torch.Tensor,
        memory_mask: torch.Tensor | Span,
        self_mask: torch.Tensor | Span | None = None,
        positions: torch.Tensor | None = None,
        memory_positions: torch.Tensor | None = None,
        cache: Caches | None = None,
        inputs_embeds: torch.Tensor | None = None,
        return_logits: bool = False,
        lent: Vocabulary | None = None,
        decode: Callable[..., torch.Tensor] | None = None,
    ) -> CopilotOutput:
        """
        Args:
            input_indices, input_values, is_start: As in [`embed`].
            memory: `[B, s, d_P]`, or ids `[B, s]` with `memory="tokens"`: from `Memory.entries`.
            memory_mask: What each query reads, from `Memory.reads`; or `[B, m, cached + s]` bool.
            self_mask: Likewise of its own states, cached + m; None for all.
            positions, memory_positions: `[B, m]` and `[B, s]`, from [`rotary_positions`]; not read without positions.
            cache: Updated in place.
            inputs_embeds: `[B, m, d]` instead of what [`embed`] makes of the first three.
            return_logits: Also give f = W h, `[B, m, V]`.
            lent: The Pilot's E and W, for `vocab_projection="pilot"`.
            decode: What [`decode`] was compiled to; None for itself.

        Raises:
            ValueError: If positions or the Pilot's matrices, which the config asks for, are missing.
        """
        vocabulary, memory = self.vocabulary(lent), self.embed_memory(memory)  # [B, s, d]
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_indices, input_values, is_start, vocabulary.embedding)
        inputs_embeds = inputs_embeds.to(self.norm.weight.dtype)  # [B, m, d]
        reads = memory_mask, self_mask, positions, memory_positions
        hidden_states = (decode or self.decode)(inputs_embeds, memory, *reads, cache)  # [B, m, e]
        return CopilotOutput(hidden_states, self.logits(hidden_states, lent) if return_logits else None)

    def decode(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor,
        memory_mask: torch.Tensor | Span,
        self_mask: torch.Tensor | Span | None,
        positions: torch.Tensor | None,
        memory_positions: torch.Tensor | None,
        cache: Caches | None,
    ) -> torch.Tensor:
        """The blocks, from inputs `[B, m, d]` and memory `[B, s, d]` to `[B, m, e]`; the others as in [`forward`]."""
        rotations = self._rotations(positions, memory_positions)
        memory_mask, self_mask = as_mask(memory_mask), as_mask(self_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, memory, memory_mask, self_mask, cache, rotations)
        return self.output_proj(self.norm(hidden_states))

    def _rotations(self, *positions: torch.Tensor | None) -> tuple[torch.Tensor, ...] | None:
        if self.config.position_embedding != "rotary":
            return None
        if any(tensor is None for tensor in positions):
            raise ValueError("This Copilot has rotary positions: pass **rotary_positions(config, queries, tokens).")
        return tuple(rotation(tensor, self.config.head_dim, self.config.rope_theta) for tensor in positions)

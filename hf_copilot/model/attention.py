"""Attention of the Copilot: over its own states, or over the memory.

Shapes: B rows, m queries, c of them in a block, s entries that are new, e entries in all, d hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import rotate_half

from .caches import KeysAndValues
from .configuration_copilot import CopilotConfig

BLOCK_ENTRIES = 2**22  # of the mask of one block of queries: 4 MiB, and 16 MiB as a bias of the attention
NOWHERE = 2**31 - 1  # the place of an entry that no query reads
ANEW = {"use_reentrant": False, "preserve_rng_state": False}  # no random number is drawn in it


class Span(NamedTuple):
    """Which entries each query reads: those whose place lies between its `first` and `last`, both included."""

    places: torch.Tensor  # [B, e] int64
    last: torch.Tensor  # [B, m] int64
    first: torch.Tensor | None = None  # [B, m] int64; None is from the beginning

    def mask(self, rows: slice = slice(None)) -> torch.Tensor:
        """`[B, c, e]` bool of some queries, True where one reads."""
        places = self.places[:, None]  # [B, 1, e]
        reads = places <= self.last[:, rows, None]  # [B, c, e]
        return reads if self.first is None else reads & (places >= self.first[:, rows, None])

    @property
    def is_small(self) -> bool:
        """Whether the mask of all queries has at most `BLOCK_ENTRIES`."""
        return self.places.numel() * self.last.shape[1] <= BLOCK_ENTRIES

    def blocks(self) -> list[slice]:
        """The queries in blocks whose masks have at most `BLOCK_ENTRIES`."""
        queries, size = self.last.shape[1], max(1, BLOCK_ENTRIES // max(1, self.places.numel()))
        return [slice(start, start + size) for start in range(0, queries, size)]


def as_mask(reads: torch.Tensor | Span | None) -> torch.Tensor | Span | None:
    """A span whose mask is small, as that mask `[B, m, e]`: made once for all layers."""
    return reads.mask() if isinstance(reads, Span) and reads.is_small else reads


def rotation(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """cos and sin of the angles p θ^(−2i / head_dim) of rotary positions (RoFormer), in the Llama family's order of
    dimensions: `[B, s]` -> `[2, B, 1, s, head_dim]` float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim  # [head_dim / 2]
    angles = positions[:, None, :, None] * theta**-exponents  # [B, 1, s, head_dim / 2]
    angles = torch.cat([angles, angles], dim=-1)  # [B, 1, s, head_dim]
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: torch.Tensor, cos_and_sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys `[B, heads, s, head_dim]`, turned by what [`rotation`] gave for their positions."""
    cos, sin = cos_and_sin.to(x.dtype)
    return x * cos + rotate_half(x) * sin


class CopilotAttention(nn.Module):
    """Attention whose keys and values are the queries' own states or the memory."""

    def __init__(self, config: CopilotConfig, cache_index: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.cache_index = cache_index  # among the layers of its kind
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5 if config.attention_scaling is None else config.attention_scaling
        heads, kv_heads = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = None

    def split_heads(self, x: torch.Tensor, norm: nn.RMSNorm | None = None) -> torch.Tensor:
        """`[B, s, heads * head_dim]` -> `[B, heads, s, head_dim]`, normed where there is a norm."""
        heads = x.unflatten(-1, (-1, self.head_dim))
        return (heads if norm is None else norm(heads.to(norm.weight.dtype))).transpose(1, 2)

    def forward(
        self,
        queries: torch.Tensor,
        source: torch.Tensor,
        reads: torch.Tensor | Span | None,
        cache: KeysAndValues | None,
        rotations: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Q = H W_Q; K, V = source W_K, source W_V (Eq. 6 where source = [X̃ ; h]).

        Args:
            queries: H, `[B, m, d]`.
            source: `[B, s, d]`, states that are not in the cache yet.
            reads: What each query reads of cached + s, as a [`Span`] or `[B, m, cached + s]` bool; None for all.
            cache: Keys and values of earlier calls; these are appended to it.
            rotations: Of queries and source, from [`rotation`]; None without positions.
        """
        q = self.split_heads(self.q_proj(queries), self.q_norm)  # [B, heads, m, head_dim]
        k = self.split_heads(self.k_proj(source), self.k_norm)  # [B, kv_heads, s, head_dim]
        if rotations is not None:
            q, k = rotated(q, rotations[0]), rotated(k, rotations[1])
        v = self.split_heads(self.v_proj(source))  # [B, kv_heads, s, head_dim]
        if cache is not None:
            k, v = cache.update(k, v, self.cache_index)  # [B, kv_heads, cached + s, head_dim]
        attend = self._attend_by_blocks if isinstance(reads, Span) else self._attend
        return self.o_proj(attend(q, k, v, reads).flatten(2))  # [B, m, d]

    @torch.compiler.disable  # which can't recompute a block
    def _attend_by_blocks(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reads: Span) -> torch.Tensor:
        """A long document goes in blocks of queries. Their masks are made anew in the backward pass, so that memory
        grows with its length and not with the square of it."""

        def block(rows: slice, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self._attend(q, k, v, reads.mask(rows))  # [B, c, heads, head_dim]

        parts = [checkpoint(block, rows, q[:, :, rows], k, v, **ANEW) for rows in reads.blocks()]
        return torch.cat(parts, dim=1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """softmax(scaling q kᵀ) v over what each query reads: `[B, m, heads, head_dim]`."""
        mask = None if mask is None else mask[:, None]  # [B, 1, m, e]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](self, q, k, v, mask, scaling=self.scaling, is_causal=False)[0]

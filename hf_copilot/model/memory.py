"""What a Copilot's cross-attention reads, and which of it a query may see: one class for each kind of memory.

A memory is a row of entries that only grows at its end, so that a cache of its keys and values can grow and be cut
there. Shapes: B rows, m queries, n positions of the Pilot's decoder, S of its encoder, d_P the Pilot's hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from .attention import NOWHERE, Span
from .configuration_copilot import CopilotConfig


class Memory(ABC):
    """One kind of memory."""

    def __init__(self, lag: int):
        self.lag = lag

    @abstractmethod
    def entries(
        self,
        input_ids: torch.Tensor,
        embeddings: torch.Tensor | None,
        hidden_states: torch.Tensor | None,
        is_first: bool = True,
    ) -> torch.Tensor:
        """The entries of n consecutive positions, from what was read at these.

        Args:
            input_ids: `[B, n]`, the decoder's.
            embeddings: X̃, `[B, n, d_P]`, or `[B, S, d_P]` of an encoder.
            hidden_states: h, `[B, n, d_P]`.
            is_first: Whether they are the first positions: with these come the entries of an encoder.
        """

    def reads(self, queries: torch.Tensor, visible: torch.Tensor, encoder_visible: torch.Tensor | None = None) -> Span:
        """Which entries a query reads: tokens and X̃ at positions ≤ j, h at positions ≤ j − lag, all of an encoder's
        output.

        Args:
            queries: `[B, m]`, the position j of every query in its row.
            visible: `[B, n]` bool, False at padding.
            encoder_visible: `[B, S]` bool, likewise, of an encoder.
        """
        position = torch.arange(visible.shape[1], device=visible.device)  # [n]
        return Span(self.places(position.where(visible, NOWHERE), encoder_visible), queries)

    @abstractmethod
    def places(self, position: torch.Tensor, encoder_visible: torch.Tensor | None) -> torch.Tensor:
        """The least j that reads each entry, of positions `[B, n]` and of an encoder's `[B, S]`: `[B, entries]`."""

    @abstractmethod
    def positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where the entries of tokens stand, for rotary positions: `[B, n]` -> `[B, entries]`."""

    @abstractmethod
    def size(self, positions: int, encoder_length: int) -> int:
        """The number of entries of the first `positions` of the decoder."""


class TokenMemory(Memory):
    """The tokens so far, by the Copilot's own embedding: n entries."""

    def entries(self, input_ids, embeddings, hidden_states, is_first=True):
        return input_ids  # [B, n]

    def places(self, position, encoder_visible):
        return position  # [B, n]

    def positions(self, tokens):
        return tokens

    def size(self, positions, encoder_length):
        return positions


class StateMemory(Memory):
    """[X̃ ; h] of Eq. 6, by position: X̃_0, h_0, X̃_1, h_1, ..., 2n entries."""

    def entries(self, input_ids, embeddings, hidden_states, is_first=True):
        return torch.stack([embeddings, hidden_states], dim=2).flatten(1, 2)  # [B, 2n, d_P]

    def places(self, position, encoder_visible):
        return torch.stack([position, position + self.lag], dim=-1).flatten(1)  # [B, 2n]

    def positions(self, tokens):
        return tokens.repeat_interleave(2, dim=1)  # [B, 2n]

    def size(self, positions, encoder_length):
        return 2 * positions


class EncoderMemory(Memory):
    """[X̃ ; h] of Eq. 6 beside an encoder-decoder: the encoder's output, and then h, S + n entries."""

    def entries(self, input_ids, embeddings, hidden_states, is_first=True):
        if not is_first:
            return hidden_states  # [B, n, d_P]
        return torch.cat([embeddings, hidden_states], dim=1)  # [B, S + n, d_P]

    def places(self, position, encoder_visible):
        encoder = torch.where(encoder_visible, 0, NOWHERE)  # [B, S]
        return torch.cat([encoder, position + self.lag], dim=-1)  # [B, S + n]

    def positions(self, tokens):
        raise NotImplementedError("An encoder's output has no positions in its decoder.")

    def size(self, positions, encoder_length):
        return encoder_length + positions


def memory_of(config: CopilotConfig) -> Memory:
    """The kind of memory that a Copilot reads."""
    if config.memory == "tokens":
        return TokenMemory(config.hidden_state_lag)
    if config.pilot_is_encoder_decoder:
        return EncoderMemory(config.hidden_state_lag)
    return StateMemory(config.hidden_state_lag)

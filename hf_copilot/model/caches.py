"""What a Copilot keeps of earlier calls."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class KeysAndValues(Protocol):
    """Of layers of one kind, as a `DynamicCache` has them."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep those of new entries, `[B, kv_heads, s, head_dim]`, and give all: `[B, kv_heads, entries, head_dim]`,
        with what may be read of them as the mask says."""


class Caches(NamedTuple):
    """What a `CopilotModel` goes on from."""

    own: KeysAndValues  # of the run of queries so far
    memory: KeysAndValues

"""Keys and values of a `generate`, in one tensor for all layers that keeps its place until it is full.

Shapes: R rows, s entries that are new, e entries so far, C that there is room for.
"""

from __future__ import annotations

import torch

LEAST = 64  # entries


class GrowingCache:
    """Nothing is copied when it grows by an entry: new ones are written behind those that are there.

    Args:
        layers: How many layers write to it.

    Attributes:
        held: `[2, layers, R, kv_heads, C, head_dim]`, keys and values, zero behind the last entry; None before the
            first.
        length: How many entries there are. Whoever has the layers write counts what they have written.
        places: `[s]` int64, where the layers write; they are given all C entries then. None is behind the last entry,
            and they are given e + s entries.
    """

    def __init__(self, layers: int):
        self.layers, self.length = layers, 0
        self.held: torch.Tensor | None = None
        self.places: torch.Tensor | None = None

    @property
    def room(self) -> int:
        """C."""
        return 0 if self.held is None else self.held.shape[4]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values of the new entries, `[R, kv_heads, s, head_dim]`, and give all of this layer."""
        if self.places is not None:
            for held, new in zip(self.held[:, layer], (keys, values), strict=True):
                held.index_copy_(2, self.places, new)
            return self.held[0, layer], self.held[1, layer]  # [R, kv_heads, C, head_dim]
        end = self.length + keys.shape[2]
        if not self.length and not self._suits(keys):
            self.held = keys.new_zeros(2, self.layers, *keys.shape[:2], power_of_two(end), keys.shape[3])
        self.make_room(end)
        for held, new in zip(self.held[:, layer], (keys, values), strict=True):
            held[:, :, self.length : end] = new
        every = self.held[:, layer, :, :, :end].to(keys.dtype)  # autocast may have come or gone
        return every[0], every[1]  # [R, kv_heads, e + s, head_dim]

    def make_room(self, length: int) -> None:
        """For so many entries, in another place where there are too few."""
        if self.held is not None and length > self.room:
            grown = self.held.new_zeros(*self.held.shape[:4], power_of_two(length), self.held.shape[5])
            grown[..., : self.length, :] = self.held[..., : self.length, :]
            self.held = grown

    def _suits(self, keys: torch.Tensor) -> bool:
        """Whether there is room for as many rows, of this type."""
        held = self.held
        return held is not None and (held.shape[2], held.dtype, held.device) == (len(keys), keys.dtype, keys.device)

    def keep(self, length: int) -> None:
        """Forget all but the first entries.

        Raises:
            RuntimeError: If there are fewer.
        """
        if length > self.length:
            raise RuntimeError(
                f"Of {length} entries only {self.length} are there: a call before did not end. Generate anew, "
                "without a kept cache."
            )
        if self.held is not None and (length < self.length or not length):
            self.held[..., length:, :] = 0  # what is not finite must reach no later run
        self.length = length

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i goes on from what was row `rows[i]`, `[R]` int64."""
        if self.held is None:
            return
        kept = self.held[..., : self.length, :].index_select(2, rows)  # [2, layers, R, kv_heads, e, head_dim]
        if len(rows) != self.held.shape[2]:
            self.held = kept.new_zeros(*kept.shape[:4], self.room, kept.shape[5])
        self.held[..., : self.length, :] = kept


def power_of_two(length: int) -> int:
    """The least that is at least this long, and `LEAST`."""
    return max(LEAST, 1 << (length - 1).bit_length())

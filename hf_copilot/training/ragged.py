"""Values of documents of different lengths: one after the other, or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Shape = tuple[int, int]


def exact(rows: int, longest: int) -> Shape:
    """A batch without more padding than its longest document asks for."""
    return rows, longest


def powers_of_two(rows: int, longest: int, least: int = 16) -> Shape:
    """A batch of one of few shapes, each of which is a CUDA graph."""
    return 1 << (rows - 1).bit_length(), max(least, 1 << (longest - 1).bit_length())


class Ragged(NamedTuple):
    """Where the values of all documents, one after the other, stand in a padded batch."""

    rows: torch.Tensor  # [N]
    columns: torch.Tensor  # [N]
    shape: Shape  # B, the longest; or more
    documents: int

    @classmethod
    def of(cls, lengths: Sequence[int], shape: Callable[[int, int], Shape] = exact) -> Ragged:
        """Of documents that have so many values each, in a batch of the shape that is made of their number and the
        longest."""
        sizes = torch.tensor(lengths)  # [B]
        rows = torch.repeat_interleave(sizes, output_size=sum(lengths))  # [N]
        columns = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[rows]  # [N]
        return cls(rows, columns, shape(len(lengths), max(lengths)), len(lengths))

    def pad(self, values: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """`[N, ...]` -> `[B, longest, ...]`."""
        padded = values.new_full((*self.shape, *values.shape[1:]), fill)
        padded[self.rows, self.columns] = values
        return padded

    def visible(self) -> torch.Tensor:
        """`[B, longest]` bool, where a value stands; a row without a document reads its first place, not nothing."""
        visible = self.pad(torch.ones_like(self.rows, dtype=torch.bool))
        visible[self.documents :, 0] = True
        return visible

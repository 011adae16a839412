"""Values of documents of different lengths: one after the other, or padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Ragged(NamedTuple):
    """Where the values of all documents, one after the other, stand in a padded batch."""

    rows: torch.Tensor  # [N]
    columns: torch.Tensor  # [N]
    shape: tuple[int, int]  # B, the longest

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Ragged:
        """Of documents that have so many values each."""
        sizes = torch.tensor(lengths)  # [B]
        rows = torch.repeat_interleave(sizes, output_size=sum(lengths))  # [N]
        columns = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[rows]  # [N]
        return cls(rows, columns, (len(lengths), max(lengths)))

    def pad(self, values: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """`[N, ...]` -> `[B, longest, ...]`."""
        padded = values.new_full((*self.shape, *values.shape[1:]), fill)
        padded[self.rows, self.columns] = values
        return padded

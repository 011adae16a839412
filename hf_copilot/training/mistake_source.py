"""Whose errors the Mistake Log holds (`copilot_mistake_source`), besides those of the Pilot's own training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset


class Holdout:
    """A slice of the training data that the Pilot never trains on, batch by batch; after the last row comes the first.

    Args:
        rows: The slice.
        collate: Makes the Pilot's inputs of some rows.
        batch_size: Rows of one batch.
    """

    def __init__(self, rows: Sequence[Any], collate: Callable[[list[Any]], dict[str, Any]], batch_size: int):
        self.rows, self.collate, self.batch_size = rows, collate, batch_size

    def batch(self, index: int) -> dict[str, Any]:
        """The inputs of batch `index`; counted over all processes, it depends on nothing else."""
        start = index * self.batch_size
        return self.collate([self.rows[i % len(self.rows)] for i in range(start, start + self.batch_size)])


def split_holdout(rows: Any, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows held out, at random.

    Raises:
        ValueError: If the share is not between 0 and 1, leaves no row on one side, or the rows can't be split.
    """
    if not isinstance(rows, Dataset):
        raise ValueError(
            f"copilot_mistake_source='holdout' splits a `datasets.Dataset`, not a {type(rows).__name__}: pass one, or "
            "leave it at 'train'."
        )
    held_out = round(share * len(rows))
    if not 0 < held_out < len(rows):
        raise ValueError(
            f"copilot_holdout={share} of {len(rows)} rows leaves none to hold out or none to train on: it is a share "
            "between 0 and 1."
        )
    parts = rows.train_test_split(held_out, seed=seed)
    return parts["train"], parts["test"]

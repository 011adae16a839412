"""The Mistake Log: what the Pilot saw, thought and got wrong, one record per document, the latest rounds.

Shapes of one record: n positions (up to the last target), m targets, k kept entries of ℓ, d_P the Pilot's hidden size.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..model.fields import is_whole

logger = logging.getLogger(__name__)

OF_TARGETS = ("positions", "labels", "final_states", "indices", "values", "dropped")  # fields of a record, [m, ...]


@dataclass
class MistakeRecord:
    """One document of one training forward (X̃, h, ℓ of the paper), without padding."""

    input_ids: torch.Tensor  # [n] int64, of the decoder
    embeddings: torch.Tensor  # [n, d_P] X̃, or [0, d_P] where the input ids give it exactly; [S, d_P] of an encoder
    hidden_states: torch.Tensor  # [n, d_P] h; a Copilot of memory="tokens" has [0, d_P] here and above
    positions: torch.Tensor  # [m] int64, j such that j + 1 has a label; beside an encoder, that j has
    labels: torch.Tensor  # [m] int64
    final_states: torch.Tensor  # [m, d_P], the decoder's output at the targets
    indices: torch.Tensor  # [m, k + 1] int32, ℓ
    values: torch.Tensor  # [m, k + 1] float32, ℓ
    dropped: torch.Tensor  # [m] float32, the probability mass that ℓ leaves out

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    @cached_property
    def is_start(self) -> torch.Tensor:
        """`[m]` bool: the first target of each run (a contiguous stretch of targets)."""
        starts = torch.ones_like(self.positions, dtype=torch.bool)
        starts[1:] = self.positions[1:] != self.positions[:-1] + 1
        return starts

    @cached_property
    def num_sequences(self) -> int:
        """Runs."""
        return int(self.is_start.sum())

    @cached_property
    def has_prompt(self) -> bool:
        """Whether a token stands before its first target's."""
        return bool(self.positions[0] != 0)

    def starting_at(self, first: int) -> MistakeRecord:
        """The same document with its first targets left out: they are memory only."""
        return replace(self, **{name: getattr(self, name)[first:] for name in OF_TARGETS})


def check_bounds(max_rounds: int, max_bytes: int) -> None:
    """Raise a `ValueError` for a log that could hold nothing."""
    if not all(is_whole(bound) and bound >= 1 for bound in (max_rounds, max_bytes)):
        raise ValueError(
            f"A Mistake Log of {max_rounds} rounds and {max_bytes} bytes: both must be whole numbers, at least 1."
        )


class MistakeLog:
    """Ring buffer of the last rounds (a round is one optimizer step of the Pilot), on the CPU.

    Args:
        max_rounds: Rounds that are kept (the paper keeps 128).
        max_bytes: Bound on the tensors' size; the oldest rounds go first. `capped` says whether it ever bound.

    Raises:
        ValueError: For a bound below 1.
    """

    def __init__(self, max_rounds: int = 128, max_bytes: int = 2**30):
        check_bounds(max_rounds, max_bytes)
        self.max_rounds, self.max_bytes = max_rounds, max_bytes
        self.rounds: deque[list[MistakeRecord]] = deque()
        self.clear()

    def __len__(self) -> int:
        """Documents in the log."""
        return sum(len(records) for records in self.rounds)

    @property
    def records(self) -> list[MistakeRecord]:
        """All documents, the oldest first."""
        return [record for round_ in self.rounds for record in round_]

    def clear(self) -> None:
        self.rounds.clear()
        self.nbytes, self.capped = 0, False

    def append(self, records: list[MistakeRecord]) -> None:
        """Add a round; drop the oldest beyond the bounds. A round over `max_bytes` by itself loses its first
        documents, but never its last."""
        self.rounds.append(list(records))
        self.nbytes += sum(record.nbytes for record in records)
        while len(self.rounds) > self.max_rounds:
            self._drop(self.rounds.popleft())
        was_capped = self.capped
        while self.nbytes > self.max_bytes and len(self) > 1:
            self.capped = True
            oldest = self.rounds[0]
            self._drop(self.rounds.popleft() if len(self.rounds) > 1 else [oldest.pop(0)])
        if self.capped and not was_capped:
            logger.warning(
                "The Mistake Log has reached %d MiB and keeps %d rounds of %d: raise its bound in bytes "
                "(copilot_log_max_bytes) to keep more.",
                self.max_bytes // 2**20,
                len(self.rounds),
                self.max_rounds,
            )

    def _drop(self, records: list[MistakeRecord]) -> None:
        self.nbytes -= sum(record.nbytes for record in records)

    def sample(self, count: int, generator: torch.Generator) -> list[MistakeRecord]:
        """Up to `count` documents, uniformly without replacement."""
        records = self.records
        picked = torch.randperm(len(records), generator=generator)[:count].tolist()
        return [records[i] for i in picked]

    def save(self, path: str | Path) -> None:
        """Write the log to one safetensors file: every field of all records in one tensor, and their lengths."""
        records = self.records
        tensors = {"rounds": torch.tensor([len(round_) for round_ in self.rounds], dtype=torch.int64)}
        for field in fields(MistakeRecord):
            column = [getattr(record, field.name) for record in records]
            tensors[f"length.{field.name}"] = torch.tensor([len(tensor) for tensor in column], dtype=torch.int64)
            if column:
                tensors[field.name] = torch.cat(column)
        save_file(tensors, path)

    def load(self, path: str | Path) -> None:
        """Replace the contents with a file that [`save`] wrote."""
        tensors = load_file(path)
        self.clear()
        if not len(tensors["rounds"]):
            return
        names = [field.name for field in fields(MistakeRecord)]
        columns = [tensors[name].split(tensors[f"length.{name}"].tolist()) for name in names]
        records = [MistakeRecord(*(tensor.clone() for tensor in row)) for row in zip(*columns, strict=True)]
        for count in tensors["rounds"].tolist():
            self.append(records[:count])
            records = records[count:]

"""From records of the Mistake Log to a padded batch of the Copilot. Queries are targets alone: prompts are memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.attention import Span
from ..model.configuration_copilot import CopilotConfig
from ..model.discrepancy import SparseDiscrepancy
from ..model.memory import memory_of
from ..model.modeling_copilot import rotary_positions
from ..pilot.head import PilotEmbedding
from .mistake_log import OF_TARGETS, MistakeRecord
from .ragged import Ragged, Shape, exact
from .transfer import to_device

ROOM = 2**13  # positions of one batch, whatever the Pilot's own have
MIN_LENGTH_RATIO = 0.75  # of a full group's shortest document to its longest


def full_positions(device: torch.device) -> int:
    """A group with as many keeps to documents of like length. Padding costs a CPU time; on an accelerator a batch
    more does."""
    return 1024 if device.type == "cpu" else ROOM


def group_by_length(
    records: Sequence[MistakeRecord], max_positions: float, full: float, has_encoder: bool = False
) -> list[list[MistakeRecord]]:
    """Split into groups of like length (of decoder and encoder together), whose padded size (rows x longest) stays
    within `max_positions`. A group that has `full` takes no record shorter than `MIN_LENGTH_RATIO` of its longest,
    which would be padding for the most part."""

    def length(record: MistakeRecord) -> int:
        return len(record.input_ids) + (len(record.embeddings) if has_encoder else 0)

    def has_room(group: list[MistakeRecord], record: MistakeRecord) -> bool:
        longest = length(group[0])
        padded = len(group) * longest
        is_like = padded < full or length(record) >= MIN_LENGTH_RATIO * longest
        return is_like and padded + longest <= max_positions

    groups: list[list[MistakeRecord]] = []
    for record in sorted(records, key=lambda record: -length(record)):
        if groups and has_room(groups[-1], record):
            groups[-1].append(record)
        else:
            groups.append([record])
    return groups


@dataclass
class CopilotBatch:
    """Records, padded for one forward of the Copilot; B documents, m queries, n positions, Q queries in all."""

    inputs: dict[str, Any]  # the arguments of CopilotModel.forward
    queries: tuple[torch.Tensor, torch.Tensor]  # [Q] twice, the row and the column of each query
    final_states: torch.Tensor  # [Q, d_P]
    labels: torch.Tensor  # [Q]
    target: SparseDiscrepancy  # [Q, k + 1]
    sequence: torch.Tensor  # [Q], the run of every query
    num_sequences: int


@dataclass(frozen=True)
class Collator:
    """Pads records into batches of a Copilot.

    Args:
        embedding: The Pilot's.
        config: The Copilot's.
        device: Of the batches.
        dtype: Of the states and embeddings in them.
        shape: A padded size, from documents and the longest.
    """

    embedding: PilotEmbedding
    config: CopilotConfig
    device: torch.device
    dtype: torch.dtype
    shape: Callable[[int, int], Shape] = exact

    def __call__(self, records: Sequence[MistakeRecord]) -> CopilotBatch:
        """All records in one batch, in their order; queries of different runs do not see each other."""
        columns = {name: [getattr(record, name) for record in records] for name in (*OF_TARGETS, "is_start")}
        flat = {name: torch.cat(column) for name, column in columns.items()}  # [Q, ...]
        targets = Ragged.of([len(record.labels) for record in records], self.shape)
        on_device = {name: self._send(flat[name]) for name in flat.keys() - {"positions"}}
        return CopilotBatch(
            inputs=self._inputs(records, flat, targets),
            queries=(self._send(targets.rows), self._send(targets.columns)),
            final_states=on_device["final_states"],
            labels=on_device["labels"],
            target=SparseDiscrepancy(on_device["indices"].long(), on_device["values"], on_device["dropped"]),
            sequence=on_device["is_start"].cumsum(0) - 1,
            num_sequences=sum(record.num_sequences for record in records),
        )

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_device(tensor, self.device)

    def _inputs(
        self, records: Sequence[MistakeRecord], flat: dict[str, torch.Tensor], targets: Ragged
    ) -> dict[str, Any]:
        tokens = Ragged.of([len(record.input_ids) for record in records], self.shape)
        positions = self._send(targets.pad(flat["positions"], tokens.shape[1]))  # [B, m]; padding sees all
        is_start = self._send(targets.pad(flat["is_start"]))  # [B, m]
        own = torch.arange(is_start.shape[1], device=self.device).expand_as(is_start)  # [B, m]
        run_start = own.where(is_start, 0).cummax(1).values  # [B, m]
        visible = self._send(tokens.visible())  # [B, n]
        entries, encoder_visible = self._entries(records, tokens)
        return {
            "input_indices": self._send(targets.pad(flat["indices"].long()).roll(1, dims=1)),  # [B, m, k + 1]
            "input_values": self._send(targets.pad(flat["values"]).roll(1, dims=1)),  # of the target before
            "is_start": is_start,
            "memory": entries,
            "memory_mask": memory_of(self.config).reads(positions, visible, encoder_visible),
            "self_mask": Span(own, own, run_start),
            **rotary_positions(self.config, positions, visible.cumsum(1) - 1),
        }

    def _entries(self, records: Sequence[MistakeRecord], tokens: Ragged) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The memory's entries, and which positions of an encoder are no padding, `[B, S]` bool, if there is one."""
        memory = memory_of(self.config)
        ids = self._send(tokens.pad(torch.cat([record.input_ids for record in records])))  # [B, n]
        if not self.config.reads_states:
            return memory.entries(ids, None, None), None
        hidden_states = tokens.pad(torch.cat([record.hidden_states for record in records]))  # [B, n, d_P]
        hidden_states, encoder_visible = self._send(hidden_states).to(self.dtype), None
        if not any(len(record.embeddings) for record in records):
            embeddings = self.embedding(ids).to(self.device, self.dtype)  # [B, n, d_P]
        else:
            logged = [known_embeddings(record, self.embedding).to(record.hidden_states) for record in records]
            places = Ragged.of([len(part) for part in logged], self.shape)
            embeddings = self._send(places.pad(torch.cat(logged))).to(self.dtype)  # [B, n or S, d_P]
            encoder_visible = self._send(places.visible())  # [B, S]
        return memory.entries(ids, embeddings, hidden_states), encoder_visible


def known_embeddings(record: MistakeRecord, embedding: PilotEmbedding) -> torch.Tensor:
    """X̃ of a record: as it was logged, or from the ids where these give it."""
    return record.embeddings if len(record.embeddings) else embedding(record.input_ids)

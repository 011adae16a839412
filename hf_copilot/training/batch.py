"""From records of the Mistake Log to a padded batch of the Copilot. Queries are targets alone: prompts are memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from ..model.configuration_copilot import CopilotConfig
from ..model.discrepancy import SparseDiscrepancy
from ..model.memory import memory_of
from ..model.modeling_copilot import rotary_positions
from ..pilot.head import PilotEmbedding
from .mistake_log import MistakeRecord

MIN_FULL_POSITIONS = 1024  # a group with as many keeps to documents of like length
MIN_LENGTH_RATIO = 0.75  # of its shortest to its longest


def group_by_length(
    records: Sequence[MistakeRecord], max_positions: float, has_encoder: bool = False
) -> list[list[MistakeRecord]]:
    """Split into groups of like length (of decoder and encoder together), whose padded size (rows x longest) stays
    within `max_positions`. A group that has `MIN_FULL_POSITIONS` takes no record shorter than `MIN_LENGTH_RATIO` of
    its longest, which would be padding for the most part."""

    def length(record: MistakeRecord) -> int:
        return len(record.input_ids) + (len(record.embeddings) if has_encoder else 0)

    def has_room(group: list[MistakeRecord], record: MistakeRecord) -> bool:
        longest = length(group[0])
        padded = len(group) * longest
        is_like = padded < MIN_FULL_POSITIONS or length(record) >= MIN_LENGTH_RATIO * longest
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

    inputs: dict[str, torch.Tensor]  # the arguments of CopilotModel.forward
    valid: torch.Tensor  # [B, m] bool, which queries are not padding
    final_states: torch.Tensor  # [Q, d_P]
    labels: torch.Tensor  # [Q]
    target: SparseDiscrepancy  # [Q, k + 1]
    sequence: torch.Tensor  # [Q], the run of every query
    num_sequences: int

    @classmethod
    def collate(
        cls,
        records: Sequence[MistakeRecord],
        embedding: PilotEmbedding,
        config: CopilotConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> CopilotBatch:
        """Pad the records; queries of different runs do not see each other."""

        def cat(name: str) -> torch.Tensor:
            return torch.cat([getattr(record, name) for record in records]).to(device)

        sequence = torch.cat([record.is_start for record in records]).cumsum(0) - 1  # [Q]
        length = max(len(record.input_ids) for record in records)
        positions = pad((record.positions for record in records), device, length)  # [B, m]; padding sees all
        return cls(
            inputs=_inputs(records, positions, embedding, config, device, dtype),
            valid=positions < length,
            final_states=cat("final_states"),
            labels=cat("labels"),
            target=SparseDiscrepancy(cat("indices").long(), cat("values"), cat("dropped")),
            sequence=sequence.to(device),
            num_sequences=int(sequence[-1]) + 1,
        )


def _inputs(
    records: Sequence[MistakeRecord],
    positions: torch.Tensor,
    embedding: PilotEmbedding,
    config: CopilotConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    memory = memory_of(config)
    is_start = pad((record.is_start for record in records), device)  # [B, m]
    run = is_start.cumsum(1)  # [B, m]
    same_run = run[:, :, None] == run[:, None, :]  # [B, m, m]
    visible = unpadded((record.input_ids for record in records), device)  # [B, n]
    encoder_visible = unpadded((record.embeddings for record in records), device)  # [B, S], read beside an encoder
    entries = memory.entries(
        pad((record.input_ids for record in records), device),  # [B, n]
        pad((known_embeddings(record, embedding) for record in records), device).to(dtype),  # [B, n or S, d_P]
        pad((record.hidden_states for record in records), device).to(dtype),  # [B, n, d_P]
    )
    return {
        "input_indices": pad((record.indices for record in records), device).long().roll(1, dims=1),  # [B, m, k + 1]
        "input_values": pad((record.values for record in records), device).roll(1, dims=1),  # of the target before
        "is_start": is_start,
        "memory": entries,
        "memory_mask": memory.mask(positions, visible, encoder_visible),  # [B, m, entries]
        "self_mask": same_run.tril(),
        **rotary_positions(config, positions, visible.cumsum(1) - 1),
    }


def known_embeddings(record: MistakeRecord, embedding: PilotEmbedding) -> torch.Tensor:
    """X̃ of a record: as it was logged, or from the ids where these give it; empty where no state was logged."""
    if len(record.embeddings) or not len(record.hidden_states):
        return record.embeddings
    return embedding(record.input_ids)


def pad(tensors: Iterable[torch.Tensor], device: torch.device, value: float = 0) -> torch.Tensor:
    """`[n, ...]` of each record -> `[B, longest n, ...]` on the device."""
    rows = list(tensors)
    if not any(map(len, rows)):  # what this kind of memory does not log
        return torch.empty(len(rows), *rows[0].shape, dtype=rows[0].dtype, device=device)
    return pad_sequence(rows, batch_first=True, padding_value=value).to(device)


def unpadded(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """`[B, longest n]` bool, False at padding."""
    lengths = [len(tensor) for tensor in tensors]
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)

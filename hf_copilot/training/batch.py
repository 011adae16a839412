"""Documents, targets and runs: from a training batch to records, and from records to a batch of the Copilot.

Position j is a target when the token that the Pilot predicts there carries a label: the token at j + 1 of the same
document, or, beside an encoder-decoder, the label at j. A contiguous stretch of targets is a run, the unit that one
`generate()` call produces; it starts from the learned start vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from ..model.configuration_copilot import CopilotConfig
from ..model.discrepancy import SparseDiscrepancy, discrepancy
from ..model.modeling_copilot import interleave, memory_mask, rotary_positions
from ..pilot.head import PilotEmbedding, PilotHead
from ..pilot.inspect import is_encoder_decoder
from ..pilot.tap import PilotStates
from .mistake_log import MistakeRecord

IGNORE = -100
FULL, LIKE = 1024, 0.75  # of `group_by_length`


class Document(NamedTuple):
    """Tokens `start` to `end` (not included) of a row of a batch."""

    row: int
    start: int
    end: int


def find_documents(inputs: Mapping[str, Any], has_encoder: bool = False) -> list[Document]:
    """The documents of a collated batch. Beside an encoder-decoder every row of labels is one. Else: the unpadded
    stretch of a row of `attention_mask`; where there is none (packing, padding-free), a document starts where
    `position_ids` is 0; with neither, every row is one document.

    Raises:
        ValueError: If the batch has no `input_ids`, a mask of another form or with holes in a row, or positions that
            do not begin at 0.
    """
    rows, length = inputs["labels"].shape
    if has_encoder:
        return [Document(i, 0, length) for i in range(rows)]
    if inputs.get("input_ids") is None:
        raise ValueError(
            "The Mistake Log needs `input_ids` in the batch, inputs_embeds do not say what was read: pass them."
        )
    mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"The Mistake Log reads documents from a 2D attention_mask, this one has {mask.ndim} dimensions."
        )
    if mask is not None:
        spans = [row.nonzero()[:, 0].tolist() for row in mask.cpu()]
        holes = [i for i, span in enumerate(spans) if span and len(span) != span[-1] + 1 - span[0]]
        if holes:
            raise ValueError(
                f"attention_mask has holes in rows {holes}: the Mistake Log reads a row's tokens as one document. Pad "
                "at the sides alone, or leave the mask out and begin position_ids anew in every document."
            )
        return [Document(i, span[0], span[-1] + 1) for i, span in enumerate(spans) if span]
    if position_ids is None:
        return [Document(i, 0, length) for i in range(rows)]
    documents = []
    for i, row in enumerate(position_ids.cpu()):
        starts = (row == 0).nonzero()[:, 0].tolist()
        if starts[:1] != [0]:
            raise ValueError(
                f"position_ids of row {i} begin at {int(row[0])}, and without an attention_mask a document begins "
                "where they are 0: begin them there, or pass a mask."
            )
        documents += [Document(i, *span) for span in zip(starts, [*starts[1:], length], strict=True)]
    return documents


def make_records(
    states: PilotStates,
    inputs: Mapping[str, Any],
    head: PilotHead,
    embedding: PilotEmbedding,
    top_k: int,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> list[MistakeRecord]:
    """One record for every document of a forward that has a target and a finite forward.

    Args:
        states: What the tap read; positions of virtual tokens (prompt tuning) are left out.
        inputs: The batch: `input_ids`, `labels` `[B, T]` (−100 where there is none), masks.
        head: The Pilot's head, for ℓ.
        embedding: The Pilot's embedding: X̃ is left out of the records where the ids give it.
        top_k: Entries of p̂ kept in ℓ.
        dtype, device: Of the hidden states and of all tensors in the records; None keeps the Pilot's.
    """
    labels = inputs["labels"].cpu()  # [B, T]
    length, has_encoder = labels.shape[1], is_encoder_decoder(head.pilot)
    shift = 0 if has_encoder else 1  # the label of position j is at j + shift
    documents, kept, target_lists = [], [], []
    for document in find_documents(inputs, has_encoder):
        row, start, end = document
        targets = (labels[row, start + shift : end] != IGNORE).nonzero()[:, 0]  # [m], counted from start
        if len(targets):
            documents.append(document)
            kept.append(torch.arange(int(targets[-1]) + 1) + row * length + start)  # [n], flat positions in the batch
            target_lists.append(targets)
    if not kept:
        return []
    where = torch.cat(kept)  # [N]
    target_where = torch.cat([flat[targets] for flat, targets in zip(kept, target_lists, strict=True)])  # [M]
    target_labels = labels.flatten()[target_where + shift]  # [M]

    def flat(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return tensor[:, -length:].flatten(0, 1)[positions.to(tensor.device)]

    final = flat(states.last_hidden_state, target_where)  # [M, d_P]
    mistake = discrepancy(head, final, target_labels.to(final.device), top_k)
    spans = [len(positions) for positions in kept]

    def column(tensor: torch.Tensor | None) -> tuple[torch.Tensor, list[int]]:
        if tensor is None:
            return final.new_empty(0, final.shape[-1]), [0] * len(kept)
        return flat(tensor, where), spans  # [N, d_P]

    if has_encoder and states.input_ids is None:
        raise ValueError(
            "The Pilot's decoder was given embeddings, not token ids (decoder_inputs_embeds, prompt tuning of its "
            "decoder): the Mistake Log needs the ids. Use LoRA or full fine-tuning."
        )
    if has_encoder:
        input_ids = flat(states.input_ids, where)  # [N]
        embeddings, embedding_spans = encoder_outputs(states, [document.row for document in documents])
    else:
        input_ids = inputs["input_ids"].cpu().flatten()[where]  # [N]
        embeddings, embedding_spans = column(states.embeddings)
        if len(embeddings) and embedding.gives(embeddings, input_ids):
            embeddings, embedding_spans = column(None)
    hidden_states, hidden_spans = column(states.hidden_states)
    columns = {
        "input_ids": (input_ids, spans),
        "embeddings": (embeddings.to(dtype=dtype), embedding_spans),
        "hidden_states": (hidden_states.to(dtype=dtype), hidden_spans),
        "final_states": (final.to(dtype=dtype), None),
        "labels": (target_labels, None),
        "indices": (mistake.indices.int(), None),
        "values": (mistake.values, None),
        "dropped": (mistake.dropped, None),
        "positions": (torch.cat(target_lists), None),
    }
    device = device or final.device
    counts = [len(targets) for targets in target_lists]
    finite = [bool(rows.all()) for rows in mistake.values.isfinite().all(-1).cpu().split(counts)]
    split = {name: tensor.to(device).split(sizes or counts) for name, (tensor, sizes) in columns.items()}
    records = [MistakeRecord(**dict(zip(split, row, strict=True))) for row in zip(*split.values(), strict=True)]
    return [record for record, is_finite in zip(records, finite, strict=True) if is_finite]


def encoder_outputs(states: PilotStates, rows: list[int]) -> tuple[torch.Tensor, list[int]]:
    """X̃ of some rows without padding, one after the other `[N, d_P]`, and the length of each."""
    outputs, mask = states.embeddings[rows], states.encoder_attention_mask
    visible = torch.ones(outputs.shape[:2], dtype=torch.bool) if mask is None else mask[rows] != 0  # [R, S]
    return outputs[visible.to(outputs.device)], visible.sum(1).tolist()


def group_by_length(
    records: list[MistakeRecord], max_positions: int, has_encoder: bool = False
) -> list[list[MistakeRecord]]:
    """Split into groups of like length (of decoder and encoder together), whose padded size (rows x longest) stays
    within `max_positions`; a group that has `FULL` positions takes no record shorter than `LIKE` of its longest, which
    would be padding for the most part."""

    def length(record: MistakeRecord) -> int:
        return len(record.input_ids) + (len(record.embeddings) if has_encoder else 0)

    def takes(group: list[MistakeRecord], record: MistakeRecord) -> bool:
        longest = length(group[0])
        padded = len(group) * longest
        is_like = padded < FULL or length(record) >= LIKE * longest
        return is_like and padded + longest <= max_positions

    groups: list[list[MistakeRecord]] = []
    for record in sorted(records, key=lambda record: -length(record)):
        if groups and takes(groups[-1], record):
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
        records: list[MistakeRecord],
        embedding: PilotEmbedding,
        config: CopilotConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> CopilotBatch:
        """Pad the records; queries of different runs do not see each other, prompts are memory alone."""

        def pad(tensors: list[torch.Tensor], value: float = 0) -> torch.Tensor:
            return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

        def cat(name: str) -> torch.Tensor:
            return torch.cat([getattr(record, name) for record in records]).to(device)

        def mask(tensors: list[torch.Tensor]) -> torch.Tensor:
            return pad([torch.ones(len(tensor), dtype=torch.bool) for tensor in tensors])

        def memory() -> torch.Tensor:
            if not config.reads_states:
                return pad([record.input_ids for record in records])  # [B, n]
            known = [r.embeddings if len(r.embeddings) else embedding(r.input_ids) for r in records]
            embeddings = pad(known).to(dtype)  # [B, n, d_P], or [B, S, d_P]
            hidden_states = pad([record.hidden_states for record in records]).to(dtype)  # [B, n, d_P]
            if has_encoder:
                return torch.cat([embeddings, hidden_states], dim=1)  # [B, S + n, d_P]
            return interleave(embeddings, hidden_states)  # [B, 2n, d_P]

        has_encoder = config.pilot_is_encoder_decoder
        length = max(len(record.input_ids) for record in records)
        is_start = pad([record.is_start for record in records])  # [B, m]
        run = is_start.cumsum(1)  # [B, m]
        positions = pad([record.positions for record in records], length)  # [B, m]; padding sees all
        valid = positions < length
        visible = mask([record.input_ids for record in records])  # [B, n]
        indices = pad([record.indices for record in records]).long()  # [B, m, k + 1]
        values = pad([record.values for record in records])  # [B, m, k + 1]
        encoder_visible = mask([record.embeddings for record in records]) if has_encoder else None  # [B, S]
        same_run = run[:, :, None] == run[:, None, :]  # [B, m, m]
        inputs = {
            "input_indices": indices.roll(1, dims=1),  # ℓ of the target before; a start has none
            "input_values": values.roll(1, dims=1),
            "is_start": is_start,
            "memory": memory(),
            "memory_mask": memory_mask(config, positions, visible, encoder_visible),  # [B, m, entries of the memory]
            "self_mask": same_run.tril(),
            **rotary_positions(config, positions, visible.cumsum(1) - 1),
        }
        sequence = torch.cat([record.is_start for record in records]).cumsum(0) - 1  # [Q]
        target = SparseDiscrepancy(cat("indices").long(), cat("values"), cat("dropped"))
        return cls(
            inputs,
            valid,
            cat("final_states"),
            cat("labels"),
            target,
            sequence.to(device),
            int(sequence[-1]) + 1,
        )

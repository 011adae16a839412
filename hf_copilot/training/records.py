"""Documents, targets and runs: from a training batch to the records of the Mistake Log.

Position j is a target when the token that the Pilot predicts there carries a label: the token at j + 1 of the same
document, or, beside an encoder-decoder, the label at j. A contiguous stretch of targets is a run, the unit that one
`generate()` call produces; it starts from the learned start vector. Shapes: B rows of T positions in a batch; D
documents with a target, N positions of theirs (each up to its last target), M targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import torch

from ..model.discrepancy import SparseDiscrepancy, discrepancy
from ..pilot.head import PilotEmbedding, PilotHead
from ..pilot.inspect import is_encoder_decoder
from ..pilot.tap import PilotStates
from .mistake_log import MistakeRecord

IGNORE = -100


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
    if inputs.get("attention_mask") is not None:
        return _unpadded_stretches(inputs["attention_mask"])
    if inputs.get("position_ids") is not None:
        return _position_runs(inputs["position_ids"])
    return [Document(i, 0, length) for i in range(rows)]


def _unpadded_stretches(mask: torch.Tensor) -> list[Document]:
    if mask.ndim != 2:
        raise ValueError(
            f"The Mistake Log reads documents from a 2D attention_mask, this one has {mask.ndim} dimensions."
        )
    spans = [row.nonzero()[:, 0].tolist() for row in mask.cpu()]
    holes = [i for i, span in enumerate(spans) if span and len(span) != span[-1] + 1 - span[0]]
    if holes:
        raise ValueError(
            f"attention_mask has holes in rows {holes}: the Mistake Log reads a row's tokens as one document. Pad "
            "at the sides alone, or leave the mask out and begin position_ids anew in every document."
        )
    return [Document(i, span[0], span[-1] + 1) for i, span in enumerate(spans) if span]


def _position_runs(position_ids: torch.Tensor) -> list[Document]:
    documents = []
    for i, row in enumerate(position_ids.cpu()):
        starts = (row == 0).nonzero()[:, 0].tolist()
        if starts[:1] != [0]:
            raise ValueError(
                f"position_ids of row {i} begin at {int(row[0])}, and without an attention_mask a document begins "
                "where they are 0: begin them there, or pass a mask."
            )
        documents += [Document(i, *span) for span in zip(starts, [*starts[1:], len(row)], strict=True)]
    return documents


@dataclass
class Targets:
    """The documents of a batch that have a target, and where these lie in its flattened positions."""

    rows: list[int]  # D, of the batch
    spans: list[torch.Tensor]  # D x [n], positions up to the last target
    offsets: list[torch.Tensor]  # D x [m], targets, counted from the document's start
    where: torch.Tensor  # [M], the positions of the targets
    labels: torch.Tensor  # [M] int64
    shift: int  # the label of position j is at j + shift


def find_targets(inputs: Mapping[str, Any], has_encoder: bool) -> Targets | None:
    """The targets of a batch; None if it has none."""
    labels = inputs["labels"].cpu()  # [B, T]
    length, shift = labels.shape[1], 0 if has_encoder else 1
    rows, spans, offsets = [], [], []
    for row, start, end in find_documents(inputs, has_encoder):
        targets = (labels[row, start + shift : end] != IGNORE).nonzero()[:, 0]  # [m]
        if len(targets):
            rows.append(row)
            spans.append(torch.arange(int(targets[-1]) + 1) + row * length + start)  # [n]
            offsets.append(targets)
    if not rows:
        return None
    where = torch.cat([span[targets] for span, targets in zip(spans, offsets, strict=True)])  # [M]
    return Targets(rows, spans, offsets, where, labels.flatten()[where + shift], shift)


class Column(NamedTuple):
    """A field of all records, one after the other, and how much of it is each one's."""

    tensor: torch.Tensor  # [N or M, ...]
    sizes: list[int]  # D


def make_records(
    states: PilotStates,
    inputs: Mapping[str, Any],
    head: PilotHead,
    embedding: PilotEmbedding,
    top_k: int,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    note: Callable[[Targets, SparseDiscrepancy, Mapping[str, Any]], None] | None = None,
) -> list[MistakeRecord]:
    """One record for every document of a forward that has a target and a finite forward.

    Args:
        states: What the tap read; positions of virtual tokens (prompt tuning) are left out.
        inputs: The batch: `input_ids`, `labels` `[B, T]` (−100 where there is none), masks.
        head, embedding: The Pilot's, for ℓ, and to leave X̃ out of the records where the ids give it.
        top_k: Entries of p̂ kept in ℓ.
        dtype, device: Of the hidden states and of all tensors in the records; None keeps the Pilot's.
        note: Told of the targets and their ℓ, before these are copied to `device`.
    """
    targets = find_targets(inputs, is_encoder_decoder(head.pilot))
    if targets is None:
        return []
    final = _at(targets.where, states.last_hidden_state, inputs)  # [M, d_P]
    mistake = discrepancy(head, final, targets.labels.to(final.device), top_k)
    if note is not None:
        note(targets, mistake, inputs)
    counts = [len(offsets) for offsets in targets.offsets]
    of_targets = {
        "positions": torch.cat(targets.offsets),
        "labels": targets.labels,
        "final_states": final.to(dtype=dtype),
    } | mistake._replace(indices=mistake.indices.int())._asdict()
    columns = {name: Column(tensor, counts) for name, tensor in of_targets.items()}
    columns |= _context(states, inputs, targets, embedding, dtype)
    parts = [column.tensor.to(device or final.device).split(column.sizes) for column in columns.values()]
    finite = mistake.values.isfinite().all(-1).cpu().split(counts)  # D x [m]
    rows = compress(zip(*parts, strict=True), (bool(is_finite.all()) for is_finite in finite))
    return [MistakeRecord(**dict(zip(columns, row, strict=True))) for row in rows]


def _at(positions: torch.Tensor, tensor: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Some flattened positions of the batch's T, the last ones of `tensor` `[B, T or more, ...]`."""
    length = inputs["labels"].shape[1]
    return tensor[:, -length:].flatten(0, 1)[positions.to(tensor.device)]


def _context(
    states: PilotStates,
    inputs: Mapping[str, Any],
    targets: Targets,
    embedding: PilotEmbedding,
    dtype: torch.dtype | None,
) -> dict[str, Column]:
    """What records hold of all positions and not of targets alone: ids, X̃ and h."""
    where, sizes = torch.cat(targets.spans), [len(span) for span in targets.spans]  # [N]
    none = Column(states.last_hidden_state.new_empty(0, states.last_hidden_state.shape[-1]), [0] * len(sizes))

    def column(tensor: torch.Tensor | None) -> Column:
        return none if tensor is None else Column(_at(where, tensor, inputs), sizes)  # [N, d_P]

    if states.encoder_length is not None:
        input_ids = _at(where, _decoder_ids(states), inputs)  # [N]
        embeddings = encoder_outputs(states, targets.rows)
    else:
        input_ids = inputs["input_ids"].cpu().flatten()[where]  # [N]
        embeddings = column(states.embeddings)
        if len(embeddings.tensor) and embedding.gives(embeddings.tensor, input_ids):
            embeddings = none
    hidden_states = column(states.hidden_states)
    return {
        "input_ids": Column(input_ids, sizes),
        "embeddings": Column(embeddings.tensor.to(dtype=dtype), embeddings.sizes),
        "hidden_states": Column(hidden_states.tensor.to(dtype=dtype), hidden_states.sizes),
    }


def _decoder_ids(states: PilotStates) -> torch.Tensor:
    """`[B, T]`, what an encoder-decoder's decoder read."""
    if states.input_ids is None:
        raise ValueError(
            "The Pilot's decoder was given embeddings, not token ids (decoder_inputs_embeds, prompt tuning of its "
            "decoder): the Mistake Log needs the ids. Use LoRA or full fine-tuning."
        )
    return states.input_ids


def encoder_outputs(states: PilotStates, rows: list[int]) -> Column:
    """X̃ of some rows without padding."""
    outputs, mask = states.embeddings[rows], states.encoder_attention_mask
    visible = torch.ones(outputs.shape[:2], dtype=torch.bool) if mask is None else mask[rows] != 0  # [R, S]
    return Column(outputs[visible.to(outputs.device)], visible.sum(1).tolist())


def random_start(record: MistakeRecord, generator: torch.Generator, has_encoder: bool) -> MistakeRecord:
    """Where the run is the whole document (no prompt, no encoder that holds it), start it at a random target, so that
    training looks like continuing a prompt; what comes before is memory only."""
    if record.positions[0] != 0 or has_encoder:
        return record
    return record.starting_at(int(torch.randint(len(record.positions), (), generator=generator)))

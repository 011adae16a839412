"""Documents, targets and runs: from a training batch to the records of the Mistake Log.

Position j is a target when the token that the Pilot predicts there carries a label: the token at j + 1 of the same
document, or, beside an encoder-decoder, the label at j. A contiguous stretch of targets is a run, the unit that one
`generate()` call produces; it starts from the learned start vector. Shapes: B rows of T positions in a batch; D
documents with a target, N positions of theirs (each up to its last target), M targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..model.discrepancy import SparseDiscrepancy, discrepancy
from ..pilot.head import PilotEmbedding, PilotHead
from ..pilot.inspect import is_encoder_decoder
from ..pilot.tap import PilotStates
from .mistake_log import MistakeRecord
from .ragged import Ragged
from .transfer import Transfer, to_device

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
        ValueError: If the batch has no `input_ids`, a mask of another form or with holes in a row, positions that do
            not begin at 0, or borders of documents in another form than these.
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
        return _position_runs(inputs["position_ids"].expand(rows, -1))  # one row of them holds for all
    if inputs.get("cu_seq_lens_q") is not None or inputs.get("seq_idx") is not None:
        raise ValueError(
            "The batch says by cu_seq_lens_q or seq_idx alone where documents begin: give it position_ids too, as "
            "DataCollatorWithFlattening(return_position_ids=True) does."
        )
    return [Document(i, 0, length) for i in range(rows)]


def _unpadded_stretches(mask: torch.Tensor) -> list[Document]:
    if mask.ndim != 2:
        raise ValueError(
            f"The Mistake Log reads documents from a 2D attention_mask, this one has {mask.ndim} dimensions."
        )
    is_token = mask.cpu() != 0  # [B, T]
    starts = is_token.int().argmax(1)  # [B], the first of equals
    ends = is_token.shape[1] - is_token.flip(1).int().argmax(1)  # [B]
    spans = torch.stack([starts, ends, is_token.sum(1)]).T.tolist()  # B x [3]
    holes = [i for i, (start, end, count) in enumerate(spans) if 0 < count < end - start]
    if holes:
        raise ValueError(
            f"attention_mask has holes in rows {holes}: the Mistake Log reads a row's tokens as one document. Pad "
            "at the sides alone, or leave the mask out and begin position_ids anew in every document."
        )
    return [Document(i, start, end) for i, (start, end, count) in enumerate(spans) if count]


def _position_runs(position_ids: torch.Tensor) -> list[Document]:
    positions = position_ids.cpu()  # [B, T]
    for i, first in enumerate(positions[:, 0].tolist()):
        if first != 0:
            raise ValueError(
                f"position_ids of row {i} begin at {first}, and without an attention_mask a document begins where "
                "they are 0: begin them there, or pass a mask."
            )
    starts, length = (positions == 0).nonzero().tolist(), positions.shape[1]  # D x [row, position]
    nexts = [*starts[1:], (None, None)]
    return [
        Document(row, start, end if row == next_row else length)
        for (row, start), (next_row, end) in zip(starts, nexts, strict=True)
    ]


@dataclass
class Targets:
    """The D documents of a batch that have a target, and where M targets and N positions lie in its flattened ones."""

    rows: list[int]  # D, of the batch
    lengths: list[int]  # D, positions up to the last target
    counts: list[int]  # D, targets
    context: torch.Tensor  # [N], the positions
    where: torch.Tensor  # [M], the positions of the targets
    positions: torch.Tensor  # [M], likewise, counted from the document's start
    labels: torch.Tensor  # [M] int64
    shift: int  # the label of position j is at j + shift


def find_targets(inputs: Mapping[str, Any], has_encoder: bool) -> Targets | None:
    """The targets of a batch; None if it has none. `shift_labels` `[B, T]` are labels of the positions that predict
    them, as in transformers; where a batch has these, its `labels` are not read."""
    is_shifted = inputs.get("shift_labels") is not None
    labels = inputs["shift_labels" if is_shifted else "labels"].cpu()  # [B, T]
    length, shift = labels.shape[1], 0 if has_encoder or is_shifted else 1  # the label of position j is at j + shift
    documents = find_documents(inputs, has_encoder)
    if not documents:
        return None
    starts = torch.tensor([document.row * length + document.start for document in documents])  # [D]
    ends = torch.tensor([document.row * length + document.end for document in documents])  # [D]
    where = (labels.flatten() != IGNORE).nonzero()[:, 0] - shift  # [M]
    document = torch.searchsorted(starts, where, right=True) - 1  # [M], the last one that starts before it
    is_inside = (document >= 0) & (where + shift < ends[document])  # a label of padding, or of a first token, is none
    where, document = where[is_inside], document[is_inside]
    if not len(where):
        return None
    document, counts = document.unique_consecutive(return_counts=True)  # [D] twice, of those that have a target
    starts, last = starts[document], where[counts.cumsum(0) - 1]  # [D] twice
    lengths = (last + 1 - starts).tolist()
    tokens = Ragged.of(lengths)
    return Targets(
        rows=[documents[i].row for i in document.tolist()],
        lengths=lengths,
        counts=counts.tolist(),
        context=starts[tokens.rows] + tokens.columns,
        where=where,
        positions=where - starts.repeat_interleave(counts),
        labels=labels.flatten()[where + shift],
        shift=shift,
    )


class Column(NamedTuple):
    """A field of all records, one after the other, and how much of it is each one's."""

    tensor: torch.Tensor  # [N or M, ...]
    sizes: list[int]  # D


READ = ("input_ids", "labels", "shift_labels", "attention_mask", "position_ids")  # of a batch, on the CPU


def send_inputs(inputs: Mapping[str, Any]) -> Transfer:
    """Begin to copy to the CPU what [`begin_records`] reads of a batch there."""
    read = {name: inputs.get(name) for name in READ}
    return Transfer({name: tensor for name, tensor in read.items() if isinstance(tensor, torch.Tensor)})


@dataclass
class PendingRecords:
    """The records of one forward, whose tensors may be on their way to where they are kept."""

    transfer: Transfer  # of the fields, of `is_finite` [M] and, where X̃ is held back, `is_given` [] bool
    sizes: dict[str, list[int]]  # of every field, how much of it is each document's
    counts: list[int]  # D, targets
    held_back: Column | None  # X̃, which is in the records only if the ids do not give it

    @cached_property
    def records(self) -> list[MistakeRecord]:
        """One for every document whose forward is finite; they are waited for."""
        if not self.counts:
            return []
        fields = dict(self.transfer.arrived())
        bad = set(Ragged.of(self.counts).rows[~fields.pop("is_finite").cpu()].tolist())
        if self.held_back is not None:
            is_given, (tensor, sizes), device = fields.pop("is_given"), self.held_back, fields["labels"].device
            none = tensor.new_empty(0, tensor.shape[-1], device=device)
            fields["embeddings"] = none if is_given else tensor.to(device)
            self.sizes["embeddings"] = [0] * len(sizes) if is_given else sizes
        parts = [tensor.split(self.sizes[name]) for name, tensor in fields.items()]
        rows = (row for i, row in enumerate(zip(*parts, strict=True)) if i not in bad)
        return [MistakeRecord(**dict(zip(fields, row, strict=True))) for row in rows]


def begin_records(
    states: PilotStates,
    inputs: Mapping[str, Any],
    sent: Transfer,
    head: PilotHead,
    embedding: PilotEmbedding,
    top_k: int,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    note: Callable[[Targets, SparseDiscrepancy, Mapping[str, Any]], None] | None = None,
) -> PendingRecords:
    """Begin the records of a forward's documents that have a target: nothing waits for the Pilot's device, but for an
    encoder's mask.

    Args:
        states: What the tap read; positions of virtual tokens (prompt tuning) are left out.
        inputs: The batch: `input_ids`, `labels` `[B, T]` (−100 where there is none), masks.
        sent: From [`send_inputs`], before the forward.
        head, embedding: The Pilot's, for ℓ, and to leave X̃ out of the records where the ids give it.
        top_k: Entries of p̂ kept in ℓ.
        dtype, device: Of the hidden states and of all tensors in the records; None keeps the Pilot's.
        note: Told of the targets and their ℓ, before these are copied to `device`.
    """
    here = {**inputs, **sent.arrived()}
    targets = find_targets(here, is_encoder_decoder(head.pilot))
    if targets is None:
        return PendingRecords(Transfer({}), {}, [], None)
    final = _at(targets.where, states.last_hidden_state, here)  # [M, d_P]
    mistake = discrepancy(head, final, to_device(targets.labels, final.device), top_k)
    if note is not None:
        note(targets, mistake, inputs)
    context, is_given = _context(states, here, inputs.get("input_ids"), targets, embedding, dtype)
    columns = _at_targets(targets, final, mistake, dtype) | context
    held_back = None if is_given is None else columns.pop("embeddings")
    flags = {"is_finite": mistake.values.isfinite().all(-1)} | ({} if is_given is None else {"is_given": is_given})
    tensors = {name: column.tensor for name, column in columns.items()} | flags
    sizes = {name: column.sizes for name, column in columns.items()}
    return PendingRecords(Transfer(tensors, device or final.device), sizes, targets.counts, held_back)


def _at(positions: torch.Tensor, tensor: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Some flattened positions of the batch's T, the last ones of `tensor` `[B, T or more, ...]`."""
    length = inputs["labels"].shape[1]
    return tensor[:, -length:].flatten(0, 1)[to_device(positions, tensor.device)]


def _at_targets(
    targets: Targets, final: torch.Tensor, mistake: SparseDiscrepancy, dtype: torch.dtype | None
) -> dict[str, Column]:
    """What records hold of targets: the Pilot's last state `[M, d_P]` and ℓ."""
    tensors = {"positions": targets.positions, "labels": targets.labels, "final_states": final.to(dtype=dtype)}
    tensors |= mistake._replace(indices=mistake.indices.int())._asdict()
    return {name: Column(tensor, targets.counts) for name, tensor in tensors.items()}


def _context(
    states: PilotStates,
    inputs: Mapping[str, Any],
    input_ids: torch.Tensor,
    targets: Targets,
    embedding: PilotEmbedding,
    dtype: torch.dtype | None,
) -> tuple[dict[str, Column], torch.Tensor | None]:
    """What records hold of all positions and not of targets alone: ids, X̃ and h; and whether the ids, as the batch
    has them where the Pilot is, give this X̃, see [`PilotEmbedding.gives`]."""
    where, sizes, is_given = targets.context, targets.lengths, None  # [N], D
    none = Column(states.last_hidden_state.new_empty(0, states.last_hidden_state.shape[-1]), [0] * len(sizes))

    def column(tensor: torch.Tensor | None) -> Column:
        return none if tensor is None else Column(_at(where, tensor, inputs), sizes)  # [N, d_P]

    if states.encoder_length is not None:
        read, embeddings = _at(where, _decoder_ids(states), inputs), encoder_outputs(states, targets.rows)
    else:
        read, embeddings = inputs["input_ids"].flatten()[where], column(states.embeddings)  # [N], [N, d_P]
        if states.embeddings is not None:
            is_given = embedding.gives(embeddings.tensor, _at(where, input_ids, inputs))
    hidden_states = column(states.hidden_states)
    columns = {
        "input_ids": Column(read, sizes),
        "embeddings": Column(embeddings.tensor.to(dtype=dtype), embeddings.sizes),
        "hidden_states": Column(hidden_states.tensor.to(dtype=dtype), hidden_states.sizes),
    }
    return columns, is_given


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
    """Where nothing stands before the first target's token (no prompt, no encoder that holds it), start at a random
    target, so that training looks like continuing a prompt; what comes before is memory only."""
    if record.has_prompt or has_encoder:
        return record
    return record.starting_at(int(torch.randint(len(record.positions), (), generator=generator)))

"""One teacher-forced pass of Pilot and Copilot over labelled rows: what training minimises and what scoring measures.

Shapes: B rows, Q queries (targets) of a batch, c of them in a chunk, s strengths λ, V vocabulary, e the width of the
Copilot's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from ..model.compiled import CompiledDecode
from ..model.configuration_copilot import check_strength
from ..model.discrepancy import cross_entropy_loss, fuse, rmse_loss, row_chunks
from ..model.modeling_copilot import CopilotModel, CopilotOutput, Vocabulary
from ..pilot.compatibility import check_teacher_forced
from ..pilot.head import PilotEmbedding, PilotHead
from ..pilot.inspect import eval_mode, without_logits
from ..pilot.tap import PilotStates, PilotTap
from ..pilot.vocabulary import lent_vocabulary
from .batch import Collator, CopilotBatch, full_positions, group_by_length
from .mistake_log import MistakeRecord
from .ragged import Ragged, exact, powers_of_two
from .records import IGNORE, PendingRecords, begin_records, send_inputs


class TeacherForced:
    """The records of a Pilot's forward, the Copilot's f at their targets, and its loss.

        with TeacherForced(copilot, pilot) as forced:
            with forced.watch(inputs):
                pilot(**inputs)
            for batch in forced.batches(forced.records(inputs)):
                for rows, logits, correction in forced.corrections(batch):
                    ...

    Args:
        copilot: Moved to the device of the Pilot's head.
        pilot: Wrapped or not; it is only read.
        autocast_dtype: Runs the Copilot under autocast in this type; None for its own.
        compile_backend: Compiles the Copilot's blocks with this backend of `torch.compile`; None does not.

    Raises:
        ValueError, NotImplementedError: If the two do not fit; see [`check_teacher_forced`].
    """

    def __init__(
        self,
        copilot: CopilotModel,
        pilot: nn.Module,
        autocast_dtype: torch.dtype | None = None,
        compile_backend: str | None = None,
    ):
        check_teacher_forced(copilot, pilot)
        self.head, self.embedding = PilotHead(pilot), PilotEmbedding(pilot)
        self.device = self.head.device
        self.copilot, self.autocast_dtype = copilot.to(self.device), autocast_dtype
        self.compiled = CompiledDecode(copilot, compile_backend) if compile_backend else None
        self._listening, self._caught = False, None
        self.tap = PilotTap(pilot, copilot.config, self._catch, lambda: self._listening)

    def __enter__(self) -> TeacherForced:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks from the Pilot; the next [`watch`] puts them back."""
        self.tap.close()

    def follow_pilot(self) -> None:
        """Move the Copilot to where the Pilot is now: FSDP and full evaluation in half precision move it late."""
        if self.device != self.head.device:
            self.device = self.head.device
            self.copilot.to(self.device)

    # ---- the Pilot -------------------------------------------------------------------------------------------------

    @contextmanager
    def watch(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Read the first forward of the Pilot inside the block.

        Raises:
            ValueError: If there are no labels, or the Pilot's decoder does not run inside the block.
        """
        if inputs.get("labels") is None:
            raise ValueError("The Mistake Log needs the `labels` of the batch that the Pilot is given.")
        self.tap.open()
        self._sent = send_inputs(inputs)  # while the device still does what came before
        self._caught, self._listening = None, True
        try:
            yield
        finally:
            self._listening = False
        if self._caught is None:
            raise ValueError("The Pilot's decoder did not run inside the block: is it the Pilot of this learner?")
        self.follow_pilot()

    def _catch(self, states: PilotStates) -> None:
        self._caught, self._listening = states, False

    @property
    def positions(self) -> int:
        """Those of the forward that [`watch`] has read, padding included."""
        return self._caught.positions

    def begin_records(self, inputs: Mapping[str, Any], *options: Any) -> PendingRecords:
        """[`begin_records`] of the forward that [`watch`] has read, with its last arguments. Of a sharded Pilot inside
        `head.gathered()`."""
        states, self._caught = self._caught, None
        of_pilot = self.head, self.embedding, self.copilot.config.top_k
        with self.autocast():
            return begin_records(states, inputs, self._sent, *of_pilot, *options)

    def records(self, inputs: Mapping[str, Any]) -> list[MistakeRecord]:
        """Likewise, on the Pilot's device and done."""
        return self.begin_records(inputs).records

    def read(self, inputs: Mapping[str, Any], forward: Callable[[], Any]) -> list[MistakeRecord]:
        """The records of one forward."""
        with self.watch(inputs):
            forward()
        with self.head.gathered():
            return self.records(inputs)

    # ---- the Copilot -----------------------------------------------------------------------------------------------

    def batches(self, records: Sequence[MistakeRecord], max_positions: float = math.inf) -> Iterator[CopilotBatch]:
        """The records, padded, in groups of like length with at most `max_positions`."""
        full, has_encoder = full_positions(self.device), self.copilot.config.pilot_is_encoder_decoder
        for group in group_by_length(records, max_positions, full, has_encoder):
            yield self.collate(group)

    def collate(self, records: Sequence[MistakeRecord]) -> CopilotBatch:
        """All records in one batch, in their order."""
        dtype = self.copilot.norm.weight.dtype
        shape = powers_of_two if self.has_graphs else exact
        return Collator(self.embedding, self.copilot.config, self.device, dtype, shape)(records)

    @property
    def lent(self) -> Vocabulary | None:
        """The Pilot's matrices as they are now, where the Copilot uses them."""
        uses_them = self.copilot.config.vocab_projection == "pilot"
        return lent_vocabulary(self.head.pilot, self.device) if uses_them else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def forward(self, batch: CopilotBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """What f = W h is made of at the batch's queries: h `[Q, e]`, in the type of its matrix products, and W
        `[V, e]`."""
        lent = self.lent
        hidden = self.run(**batch.inputs, lent=lent).last_hidden_state[batch.queries]  # [Q, e]
        weight = self.copilot.vocabulary(lent).head  # [V, e]
        return hidden.to(self.autocast_dtype or weight.dtype), weight

    def run(self, **inputs: Any) -> CopilotOutput:
        """[`CopilotModel.forward`], compiled or not."""
        return self.copilot(**inputs, decode=self.compiled)

    @property
    def has_graphs(self) -> bool:
        """Whether CUDA graphs are recorded; see [`CompiledDecode`]."""
        return self.compiled is not None and self.compiled.has_graphs

    def give_up_compiling(self, error: Exception) -> None:
        """After an error in the backward pass; raises it where nothing was compiled."""
        if self.compiled is None:
            raise error
        self.compiled.give_up(error)

    def loss(self, batch: CopilotBatch) -> torch.Tensor:
        """The objective, summed: over positions (cross-entropy) or over sequences (RMSE, Eq. 7)."""
        hidden, weight = self.forward(batch)  # [Q, e], [V, e]
        if self.copilot.config.objective == "rmse":
            return rmse_loss(hidden, weight, batch.target, batch.sequence, batch.num_sequences)
        return cross_entropy_loss(hidden, weight, lambda rows: self.head(batch.final_states[rows]), batch.labels)

    def corrections(self, batch: CopilotBatch) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Chunks of the batch's queries: which, the Pilot's logits z and the correction f, each `[c, V]` float32."""
        with torch.no_grad(), self.autocast():
            hidden, weight = self.forward(batch)  # [Q, e], [V, e]
            weight = weight.to(hidden.dtype)
        for rows in row_chunks(len(hidden), len(weight)):
            with torch.no_grad(), self.autocast():
                chunk = rows, self.head(batch.final_states[rows]), (hidden[rows] @ weight.T).float()
            yield chunk

    # ---- both ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        rows: Sequence[Mapping[str, Any]],
        strengths: Sequence[float],
        batch_size: int = 16,
        title: str | None = None,
    ) -> list[RowScore]:
        """[`score`], by this pass; with a title it shows a progress bar."""

        def figures(logits: torch.Tensor, correction: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
            of_labels = label_figures(logits, correction, labels, strengths, self.copilot.config.fusion)  # [2, s, c]
            return [of_labels.permute(2, 0, 1)]  # [c, 2, s]

        found = self.measured(rows, figures, batch_size, title)
        likelihoods_and_hits = [of_row.permute(1, 2, 0) for (of_row,) in found]  # [2, s, m]
        return [RowScore(likelihoods, hits.bool()) for likelihoods, hits in likelihoods_and_hits]

    @torch.no_grad()
    def measured(
        self, rows: Sequence[Mapping[str, Any]], measure: Measure, batch_size: int = 16, title: str | None = None
    ) -> list[tuple[torch.Tensor, ...]]:
        """For each row, without padding, what `measure` gives at its m labelled tokens: tensors `[m, ...]` on the CPU.
        Both models are in eval mode. Raises a `ValueError` as [`check_labelled_rows`], where a forward is not finite,
        a row is longer than the Pilot can read, or the Pilot's logits are not its head's."""
        check_labelled_rows(rows, self.copilot.config.pilot_is_encoder_decoder)
        self.head.check()
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
        found: dict[int, tuple[torch.Tensor, ...]] = {}
        with eval_mode(self.head.trained), eval_mode(self.copilot):
            for start in tqdm(range(0, len(order), batch_size), desc=title, disable=title is None):
                picked = order[start : start + batch_size]
                try:
                    found |= zip(picked, _measure_batch(self, [rows[i] for i in picked], measure), strict=True)
                except IndexError as error:  # of learned positions or ids, on a CPU
                    longest = len(rows[picked[0]]["input_ids"])
                    raise ValueError(
                        f"The Pilot can't read {longest} tokens: cut row {picked[0]}, or look there for ids that are "
                        "not its tokenizer's."
                    ) from error
        return [found[i] for i in range(len(rows))]


# the Pilot's z and the Copilot's f `[c, V]` float32 and the labels `[c]` to tensors `[c, ...]`
Measure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]


class RowScore(NamedTuple):
    """The m labelled tokens of one row at s strengths."""

    log_likelihoods: torch.Tensor  # [s, m] float32, log p̃ of the labels, in nats
    is_likeliest: torch.Tensor  # [s, m] bool, whether the label is the fused distribution's first choice


def score(
    pilot: nn.Module,
    copilot: CopilotModel,
    rows: Sequence[Mapping[str, Any]],
    strengths: Sequence[float] | None = None,
    batch_size: int = 16,
) -> list[RowScore]:
    """Likelihoods of labelled tokens by the Pilot and by Pilot + Copilot, teacher-forced.

        before, after = score(pilot, copilot, [{"input_ids": ids, "labels": labels}])[0].log_likelihoods.sum(1)

    Both models are run in eval mode, the Copilot on the device of the Pilot's head.

    Args:
        pilot: A causal LM or an encoder-decoder, wrapped or not.
        rows: `input_ids` and `labels` (−100 where there is none) of each, without padding, as for the Pilot's own
            loss. A token without one before it has no likelihood, and is left out.
        strengths: λ; by default 0, the Pilot alone, and the Copilot's own.
        batch_size: Rows in one forward.

    Returns:
        One [`RowScore`] for each row, on the CPU.

    Raises:
        ValueError: If the Copilot does not fit the Pilot, a λ is negative or not finite, a row is empty or its labels
            have another length than its tokens or is longer than the Pilot can read, a forward is not finite, or the
            Pilot's logits can't be recomputed.
        NotImplementedError: For a Pilot that is sharded, offloaded at its head, or no language model of one piece.
    """
    chosen = [0.0, copilot.config.strength] if strengths is None else [check_strength(s) for s in strengths]
    with TeacherForced(copilot, pilot) as forced:
        return forced.score(rows, chosen, batch_size)


def check_labelled_rows(rows: Sequence[Mapping[str, Any]], is_encoder_decoder: bool) -> None:
    """Raise a `ValueError` for a row that can't be read: without tokens and labels, or with other labels than its
    tokens have."""
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or not {"input_ids", "labels"} <= row.keys():
            raise ValueError(f"Row {i} has no input_ids and labels (−100 where there is none): tokenize them first.")
        sizes = len(row["input_ids"]), len(row["labels"])
        if not all(sizes) or (sizes[0] != sizes[1] and not is_encoder_decoder):
            raise ValueError(f"Row {i} has {sizes[0]} tokens and {sizes[1]} labels, which can't be scored.")


def _measure_batch(
    forced: TeacherForced, rows: Sequence[Mapping[str, Any]], measure: Measure
) -> Iterator[tuple[torch.Tensor, ...]]:
    config, pilot = forced.copilot.config, forced.head.trained
    inputs = padded(rows, pilot.get_input_embeddings().weight.device)
    if not config.pilot_is_encoder_decoder:
        inputs = _without_last_token(inputs)
    counts = (inputs.get("shift_labels", inputs["labels"]) != IGNORE).sum(1).tolist()
    records = forced.read(inputs, lambda: pilot(**without_logits(pilot, inputs))) if any(counts) else []
    if len(records) != sum(count > 0 for count in counts):
        raise ValueError("The Pilot's forward on a row is not finite, so it can't be scored.")
    nothing = torch.empty(0, config.vocab_size)
    parts = [measure(nothing, nothing, torch.empty(0, dtype=torch.int64))]  # tells the shapes
    with forced.head.gathered():
        for batch in [forced.collate(records)] if records else []:
            for queries, logits, correction in forced.corrections(batch):
                parts.append([x.cpu() for x in measure(logits, correction, batch.labels[queries])])
    columns = [torch.cat(column).split(counts) for column in zip(*parts, strict=True)]  # B x [m, ...] each
    return zip(*columns, strict=True)


def label_figures(
    logits: torch.Tensor, correction: torch.Tensor, labels: torch.Tensor, strengths: Sequence[float], fusion: str
) -> torch.Tensor:
    """log p̃ of the labels `[c]` (nats), and 1 where they are the likeliest, at every λ: `[2, s, c]` float32, from the
    Pilot's z and the Copilot's f, `[c, V]` float32 (Eq. 8, see [`fuse`]). One `[c, V]` buffer for one λ at a time."""
    pilot, figures = logits.log_softmax(-1), []  # [c, V]
    for strength in strengths:
        fused = fuse(pilot, correction, strength, fusion)  # [c, V]
        likelihoods = fused.gather(-1, labels[:, None])[:, 0]  # [c]
        figures.append(torch.stack([likelihoods, (fused.argmax(-1) == labels).float()]))
    return torch.stack(figures, dim=1)


def padded(rows: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """Rows as a batch, padded on the right."""
    ids, labels = ([torch.as_tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    tokens, targets = (Ragged.of([len(row) for row in column]) for column in (ids, labels))
    inputs = {
        "input_ids": tokens.pad(torch.cat(ids)),
        "attention_mask": tokens.pad(torch.ones_like(tokens.rows)),
        "labels": targets.pad(torch.cat(labels), IGNORE),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _without_last_token(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch for a decoder, whose last token is only predicted: it may be one more than the Pilot has positions."""
    shorter = {name: tensor[:, :-1] for name, tensor in inputs.items()}  # [B, T - 1]
    return shorter | {"shift_labels": inputs["labels"][:, 1:]}  # [B, T - 1]

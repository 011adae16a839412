"""What else a Copilot could read than the library feeds it: learners with another teacher-forced pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from hf_copilot import CopilotLearner, CopilotModel
from hf_copilot.model.attention import NOWHERE
from hf_copilot.model.discrepancy import SparseDiscrepancy
from hf_copilot.model.modeling_copilot import CopilotOutput
from hf_copilot.training.batch import CopilotBatch
from hf_copilot.training.mistake_log import MistakeRecord
from hf_copilot.training.records import IGNORE, PendingRecords
from hf_copilot.training.teacher_forced import TeacherForced

PROMPT = -1.0
SHARE = 0.5  # of the inputs that scheduled feeding predicts


class XTildeAlone(TeacherForced):
    """X̃ and ℓ are read, h is not: no query sees the odd entries of the memory."""

    def collate(self, records: Sequence[MistakeRecord]) -> CopilotBatch:
        batch = super().collate(records)
        batch.inputs["memory_mask"].places[:, 1::2] = NOWHERE  # of [B, 2n]
        return batch


@dataclass
class WithPromptsMarked:
    """Records whose positions in prompts are marked by a `dropped` of `PROMPT`."""

    pending: PendingRecords
    firsts: list[int]  # of every document, the position of its first label

    @cached_property
    def records(self) -> list[MistakeRecord]:
        # not from position 0, where the learner would draw a start at random
        records = [record.starting_at(1) for record in self.pending.records]
        for record, first in zip(records, self.firsts, strict=True):
            record.dropped = record.dropped.masked_fill(record.positions < first, PROMPT)
        return records


class WithPrompts(TeacherForced):
    """The Copilot runs over the prompt too and reads its discrepancies; only completions are learnt and measured."""

    @contextmanager
    def watch(self, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
        ids, is_token = inputs["input_ids"], inputs["attention_mask"] != 0  # [B, T] each
        labels = inputs.get("shift_labels")  # [B, T], of the token after each
        if labels is None:
            labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)
        following = F.pad(ids.masked_fill(~is_token, IGNORE)[:, 1:], (0, 1), value=IGNORE)  # [B, T]
        self.firsts = (labels != IGNORE).int().argmax(1).tolist()
        with super().watch({**inputs, "shift_labels": following.where(following != IGNORE, labels)}):
            yield

    def begin_records(self, inputs: dict[str, torch.Tensor], *options: Any) -> WithPromptsMarked:
        return WithPromptsMarked(super().begin_records(inputs, *options), self.firsts)

    def collate(self, records: Sequence[MistakeRecord]) -> CopilotBatch:
        """The batch with its queries in prompts read, but not asked for."""
        batch = super().collate(records)
        asked = batch.target.dropped != PROMPT  # [Q]
        return replace(
            batch,
            queries=tuple(index[asked] for index in batch.queries),
            final_states=batch.final_states[asked],
            labels=batch.labels[asked],
            target=SparseDiscrepancy(*(column[asked] for column in batch.target)),
            sequence=batch.sequence[asked],
        )


class ScheduledFeeding(TeacherForced):
    """In training a share of the inputs is the Copilot's own f before it, as `error_feedback="predicted"` has it in
    generation, instead of ℓ."""

    def run(self, **inputs: Any) -> CopilotOutput:
        return fed_by_itself(self.copilot, **inputs) if self.copilot.training else super().run(**inputs)


def fed_by_itself(copilot: CopilotModel, **inputs: Any) -> CopilotOutput:
    embedding = copilot.embed_tokens.weight  # [V, d]
    with torch.no_grad():
        f = copilot(**inputs, return_logits=True).logits  # [B, m, V]
    realized = copilot.embed(inputs["input_indices"], inputs["input_values"], inputs["is_start"], embedding)
    predicted = (f @ embedding).roll(1, dims=1)  # [B, m, d]
    if copilot.config.copilot_input == "both":
        predicted = predicted + embedding[inputs["input_indices"][..., -1]]
    picked = (torch.rand(f.shape[:2], device=f.device) < SHARE) & ~inputs["is_start"]  # [B, m]
    return copilot(**inputs, inputs_embeds=torch.where(picked[..., None], predicted, realized))


class WithoutHiddenStates(CopilotLearner):
    teacher_forced_class = XTildeAlone


class ReadingPrompts(CopilotLearner):
    teacher_forced_class = WithPrompts


class FedByItself(CopilotLearner):
    teacher_forced_class = ScheduledFeeding

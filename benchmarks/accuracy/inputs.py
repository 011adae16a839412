"""What else a Copilot could read than the library feeds it: changes to a learner before its first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hf_copilot import CopilotLearner, CopilotModel
from hf_copilot.model.discrepancy import SparseDiscrepancy
from hf_copilot.model.modeling_copilot import CopilotOutput
from hf_copilot.training.batch import IGNORE, CopilotBatch
from hf_copilot.training.mistake_log import MistakeRecord

NEVER = 10**6  # positions; a lag that hides every h
PROMPT = -1.0
SHARE = 0.5  # of the inputs that scheduled feeding predicts


def no_hidden_states(learner: CopilotLearner) -> None:
    """X̃ and ℓ are read, h is not."""
    learner.copilot.config.hidden_state_lag = NEVER


def prompts_too(learner: CopilotLearner) -> None:
    """The Copilot runs over the prompt as well and reads its discrepancies; only completions are learnt and measured.
    A position of a prompt is marked by a `dropped` of `PROMPT`."""
    learner._records = partial(_records_of_all, learner._records)
    learner.batches = partial(_completions_of, learner.batches)


def _records_of_all(make: Callable, inputs: dict[str, torch.Tensor], **kwargs: Any) -> list[MistakeRecord]:
    ids, labels = inputs["input_ids"], inputs["labels"]  # [B, T] each
    everything = ids.masked_fill(inputs["attention_mask"] == 0, IGNORE)
    firsts = (labels != IGNORE).int().argmax(1).tolist()
    # not from position 0, where the learner would draw a start at random
    records = [record.starting_at(1) for record in make({**inputs, "labels": everything}, **kwargs)]
    for record, first in zip(records, firsts, strict=True):
        record.dropped = record.dropped.masked_fill(record.positions < first - 1, PROMPT)
    return records


def _completions_of(batches: Callable, *args: Any, **kwargs: Any) -> Iterator[CopilotBatch]:
    for batch in batches(*args, **kwargs):
        yield completions(batch)


def completions(batch: CopilotBatch) -> CopilotBatch:
    """The batch with its queries in prompts read, but not asked for."""
    asked = batch.target.dropped != PROMPT  # [Q]
    valid = batch.valid.clone()
    valid[batch.valid] = asked
    return replace(
        batch,
        valid=valid,
        final_states=batch.final_states[asked],
        labels=batch.labels[asked],
        target=SparseDiscrepancy(*(column[asked] for column in batch.target)),
        sequence=batch.sequence[asked],
    )


def scheduled_feeding(learner: CopilotLearner) -> None:
    """In training a share of the inputs is the Copilot's own f before it, as `error_feedback="predicted"` has it in
    generation, instead of ℓ."""
    learner.forward = partial(_forward_fed, learner.copilot)


def _forward_fed(copilot: CopilotModel, **inputs: Any) -> CopilotOutput:
    if not copilot.training:
        return copilot(**inputs)
    embedding = copilot.embed_tokens.weight  # [V, d]
    with torch.no_grad():
        f = copilot(**inputs, return_logits=True).logits  # [B, m, V]
    realized = copilot.embed(inputs["input_indices"], inputs["input_values"], inputs["is_start"], embedding)
    predicted = (f @ embedding).roll(1, dims=1)  # [B, m, d]
    if copilot.config.copilot_input == "both":
        predicted = predicted + embedding[inputs["input_indices"][..., -1]]
    picked = (torch.rand(f.shape[:2], device=f.device) < SHARE) & ~inputs["is_start"]  # [B, m]
    return copilot(**inputs, inputs_embeds=torch.where(picked[..., None], predicted, realized))

"""What else a Copilot could read than the library feeds it: changes to a learner before its first step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from hf_copilot import CopilotLearner, CopilotModel
from hf_copilot.modeling_copilot import CopilotOutput
from hf_copilot.pilot_tap import PilotStates

NEVER = 10**6  # positions; a lag that hides every h
SHARE = 0.5  # of the inputs that scheduled feeding predicts


class OwnEmbedding:
    """X̃ of a Copilot that reads no Pilot: its own embedding of the tokens."""

    def __init__(self, copilot: CopilotModel):
        self.copilot = copilot

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[...]` int64 -> `[..., d]`"""
        return self.copilot.embed_tokens(input_ids.to(self.copilot.device))

    def gives(self, embeddings: torch.Tensor, input_ids: torch.Tensor) -> bool:
        return True


def no_hidden_states(learner: CopilotLearner) -> None:
    """X̃ and ℓ are read, h is not."""
    learner.copilot.config.hidden_state_lag = NEVER


def tokens_alone(learner: CopilotLearner) -> None:
    """Nothing of the Pilot is read but ℓ: such a Copilot fits every Pilot of its tokenizer, whatever its size."""
    no_hidden_states(learner)
    learner.embedding = OwnEmbedding(learner.copilot)


def moved(copilot: CopilotModel, pilot: nn.Module) -> CopilotLearner:
    """A Copilot that was trained on [`tokens_alone`] beside another Pilot, which may be of another size."""
    learner = CopilotLearner(copilot, pilot)
    tokens_alone(learner)
    take, width = learner.tap.sink, copilot.config.hidden_size

    def without_states(states: PilotStates) -> None:
        states.hidden_states = states.hidden_states.new_zeros(*states.hidden_states.shape[:2], width)  # [B, T, d]
        take(states)

    learner.tap.sink = without_states
    return learner


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

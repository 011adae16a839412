"""Copilots that the library does not have: other inputs, other losses, other draws.

Shapes: B rows, m queries, n positions, d_P the Pilot's hidden size, d the Copilot's, V vocabulary, k entries of ℓ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_copilot import CopilotConfig, CopilotLearner, CopilotLogitsProcessor, CopilotModel, MistakeLog, copilot_for
from hf_copilot.model.discrepancy import cross_entropy_loss
from hf_copilot.model.modeling_copilot import CopilotOutput, Vocabulary
from hf_copilot.pilot.inspect import find_decoder, find_layers
from hf_copilot.pilot.tap import PilotStates, PilotTap
from hf_copilot.training.batch import CopilotBatch
from hf_copilot.training.mistake_log import MistakeRecord
from hf_copilot.training.records import random_start
from hf_copilot.training.teacher_forced import TeacherForced

Sink = Callable[[PilotStates], None]


class FeatureTap(PilotTap):
    """Reads the outputs of three layers (low, middle, high), one beside the other, instead of a mean over all.

    h is `[B, T, 3 d_P]`; X̃ is filled with zeros to that width.
    """

    def __init__(self, pilot: nn.Module, config: CopilotConfig, sink: Sink, listen: Callable[[], bool]):
        super().__init__(pilot, config, lambda states: sink(widened(states)), listen)
        last = len(self.layers) - 1
        self.pooled = [self.layers[i] for i in (last // 6, last // 2, last)]
        self.pooling = "none"  # nothing is left to do at the end of a forward

    def _pool(self, layer: nn.Module, args: tuple, output: Any) -> None:
        states = self.states
        if states is None:
            return
        hidden = (output[0] if isinstance(output, tuple) else output).detach().float()  # [B, T, d_P]
        known = states.hidden_states
        states.hidden_states = hidden if known is None else torch.cat([known, hidden], dim=-1)


def widened(states: PilotStates) -> PilotStates:
    """X̃ `[B, T, 3 d_P]`, as wide as h."""
    extra = states.hidden_states.shape[-1] - states.embeddings.shape[-1]
    states.embeddings = F.pad(states.embeddings, (0, extra))
    return states


class FeatureCopilot(CopilotModel):
    """Adds the three layers' states at a query's own position to its input: the Pilot has them when it predicts.

    Args:
        config: With `memory="pilot"` and `hidden_state_lag=0`, built by [`copilot_for`].
        attends: Whether cross-attention reads the memory as well; without, it reads zeros.
        rank: Of a learned change of the lent head; 0 for none.
    """

    def __init__(self, config: CopilotConfig, attends: bool = True, rank: int = 0):
        super().__init__(config)
        self.attends, width = attends, 3 * config.pilot_hidden_size
        self.feature_norm = nn.LayerNorm(config.pilot_hidden_size, elementwise_affine=False)
        self.feature_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.memory_proj = nn.Linear(width, config.hidden_size)
        nn.init.zeros_(self.memory_proj.bias)
        _pass_through(self.feature_proj.weight, (0.0, 0.0, 1.0))
        _pass_through(self.memory_proj.weight, (1.0, 0.0, 1.0))  # X̃ stands in the first third
        if rank:
            self.head_up = nn.Parameter(torch.zeros(config.vocab_size, rank))
            self.head_down = nn.Parameter(torch.randn(rank, config.pilot_hidden_size) * config.pilot_hidden_size**-0.5)
        self.rank = rank

    def vocabulary(self, lent: Vocabulary | None) -> Vocabulary:
        vocabulary = super().vocabulary(lent)
        if not self.rank:
            return vocabulary
        return Vocabulary(vocabulary.embedding, vocabulary.head + self.head_up @ self.head_down)

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., 3 d_P]`, each layer's part normed by itself."""
        parts = states.to(self.norm.weight.dtype).unflatten(-1, (3, -1))
        return self.feature_norm(parts).flatten(-2)

    def forward(self, *, memory: torch.Tensor, **inputs: Any) -> CopilotOutput:
        memory = self.normed(memory)  # [B, 2n, 3 d_P], X̃_0, h_0, X̃_1, h_1, ...
        if inputs.get("cache") is not None:  # a step of `generate`: the query stands at the end
            own = memory[:, -1:]  # [B, 1, 3 d_P]
        else:
            own_index = (2 * inputs["positions"] + 1).clamp(max=memory.shape[1] - 1)  # [B, m]
            own = memory.gather(1, own_index[..., None].expand(-1, -1, memory.shape[-1]))  # [B, m, 3 d_P]
        embedding = super().vocabulary(inputs["lent"]).embedding  # [V, e]
        fed = self.embed(inputs["input_indices"], inputs["input_values"], inputs["is_start"], embedding)  # [B, m, d]
        read = memory if self.attends else torch.zeros_like(memory)
        return super().forward(memory=read, inputs_embeds=fed + self.feature_proj(own), **inputs)


@torch.no_grad()
def _pass_through(weight: torch.Tensor, shares: tuple[float, ...]) -> None:
    """Start a map `[d, 3 d_P]` as a sum of its three parts with these weights, and a little noise."""
    nn.init.normal_(weight, std=0.3 * weight.shape[1] ** -0.5)
    for part, share in zip(weight.chunk(len(shares), dim=1), shares, strict=True):
        part += share * torch.eye(*part.shape)


def feature_copilot(pilot: nn.Module, config: CopilotConfig, seed: int, **kwargs: Any) -> FeatureCopilot:
    """As [`copilot_for`], with new weights for what it adds."""
    plain = copilot_for(pilot, config)
    torch.manual_seed(seed)
    copilot = FeatureCopilot(plain.config, **kwargs).float()
    found = plain.state_dict()
    copilot.load_state_dict({k: v for k, v in found.items() if not k.startswith("memory_proj")}, strict=False)
    return copilot.train()


def top_copilot(pilot: nn.Module, config: CopilotConfig) -> CopilotModel:
    """As [`copilot_for`], with the Pilot's last layers instead of layers spread over all."""
    count, decoder, layers = len(copilot_for(pilot, config).layers), find_decoder(pilot), find_layers(pilot)
    decoder.layers = layers[-count:]
    try:
        return copilot_for(pilot, config)
    finally:
        decoder.layers = layers


class WeightedLog(MistakeLog):
    """Draws documents in proportion to the probability that the Pilot still gives to wrong tokens."""

    def sample(self, count: int, generator: torch.Generator) -> list[MistakeRecord]:
        records = [record for round_ in self.rounds for record in round_]
        if len(records) <= count:
            return records
        weights = torch.tensor([_missed(record) for record in records]) + 1e-3
        return [records[i] for i in torch.multinomial(weights, count, generator=generator).tolist()]


def _missed(record: MistakeRecord) -> float:
    """Mean of 1 − p(label): the entry of ℓ at the label."""
    at_label = record.indices == record.indices[:, -1:]  # [m, k + 1]; the last column is the label's, 0 if among the k
    return float((record.values * at_label).sum(-1).clamp_min(0).mean())


class Forced(TeacherForced):
    """A teacher-forced pass whose loss and tap can be others.

    Args:
        strength: λ at which the fused logits are trained, z + λf.
        alone: Train f as a language model by itself, without z.
        tap: Reads the Pilot.
    """

    def __init__(self, *args: Any, strength: float, alone: bool, tap: type[PilotTap]):
        super().__init__(*args)
        self.strength, self.alone = strength, alone
        self.tap = tap(self.head.trained, self.copilot.config, self._catch, lambda: self._listening)

    def loss(self, batch: CopilotBatch) -> torch.Tensor:
        if self.strength == 1.0 and not self.alone:
            return super().loss(batch)
        hidden, weight = self.forward(batch)  # [Q, e], [V, e]

        def pilot_logits(rows: slice) -> torch.Tensor:
            logits = self.head(batch.final_states[rows])
            return torch.zeros_like(logits) if self.alone else logits

        return cross_entropy_loss(self.strength * hidden, weight, pilot_logits, batch.labels)


class Learner(CopilotLearner):
    """A learner whose loss and tap can be others.

    Args:
        trained_strength: λ at which the fused logits are trained, z + λf.
        alone: Train f as a language model by itself, without z: what an ensemble would add.
        tap: Reads the Pilot in training; [`processor`] puts the same into `generate`.
    """

    def __init__(
        self,
        copilot: CopilotModel,
        pilot: nn.Module,
        trained_strength: float = 1.0,
        alone: bool = False,
        tap: type[PilotTap] = PilotTap,
        **kwargs: Any,
    ):
        self.teacher_forced_class = partial(Forced, strength=trained_strength, alone=alone, tap=tap)
        super().__init__(copilot, pilot, **kwargs)
        self.alone = alone

    def replay(self, documents: int) -> None:
        """The steps of one more round on what is logged, each on as many documents: the Pilot is not run, and must be
        as it was."""
        has_encoder = self.copilot.config.pilot_is_encoder_decoder
        for _ in range(self.steps_per_round):
            drawn = self.log.sample(documents, self.generator)
            self.update([random_start(record, self.generator, has_encoder) for record in drawn])
        self.steps += 1
        self.optimizer.scheduler.step()

    def processor(self, weights: tuple[float, float]) -> Mixture:
        return Mixture(self, weights)


class Mixture(CopilotLogitsProcessor):
    """α z + λ f in `generate`, with the learner's own tap; α is 1 for a Copilot. One of Eq. 8 stays what it is."""

    def __init__(self, learner: Learner, weights: tuple[float, float]):
        super().__init__(learner.copilot, learner.head.pilot, strength=weights[1])
        self.weights = weights
        tap = type(learner.forced.tap)
        if self.rectifier is not None and tap is not PilotTap:
            usual = self.rectifier.tap
            usual.close()
            self.rectifier.tap = tap(learner.head.pilot, learner.copilot.config, usual.sink, usual.listen)
            self.rectifier.tap.open()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.rectifier is None or self.fusion == "probability":
            return super().__call__(input_ids, scores)
        return self.weights[0] * scores.float() + self.weights[1] * self.rectifier.correction(input_ids)


class SecondModel:
    """In `generate`: α z + λ z', with z' the logits of another model, read anew at every step.

    Args:
        model: The other one.
        attention_mask: `[R, n]` of the prompts, left-padded.
        weights: α and λ.
    """

    def __init__(self, model: nn.Module, attention_mask: torch.Tensor, weights: tuple[float, float]):
        self.model, self.mask, self.weights = model, attention_mask, weights

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows, grown = len(input_ids), input_ids.shape[1] - self.mask.shape[1]
        mask = self.mask.repeat_interleave(rows // len(self.mask), dim=0)  # sampled several times
        mask = torch.cat([mask, mask.new_ones(rows, grown)], dim=1)  # [R, n]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        hidden = decoder(**inputs, use_cache=False).last_hidden_state[:, -1]  # [R, d_P]
        return self.weights[0] * scores.float() + self.weights[1] * head(hidden).float()

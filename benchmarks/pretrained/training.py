"""A Pilot that is fine-tuned, alone or with a Copilot beside it, in a plain PyTorch loop.

In float32; on a GPU under bf16 autocast.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from benchmarks.pretrained.steps import Clock, GraphedPilot, SteppedPilot, longest, most_targets
from benchmarks.pretrained.tasks import Example
from benchmarks.pretrained.variants import FeatureTap, Learner, WeightedLog, feature_copilot, top_copilot
from hf_copilot import CopilotConfig, MistakeLog, copilot_for
from hf_copilot.generation.cuda_graphs import Record
from hf_copilot.pilot.tap import PilotTap

BATCH, WARMUP, CLIP = 16, 10, 1.0
LORA = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
METHODS: dict[str, dict[str, Any] | None] = {
    "lora": {},
    "rslora": {"r": 64, "lora_alpha": 64, "use_rslora": True},
    "dora": {"use_dora": True},
    "full": None,
    "frozen": None,
    "few-shot": None,
}


@dataclass(frozen=True)
class PilotSpec:
    """How a Pilot is fine-tuned: `"lora"`, `"rslora"`, `"dora"`, `"full"`, or not at all: `"frozen"`, and
    `"few-shot"`, where training rows stand before each question."""

    method: str = "lora"
    rate: float = 3e-4
    epochs: float = 1.5

    @property
    def trains(self) -> bool:
        return self.method not in ("frozen", "few-shot")

    def steps(self, rows: int) -> int:
        return round(self.epochs * rows / BATCH)


@dataclass(frozen=True)
class CopilotSpec:
    """A Copilot: what differs from the library's defaults.

    Attributes:
        kind: Its name in the tables.
        config: Of [`CopilotConfig`].
        make: `"plain"`, `"paper"` (`config` is what differs from its preset), `"top"` (the Pilot's last layers), or
            `"features"`.
        features: Of `FeatureCopilot`.
        learner: Of `Learner`.
        weighted: Whether documents are drawn by what the Pilot still misses.
        shape: What its time is measured under: arms of one shape take equally long.
        log_epochs: After the Pilot's last step, epochs on the Mistake Log alone. Only beside a frozen Pilot, whose
            records stay true.
    """

    kind: str = "token"
    rate: float = 5e-4
    steps: int = 4
    config: dict[str, Any] = field(default_factory=dict)
    make: str = "plain"
    features: dict[str, Any] = field(default_factory=dict)
    learner: dict[str, Any] = field(default_factory=dict)
    weighted: bool = False
    shape: str = "token"
    log_epochs: float = 0.0

    def replays(self, rows: int) -> int:
        """Rounds on the log alone."""
        return round(self.log_epochs * rows / BATCH)


@dataclass
class Trained:
    """What a run leaves.

    Attributes:
        pilot: In eval mode, adapters merged.
        learners: With the Copilots.
        seconds: Of the Pilot's steps, of observing, and of the Copilots' steps.
        skipped: Steps of each Copilot that were left out.
    """

    pilot: PreTrainedModel
    learners: list[Learner]
    steps: int
    seconds: dict[str, float]
    skipped: list[int]

    @property
    def learner(self) -> Learner | None:
        """The first."""
        return self.learners[0] if self.learners else None


def lora_config(method: str) -> LoraConfig:
    return LoraConfig(**(LORA | METHODS[method]))


def adapted(base: PreTrainedModel, spec: PilotSpec) -> tuple[PreTrainedModel, PeftModel | None]:
    """A copy of the base to train in this way: the model itself, and its wrapper where it has an adapter."""
    pilot = copy.deepcopy(base)
    if METHODS[spec.method] is None:
        pilot.requires_grad_(spec.method == "full")
        return pilot, None
    wrapped = get_peft_model(pilot, lora_config(spec.method))
    return wrapped.get_base_model(), wrapped


def make_learner(pilot: PreTrainedModel, spec: CopilotSpec, steps: int, seed: int) -> Learner:
    torch.manual_seed(seed)  # whatever was made before it
    config = (CopilotConfig.paper if spec.make == "paper" else CopilotConfig)(**spec.config)
    is_features = spec.make == "features"
    if is_features:
        copilot = feature_copilot(pilot, config, seed, **spec.features)
    else:
        copilot = (top_copilot if spec.make == "top" else copilot_for)(pilot, config)
    learner = Learner(
        copilot,
        pilot,
        learning_rate=spec.rate,
        warmup_steps=min(WARMUP, steps // 4),
        log=WeightedLog() if spec.weighted else MistakeLog(),
        steps_per_round=spec.steps,
        seed=seed,
        tap=FeatureTap if is_features else PilotTap,
        autocast_dtype=torch.bfloat16 if pilot.device.type == "cuda" else None,
        **spec.learner,
    )
    learner.start(steps)
    return learner


def batches(examples: list[Example], steps: int, seed: int) -> Iterator[list[Example]]:
    """`steps` batches, epoch after epoch in an order of its own; short ends are filled from the next epoch."""
    generator, order = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        if len(order) < BATCH:
            order += torch.randperm(len(examples), generator=generator).tolist()
        picked, order = order[:BATCH], order[BATCH:]
        yield [examples[i] for i in picked]


def train(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    pilot_spec: PilotSpec,
    copilots: Sequence[CopilotSpec],
    steps: int,
    seed: int,
    record: Record | None = None,
    exact_clock: bool = False,
    skip_in_clock: int = 0,
) -> Trained:
    """Fine-tune a copy of the base. The Pilot's own training does not depend on the Copilots, nor these on each other.

    Args:
        record: Records the Pilot's forward and backward, see [`GraphedPilot`]; None runs them operator by operator.
        exact_clock: Wait for the device between parts: a little slower, and times that can be compared.
        skip_in_clock: Steps at the beginning that do not count.
    """
    torch.manual_seed(seed)
    pilot, wrapped = adapted(base, pilot_spec)
    trains, replays = pilot_spec.trains, [spec.replays(len(examples)) for spec in copilots]
    learners = [make_learner(pilot, spec, steps + more, seed) for spec, more in zip(copilots, replays, strict=True)]
    pilot.train(trains)
    optimizer, scheduler = _optimizer(pilot, pilot_spec.rate, steps) if trains else (None, None)
    clock, pad = Clock(pilot.device, exact_clock), tokenizer.pad_token_id
    if record is not None and trains:
        shape = BATCH, longest(examples), most_targets(examples, BATCH)
        compute = GraphedPilot(pilot, pad, optimizer, learners, shape, record)
    else:
        compute = SteppedPilot(pilot, pad, optimizer, learners, clock)
    for i, batch in enumerate(batches(examples, steps, seed)):
        if i == skip_in_clock:
            clock.reset()
        compute(batch)
        if trains:
            nn.utils.clip_grad_norm_([p for p in pilot.parameters() if p.requires_grad], CLIP)
            optimizer.step()
            scheduler.step()
        clock.end("pilot")
        for learner in learners:
            learner.step()
        clock.end("copilot")
    for learner, more in zip(learners, replays, strict=True):
        for _ in range(more):
            learner.replay(BATCH)
    clock.end("copilot")
    del compute
    pilot.zero_grad()
    if wrapped is not None:
        pilot = wrapped.merge_and_unload()
    skipped = [learner.skipped_steps for learner in learners]
    for learner in learners:
        learner.close()
        learner.optimizer = None  # its memory
        learner.forced.autocast_dtype = None  # both are measured as they are
        learner.log.clear()
        learner.copilot.eval()
    return Trained(pilot.eval().requires_grad_(False), learners, steps, clock.seconds, skipped)


def _optimizer(pilot: nn.Module, rate: float, steps: int):
    parameters = [parameter for parameter in pilot.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    return optimizer, get_scheduler("cosine", optimizer, min(WARMUP, steps // 4), steps)

"""The arms: one Pilot with every Copilot beside it, and Pilots of the joint size; their bases."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from benchmarks.accuracy.scoring import encode
from benchmarks.accuracy.tasks import Task, widths
from benchmarks.common import CHECKPOINTING, Row
from hf_copilot import (
    CopilotArguments,
    CopilotCallback,
    CopilotConfig,
    CopilotLearner,
    CopilotSFTConfig,
    CopilotTrainer,
    copilot_for,
)
from hf_copilot.training.report import count_parameters


@dataclass(frozen=True)
class Variant:
    """One Copilot: what differs from the defaults, be it its learner."""

    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    paper: bool = False
    learner: type[CopilotLearner] = CopilotLearner

    def settings(self) -> dict[str, Any]:
        """To know a kept run by."""
        settings = {"config": self.config, "arguments": self.arguments, "paper": self.paper}
        return settings | ({"learner": self.learner.__name__} if self.learner is not CopilotLearner else {})

    def copilot_config(self) -> CopilotConfig:
        return (CopilotConfig.paper if self.paper else CopilotConfig)(**self.config)

    def callback(self, task: Task) -> CopilotCallback:
        arguments = CopilotArguments(**({"copilot_strength": "config"} | task.copilot | self.arguments))
        callback = CopilotCallback(self.copilot_config(), arguments)
        callback.learner_class = self.learner
        return callback


class Trained(NamedTuple):
    """What a training run leaves."""

    pilot: PreTrainedModel  # in eval mode
    learners: dict[str, CopilotLearner]
    seconds: float  # of all steps but the first


class StepClock(TrainerCallback):
    """Seconds from the end of the first step to the end of the last: stands after all other callbacks."""

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.first = now if state.global_step == 1 else self.first
        self.seconds = now - self.first


@dataclass
class Setting:
    """Where a task is run and on what."""

    task: Task
    data: Path
    work: Path  # bases and trainers' folders
    device: str = "cpu"
    pilot: str | None = None  # a Hub id or folder; None builds the task's small Pilot
    lora: bool = False

    def tokenizer(self):
        if self.pilot is None:
            return self.task.tokenizer(self.data)
        tokenizer = AutoTokenizer.from_pretrained(self.pilot)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    def base(self, tokenizer, seed: int, changes: dict[str, int] | None = None):
        """The Pilot that the arms of a seed start from, pre-trained once and kept; `changes` are to its shape."""
        if self.pilot is not None:
            return AutoModelForCausalLM.from_pretrained(self.pilot, dtype="auto").to(self.device)
        shape = self.task.pilot | (changes or {})
        vocabulary = sorted(tokenizer.get_vocab().items())
        depends = json.dumps([shape, self.task.training, self.task.pretraining_steps, vocabulary, seed])
        folder = self.work / "base" / f"{self.task.name}-{sha256(depends.encode()).hexdigest()[:12]}"
        if not (folder / "config.json").is_file():
            set_seed(seed)
            pilot = small_pilot(shape, tokenizer)
            self.train(pilot, tokenizer, self.task.pretraining(self.data), seed, max_steps=self.task.pretraining_steps)
            pilot.save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder).to(self.device)

    def encoded(self, tokenizer, rows: list[Row]) -> list[dict[str, list[int]]]:
        return [encode(tokenizer, row, self.task.max_length) for row in rows]

    def joint_shapes(self, tokenizer, variant: Variant) -> dict[str, dict[str, int]]:
        """Changes to the Pilot's shape that give it as many parameters as Pilot and Copilot have together: the fewest
        further layers, or the least width."""
        pilot, own = small_pilot(self.task.pilot, tokenizer), self.task.pilot
        wanted = count_parameters(pilot)[0] + count_parameters(copilot_for(pilot, variant.copilot_config()))[0]

        def first(shapes: Iterator[dict[str, int]]) -> dict[str, int]:
            return next(s for s in shapes if count_parameters(small_pilot(own | s, tokenizer))[0] >= wanted)

        deeper = ({"num_hidden_layers": layers} for layers in count(own["num_hidden_layers"]))
        wider = (widths(width) for width in count(own["hidden_size"], step=2 * own["num_attention_heads"]))
        return {"deeper": first(deeper), "wider": first(wider)}

    def train(
        self,
        pilot,
        tokenizer,
        rows: list[Row],
        seed: int,
        variants: dict[str, Variant] | None = None,
        **changes: Any,
    ) -> Trained:
        """Fine-tune a Pilot with all these Copilots beside it; `changes` are to the task's SFTConfig."""
        callbacks = {name: variant.callback(self.task) for name, variant in (variants or {}).items()}
        trainer = SFTTrainer(
            pilot,
            SFTConfig(**(self.arguments(seed) | changes)),
            callbacks=[*callbacks.values(), clock := StepClock()],
            **self.inputs(tokenizer, rows),
        )
        trainer.train()
        learners = {name: callback.learner for name, callback in callbacks.items()}
        return Trained(trainer.model.eval(), learners, clock.seconds)

    def train_with_holdout(
        self, pilot, tokenizer, rows: list[Row], seed: int, variant: Variant
    ) -> tuple[PreTrainedModel, CopilotLearner]:
        """With [`CopilotTrainer`], which alone can hold rows out: the Pilot in eval mode, and the learner."""
        trainer = CopilotTrainer(
            pilot,
            CopilotSFTConfig(**self.arguments(seed), **(self.task.copilot | variant.arguments)),
            copilot=variant.copilot_config(),
            **self.inputs(tokenizer, rows),
        )
        trainer.train()
        return trainer.model.eval(), trainer.learner

    def arguments(self, seed: int) -> dict[str, Any]:
        """Of the trainer's config."""
        return self.task.training | {
            "output_dir": str(self.work / "trainer" / f"{self.task.name}-{seed}"),
            "seed": seed,
            "use_cpu": self.device == "cpu",
            "bf16": self.device != "cpu",
            "max_length": None,
            "lr_scheduler_type": "cosine",
            CHECKPOINTING: self.pilot is not None,
            "save_strategy": "no",
            "report_to": [],
            "logging_steps": 100,
        }

    def inputs(self, tokenizer, rows: list[Row]) -> dict[str, Any]:
        """Of the trainer."""
        return {
            "train_dataset": Dataset.from_list(self.encoded(tokenizer, rows)),
            "processing_class": tokenizer,
            "peft_config": LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05) if self.lora else None,
        }


def copy_of(pilot: PreTrainedModel) -> PreTrainedModel:
    """One in eval mode whose forward is its own: a trainer leaves the original's in a deep copy."""
    copy = type(pilot)(pilot.config).to(pilot.device)
    copy.load_state_dict(pilot.state_dict())
    return copy.eval()


def small_pilot(shape: dict[str, Any], tokenizer) -> LlamaForCausalLM:
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **tokens))

"""A Pilot and its Copilot, trained as a row says."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
)

from benchmarks.accuracy.scoring import Rectified, encode
from benchmarks.common import CHECKPOINTING, Row
from benchmarks.paper.rows import HUB, PaperRow, Training
from benchmarks.paper.tasks import Pair
from hf_copilot import (
    CopilotConfig,
    CopilotLearner,
    CopilotSeq2SeqConfig,
    CopilotSeq2SeqTrainer,
    CopilotSFTConfig,
    CopilotTrainer,
)
from hf_copilot.evaluation.rows import ids_with_end
from hf_copilot.training.report import count_parameters


@dataclass(frozen=True)
class Options:
    """What the command line changes of a row.

    Attributes:
        pilot: A folder or Hub id instead of the row's.
        copilot: Likewise, where the Copilot's first weights come from. With another Pilot it is that Pilot.
        layers: Of the Copilot, spread over its source; None takes the preset's.
        rows: At most so many to train on, and of each set to test on.
        sets: Of a reasoning row, those that are trained on and tested; None takes all.
    """

    data: Path
    work: Path
    pilot: str | None = None
    copilot: str | None = None
    layers: int | None = None
    max_steps: int | None = None
    rows: int | None = None
    sets: list[str] | None = None
    seed: int = 0
    device: str = "cpu"


# ---- models ---------------------------------------------------------------------------------------------------------


def load_pilot(name: str, training: Training, device: str) -> tuple[torch.nn.Module, Any]:
    """The Pilot, with LoRA where the row has a rank, and its tokenizer with a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    is_seq2seq = AutoConfig.from_pretrained(name).is_encoder_decoder
    dtype = torch.bfloat16 if device == "cuda" and training.rank else torch.float32
    model = (AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM).from_pretrained(name, dtype=dtype)
    if training.rank:
        kind = "SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM"
        model = get_peft_model(model, lora(training, training.targets, training.dropout, kind))
    return model.to(device), tokenizer


def lora(training: Training, targets: str | tuple[str, ...], dropout: float, kind: str | None = None) -> LoraConfig:
    targets = targets if isinstance(targets, str) else list(targets)
    sizes = {"r": training.rank, "lora_alpha": training.alpha, "lora_dropout": dropout}
    return LoraConfig(target_modules=targets, task_type=kind, **sizes)


def copilot_settings(row: PaperRow, options: Options) -> dict[str, Any]:
    """Of the trainer: the Copilot and its adapter."""
    training, changes = row.training, {"num_hidden_layers": options.layers} if options.layers else {}
    if training.preset == "default":
        return {"copilot": CopilotConfig(**changes)}
    source = options.copilot or (None if options.pilot else HUB[row.copilot])
    config = CopilotConfig.paper(
        init=source or "pilot", dropout=0.0 if training.rank else training.copilot_dropout, **changes
    )
    if not training.rank:
        return {"copilot": config}
    return {"copilot": config, "copilot_peft_config": lora(training, "all-linear", training.copilot_dropout)}


# ---- training -------------------------------------------------------------------------------------------------------


def arguments(row: PaperRow, options: Options) -> dict[str, Any]:
    """Of the trainer's config."""
    training, papers = row.training, row.training.preset == "paper"
    steps = {"copilot_steps_per_round": 1, "copilot_weight_decay": training.weight_decay} if papers else {}
    micro = min(training.micro_batch_size, training.batch_size)
    return steps | {
        "output_dir": str(options.work / row.name),
        "num_train_epochs": training.epochs,
        "max_steps": options.max_steps or training.max_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": training.batch_size // micro,
        "learning_rate": training.learning_rate,
        "copilot_learning_rate": training.copilot_learning_rate,
        "weight_decay": training.weight_decay,
        "warmup_steps": training.warmup,
        "lr_scheduler_type": "cosine",
        "seed": options.seed,
        "use_cpu": options.device == "cpu",
        "bf16": options.device == "cuda",
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 50,
        CHECKPOINTING: False,
    }


def encoded(tokenizer: Any, rows: list[Row], training: Training, is_seq2seq: bool) -> Dataset:
    """Labels on completions alone; long prompts of a decoder lose their beginning, those of an encoder their end."""
    if not is_seq2seq:
        return Dataset.from_list([encode(tokenizer, row, training.max_length) for row in rows])
    columns = {"input_ids": "prompt", "labels": "completion"}
    return Dataset.from_dict(
        {
            name: [ids_with_end(tokenizer, row[key], training.max_length) for row in rows]
            for name, key in columns.items()
        }
    )


def train(row: PaperRow, options: Options, train_rows: list[Row], valid: list[Row]) -> tuple[Pair, dict[str, Any]]:
    """Both models in eval mode, λ chosen on `valid`, and what the training took."""
    training = row.training
    model, tokenizer = load_pilot(options.pilot or HUB[row.pilot], training, options.device)
    is_seq2seq = model.config.is_encoder_decoder
    kind = (CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig) if is_seq2seq else (CopilotTrainer, CopilotSFTConfig)
    own = {"data_collator": DataCollatorForSeq2Seq(tokenizer, model)} if is_seq2seq else {}
    lengths = {} if is_seq2seq else {"max_length": None}
    trainer = kind[0](
        model,
        kind[1](**arguments(row, options), **lengths),
        train_dataset=encoded(tokenizer, train_rows, training, is_seq2seq),
        eval_dataset=encoded(tokenizer, valid, training, is_seq2seq),
        processing_class=tokenizer,
        **copilot_settings(row, options),
        **own,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    calibration = trainer.calibrate(strengths=training.strengths)
    pilot = trainer.model.eval()
    learner = CopilotLearner(trainer.copilot.to(options.device).eval(), pilot)
    pair = Pair(Rectified(pilot, tokenizer), Rectified(pilot, tokenizer, learner, calibration["strength"]))
    sizes = [count_parameters(model)[0] for model in (pilot, learner.copilot)]
    took = {"seconds": seconds, "steps": trainer.state.global_step, "parameters": sizes, "calibration": calibration}
    return pair, took

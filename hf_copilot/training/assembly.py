"""What trainers and callback share: building the Copilot and its learner, and taking both up from a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import IntervalStrategy, SchedulerType, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..model.configuration_copilot import CopilotConfig
from ..model.modeling_copilot import CopilotModel
from ..pilot.compatibility import check_pilot, describe_pilot
from ..pilot.copilot_for import copilot_for
from .checkpoint import STATE_FOLDER, WEIGHTS_FOLDER
from .learner import CopilotLearner
from .learner_state import load_state, written_beside
from .mistake_log import MistakeLog, MistakeRecord
from .training_args import CopilotArguments

logger = logging.get_logger(__name__)


def make_copilot(
    copilot: CopilotModel | CopilotConfig | str | os.PathLike | None, pilot: torch.nn.Module, tokenizer: Any = None
) -> CopilotModel:
    """The Copilot to train beside a Pilot: the one that is given (a model, a path or Hub id), or a new one by its
    config."""
    if copilot is None or isinstance(copilot, CopilotConfig):
        return copilot_for(pilot, copilot, tokenizer)
    if isinstance(copilot, str | os.PathLike):
        copilot = CopilotModel.from_pretrained(copilot)
    if not isinstance(copilot, CopilotModel):
        raise TypeError(f"copilot={copilot!r}: pass None, a CopilotConfig, a CopilotModel, a path or a Hub id.")
    check_pilot(copilot, pilot, tokenizer)
    describe_pilot(copilot.config, pilot, tokenizer)
    return copilot.float().train()


def check_data(argument: str, data: Any) -> None:
    """Raise a `ValueError` for a data set without rows."""
    parts = data if isinstance(data, dict) else {"": data}
    for name, part in parts.items():
        if hasattr(part, "__len__") and len(part) == 0:
            raise ValueError(f"`{argument}` {name} is empty: it has no rows to train on or to measure.")


def make_learner(
    copilot: CopilotModel,
    pilot: torch.nn.Module,
    args: Any,
    copilot_args: CopilotArguments,
    peft_config: PeftConfig | None = None,
    learner_class: type[CopilotLearner] = CopilotLearner,
) -> CopilotLearner:
    """A learner with the Pilot's seed, schedule and mixed precision, and the Copilot's own learning rate. A schedule
    that follows a metric is replaced by a constant one, with a warning."""
    schedule, schedule_kwargs = args.lr_scheduler_type, args.lr_scheduler_kwargs
    if schedule in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        logger.warning(f"lr_scheduler_type={schedule.value!r} follows the Pilot's metric: the Copilot's is constant.")
        schedule, schedule_kwargs = SchedulerType.CONSTANT_WITH_WARMUP, None
    if copilot_args.copilot_gradient_checkpointing:  # the second name is that of transformers before 5.23
        getattr(copilot, "activation_checkpointing_enable", copilot.gradient_checkpointing_enable)()
    return learner_class(
        copilot,
        pilot,
        learning_rate=copilot_args.copilot_learning_rate,
        weight_decay=copilot_args.copilot_weight_decay,
        max_grad_norm=copilot_args.copilot_max_grad_norm,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=schedule_kwargs,
        log=MistakeLog(copilot_args.copilot_log_rounds, copilot_args.copilot_log_max_bytes),
        log_dtype=getattr(torch, copilot_args.copilot_log_dtype),
        steps_per_round=copilot_args.copilot_steps_per_round,
        seed=args.seed,
        autocast_dtype=torch.bfloat16 if args.bf16 else None,
        compile_backend=(args.torch_compile_backend or "inductor") if copilot_args.copilot_torch_compile else None,
        peft_config=peft_config,
    )


def load_checkpoint(learner: CopilotLearner, checkpoint: str | os.PathLike, start_fresh: bool) -> None:
    """Take the Copilot and its learner's state up from a Trainer checkpoint.

    Raises:
        ValueError: If the checkpoint holds no Copilot (plain SFTTrainer wrote it) and `start_fresh` is not set.
    """
    checkpoint = Path(checkpoint)
    if (checkpoint / STATE_FOLDER).is_dir():
        load_weights(learner, checkpoint)
        load_state(learner, checkpoint / STATE_FOLDER)
    elif start_fresh:
        logger.warning(f"{checkpoint} holds no Copilot: starting a fresh one (copilot_start_fresh=True).")
    else:
        raise ValueError(
            f"{checkpoint} holds no Copilot to resume ({STATE_FOLDER}/ is missing; a plain SFTTrainer or "
            "save_only_model=True wrote it). Set copilot_start_fresh=True in CopilotSFTConfig to resume the Pilot "
            "with a fresh Copilot."
        )


def save_weights(learner: CopilotLearner, directory: str | os.PathLike) -> None:
    """Write the Copilot as plain weights, with its card, into its folder of `directory`."""
    with written_beside(Path(directory) / WEIGHTS_FOLDER) as folder:
        learner.exported("cpu").save_pretrained(folder)


def load_weights(learner: CopilotLearner, checkpoint: str | os.PathLike) -> None:
    """Load the Copilot's exported weights, its λ and results; one that is trained with an adapter has its weights in
    its learner's state."""
    folder, config = Path(checkpoint) / WEIGHTS_FOLDER, learner.copilot.config
    saved = CopilotConfig.from_pretrained(folder)
    different = {name: (getattr(saved, name), getattr(config, name)) for name in saved.differences(config)}
    if saved.calibration is None and config.calibration is None and saved.strength != config.strength:
        different["strength"] = saved.strength, config.strength
    if different:
        raise ValueError(
            f"The Copilot in {checkpoint} has other settings than this run's (saved, now): {different}. Resume with "
            "the settings that it was started with."
        )
    if learner.peft_model is None:
        learner.copilot.load_state_dict(CopilotModel.from_pretrained(folder).state_dict())
    config.strength, config.results, config.calibration = saved.strength, saved.results, saved.calibration


def after_first_visit(args: CopilotArguments, state: TrainerState) -> list[MistakeRecord] | None:
    """With `copilot_mistake_source="first_visit"` nothing is logged after epoch one: an empty list, else None."""
    return [] if args.copilot_mistake_source == "first_visit" and state.epoch > 1 else None


def check_first_visit(learner: CopilotLearner, args: CopilotArguments, state: TrainerState) -> None:
    """Say what `copilot_mistake_source="first_visit"` can't do in this run.

    Raises:
        ValueError: If the run resumes after the first epoch without the log of it: nothing would be learnt any more.
    """
    if args.copilot_mistake_source != "first_visit":
        return
    if (state.epoch or 0) >= 1 and not len(learner.log):
        raise ValueError(
            "The first epoch is over and its Mistake Log is not in the checkpoint: with copilot_mistake_source="
            "'first_visit' the Copilot has nothing to learn from. Resume with copilot_mistake_source='train', or from "
            "a checkpoint that holds the log (copilot_save_mistake_log=True, as many processes)."
        )
    head = learner.head.pilot.get_output_embeddings()
    if learner.copilot.config.objective == "cross_entropy" and any(p.requires_grad for p in head.parameters()):
        logger.warning(
            "copilot_mistake_source='first_visit' keeps hidden states of the first epoch while the Pilot's head is "
            "trained on: the logits that the Copilot learns to correct are of old states and the new head. Freeze the "
            "head (LoRA), or use copilot_mistake_source='train' or 'holdout'."
        )


def is_logging_step(args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
    """Whether Trainer logs after this step; with `logging_strategy="epoch"` it says so only later."""
    return control.should_log or (args.logging_strategy == IntervalStrategy.EPOCH and state.epoch == int(state.epoch))

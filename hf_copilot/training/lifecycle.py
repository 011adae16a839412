"""The life of a Copilot in a training run: made from arguments, started, stepped after every step of the Pilot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import (
    IntervalStrategy,
    ProgressCallback,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..model.configuration_copilot import CopilotConfig
from ..model.modeling_copilot import CopilotModel
from ..pilot.compatibility import check_pilot, describe_pilot
from ..pilot.copilot_for import copilot_for
from .checkpoint import load_checkpoint, starts_fresh
from .learner import CopilotLearner
from .ledger import LEDGER_FOLDER, LedgerWriter
from .metrics import use_unchosen_strength
from .mistake_log import MistakeLog
from .mistake_source import FirstVisit, TrainingErrors
from .preflight import Stopwatch, find_shortages
from .refusals import check_own_stream_arguments
from .report import describe_rounds, describe_start, show
from .training_args import CopilotArguments

logger = logging.get_logger(__name__)

RATES = ("min_lr", "lr_end")  # among a schedule's arguments, those that are no share of the peak rate


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


def make_learner(
    copilot: CopilotModel,
    pilot: torch.nn.Module,
    args: Any,
    copilot_args: CopilotArguments,
    peft_config: PeftConfig | None = None,
    learner_class: type[CopilotLearner] = CopilotLearner,
) -> CopilotLearner:
    """A learner with the Pilot's seed, schedule and mixed precision, and the Copilot's own learning rate, to which
    rates among `lr_scheduler_kwargs` are scaled. A schedule that follows a metric is replaced by a constant one, with
    a warning."""
    schedule, schedule_kwargs = args.lr_scheduler_type, args.lr_scheduler_kwargs
    if schedule in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        logger.warning(f"lr_scheduler_type={schedule.value!r} follows the Pilot's metric: the Copilot's is constant.")
        schedule, schedule_kwargs = SchedulerType.CONSTANT_WITH_WARMUP, None
    if schedule_kwargs:
        ratio = copilot_args.copilot_learning_rate / args.learning_rate if args.learning_rate else 1.0
        schedule_kwargs = {k: v * ratio if k in RATES and v is not None else v for k, v in schedule_kwargs.items()}
    if copilot_args.copilot_gradient_checkpointing:  # the second name is that of transformers before 5.23
        getattr(copilot, "activation_checkpointing_enable", copilot.gradient_checkpointing_enable)()
    if copilot_args.copilot_own_stream:
        check_own_stream_arguments(args, copilot_args.copilot_torch_compile)
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
        own_stream=copilot_args.copilot_own_stream,
        peft_config=peft_config,
    )


def may_log(args: TrainingArguments, state: TrainerState, control: TrainerControl, knows_length: bool) -> bool:
    """Whether Trainer may log after this step. With `logging_strategy="epoch"` it says so only later: at the end of an
    epoch, which no one knows of a stream, or when training stops inside one."""
    if control.should_log or args.logging_strategy != IntervalStrategy.EPOCH:
        return control.should_log
    return not knows_length or control.should_training_stop or state.epoch == int(state.epoch)


@contextmanager
def optimizer_mode_kept(optimizer: Any) -> Iterator[None]:
    """Of a schedule-free optimizer, whose Pilot has other weights while it is evaluated."""
    was_training = any(group.get("train_mode") for group in getattr(optimizer, "param_groups", []))
    try:
        yield
    finally:
        if was_training:
            optimizer.train()


@contextmanager
def no_evaluation_told(handler: CallbackHandler) -> Iterator[None]:
    """Callbacks are not told of an evaluation inside, whose metrics are none that they know, but for the one that
    shows its progress."""

    def on_evaluate(args, state, control, metrics):
        for callback in handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_evaluate(args, state, control)
            elif hasattr(callback, "prediction_bar"):  # of a notebook, which would draw a table of these metrics
                callback.prediction_bar = None
        return control

    handler.on_evaluate = on_evaluate
    try:
        yield
    finally:
        del handler.on_evaluate


@contextmanager
def loaders_made_anew(args: TrainingArguments) -> Iterator[None]:
    """Trainer keeps the loader of an evaluation whose workers go on, and gives it out again for any other data set."""
    before, args.dataloader_persistent_workers = args.dataloader_persistent_workers, False
    try:
        yield
    finally:
        args.dataloader_persistent_workers = before


@contextmanager
def nothing_logged(handler: CallbackHandler) -> Iterator[None]:
    """Callbacks are not told of what is logged inside: after `on_train_end` reporters have closed their run. The
    trainer's own history has it."""
    handler.on_log = lambda args, state, control, logs: control
    try:
        yield
    finally:
        del handler.on_log


class CopilotLifecycle(TrainerCallback):
    """Starts a learner with the training of its Pilot, and steps it after every optimizer step, before logging,
    evaluation and saving.

    Attributes:
        learner: The one that is stepped.
        checkpoint: What the next training resumes from, if it does.
        source: Whose errors are logged.
        can_choose: Whether there is an evaluation set to choose λ on.
        way_to_choose: What a user does where there is none.
    """

    can_choose = False
    way_to_choose = "Pass an eval_dataset"

    def __init__(self, learner: CopilotLearner | None, copilot_args: CopilotArguments):
        self.learner, self.checkpoint = learner, None
        self.use(copilot_args)

    def use(self, copilot_args: CopilotArguments) -> None:
        """Follow these arguments from now on."""
        self.copilot_args = copilot_args
        is_first_visit = copilot_args.copilot_mistake_source == "first_visit"
        self.source = FirstVisit() if is_first_visit else TrainingErrors()

    def on_train_begin(self, args, state, control, **kwargs):
        checkpoint, self.checkpoint = self.checkpoint, None  # be it that what follows fails
        is_fresh = checkpoint is not None and starts_fresh(checkpoint, self.copilot_args.copilot_start_fresh)
        rounds = state.max_steps - (state.global_step if is_fresh else 0)
        self.learner.warmup_steps = args.get_warmup_steps(rounds)
        self.learner.start(rounds)
        if not self.can_choose and self.copilot_args.copilot_strength is None:
            self._leave_unchosen()
        if checkpoint is not None and not is_fresh:
            load_checkpoint(self.learner, checkpoint)
        self.source.check(self.learner, state)

    def _leave_unchosen(self) -> None:
        if use_unchosen_strength(config := self.learner.copilot.config):
            logger.warning(
                f"λ is {config.strength}: nothing is there to choose it on, and {type(config).strength} is often too "
                f"sure. {self.way_to_choose}, or copilot_strength='config' to leave it as it was."
            )

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        measure = may_log(args, state, control, has_length(train_dataloader))
        self.learner.step(measure, self.source.records(self.learner, state))


def add_lifecycle(trainer: Trainer, lifecycle: CopilotLifecycle) -> None:
    """As the last callback but for the one that saves at once when a process is told to end (`enable_jit_checkpoint`):
    the Copilot's step of a round comes before it is saved. Called again when another callback was added."""
    handler = trainer.callback_handler
    others = [c for c in handler.callbacks if isinstance(c, CopilotLifecycle) and c is not lifecycle]
    if others:
        handler.callbacks = [callback for callback in handler.callbacks if callback not in others]
        raise ValueError("This trainer trains a Copilot by itself: leave the CopilotCallback out.")
    saves_at_once = handler.pop_callback(JITCheckpointCallback)
    for callback in filter(None, (lifecycle, saves_at_once)):
        handler.callbacks = [other for other in handler.callbacks if other is not callback] + [callback]


class TrainerLifecycle(CopilotLifecycle):
    """Says what is trained, what it takes, and what will not fit; begins the ledger.

    Attributes:
        watch: Of the first rounds.
        rows: Of the data set that the trainer was given; None writes no ledger.
        chat_template: With which these became tokens, where it is not the tokenizer's own.
    """

    rows: int | None = None
    chat_template: str | None = None

    def __init__(self, learner: CopilotLearner, copilot_args: CopilotArguments):
        super().__init__(learner, copilot_args)
        self.watch = Stopwatch(learner.device)

    def on_train_begin(self, args, state, control, **kwargs):
        earlier = Path(self.checkpoint).parent / LEDGER_FOLDER if self.checkpoint is not None else None
        super().on_train_begin(args, state, control, **kwargs)
        if self.rows is not None:
            folder = Path(args.output_dir) / LEDGER_FOLDER
            has_encoder = self.learner.copilot.config.pilot_is_encoder_decoder
            about_rows = self.rows, has_encoder, earlier, self.chat_template
            self.learner.ledger = LedgerWriter(folder, state.global_step, *about_rows)
        self.watch = Stopwatch(self.learner.device)
        self._say(args, state, describe_start(self.learner))

    def on_step_begin(self, args, state, control, **kwargs):
        self.watch.begin_round()

    def on_step_end(self, args, state, control, **kwargs):
        with self.watch.of_copilot():
            super().on_step_end(args, state, control, **kwargs)
        if self.watch.end_round(control.should_evaluate or control.should_save):
            self._say(args, state, describe_rounds(self.learner, self.watch))

    def _say(self, args, state, lines: str) -> None:
        for shortage in find_shortages(self.learner, args, state):
            logger.warning(shortage)
        if state.is_world_process_zero and not args.disable_tqdm:
            show(lines)

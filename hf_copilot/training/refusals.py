"""Can a Copilot be trained, or folded, in this way? Rules and error texts, each with the way out."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import ProcessorMixin, Seq2SeqTrainingArguments, Trainer, TrainingArguments, __version__
from transformers.utils import logging

from ..model.configuration_copilot import CopilotConfig
from ..model.modeling_copilot import CopilotModel
from ..pilot.compatibility import has_virtual_tokens
from ..pilot.inspect import is_encoder_decoder, is_sharded
from ..version import TESTED_TRANSFORMERS
from .training_args import AUTO_STRENGTHS, CopilotArguments, least_is_best

logger = logging.get_logger(__name__)

OVERRIDDEN = (  # of Trainer, besides what is public; under another name what a trainer adds there would never run
    *("_load_best_model", "_load_optimizer_and_scheduler", "_push_from_checkpoint"),
    *("_save_checkpoint", "_save_rng_state"),
)


def check_callback_arguments(copilot_args: Any) -> None:
    """Raise a `ValueError` for [`CopilotArguments`] that a [`CopilotCallback`] can't follow."""
    if copilot_args.copilot_strength not in (None, "config") or copilot_args.copilot_predict:
        raise ValueError(
            "CopilotCallback sees no evaluation: copilot_strength='auto' or 'auto_accuracy' and copilot_predict "
            "need a trainer of hf_copilot. After training, calibrate_on_rows(pilot, callback.copilot, rows) chooses λ."
        )
    if copilot_args.copilot_mistake_source == "holdout":
        raise ValueError(
            "CopilotCallback can't hold rows out of the Pilot's training: use a trainer of hf_copilot for "
            "copilot_mistake_source='holdout', or 'first_visit'."
        )


def check_callback(args: TrainingArguments, pilot: nn.Module) -> None:
    """Raise a `NotImplementedError` if a [`CopilotCallback`] can't follow the training of a Pilot."""
    if args.world_size > 1 or args.n_gpu > 1:
        raise NotImplementedError(
            "CopilotCallback runs in one process on one GPU: launch it with plain `python`, and make one GPU "
            "visible with CUDA_VISIBLE_DEVICES, or use CopilotTrainer or CopilotSeq2SeqTrainer, which take "
            "several processes."
        )
    if args.load_best_model_at_end:
        raise NotImplementedError(
            "CopilotCallback takes no Copilot along when the best Pilot is loaded, so that both would be of different "
            "steps: use a trainer of hf_copilot, or leave load_best_model_at_end out; every checkpoint holds both."
        )
    if has_virtual_tokens(pilot):
        raise NotImplementedError(
            "CopilotCallback does not see the token ids of a Pilot with virtual tokens (prompt tuning, prefix "
            "tuning, p-tuning): use CopilotTrainer."
        )


def check_trainer(trainer: Trainer, copilot_peft_config: PeftConfig | None) -> None:
    """Raise if a Copilot can't be trained in this trainer, before its first step.

    Raises:
        NotImplementedError: For a way to spread or make the model, or a kind of model, that is not supported.
        ValueError: For arguments that do not go together.
    """
    _check_parent(trainer)
    _check_processes(trainer, type(trainer).__name__)
    _check_model(trainer, type(trainer).__name__)
    if hasattr(trainer.train_dataset, "__len__") and len(trainer.train_dataset) == 0:
        raise ValueError("No row of `train_dataset` has a labelled token: look at its masks and at max_length.")
    if copilot_peft_config is not None and trainer.args.save_only_model and trainer.args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end needs the Copilot's adapter, which save_only_model leaves out of checkpoints: "
            "set save_only_model=False."
        )


def check_given(model: Any, args: Any, takes_encoder_decoders: bool) -> None:
    """Raise a `ValueError` for a Copilot where the Pilot is to be, a `TypeError` for arguments of another trainer."""
    if isinstance(model, CopilotModel):
        raise ValueError("model is a Copilot: pass its Pilot as the model, and the Copilot as copilot=...")
    is_seq2seq, wanted = isinstance(args, Seq2SeqTrainingArguments), "CopilotSFTConfig or SFTConfig"
    if takes_encoder_decoders:
        wanted = "CopilotSeq2SeqConfig or Seq2SeqTrainingArguments"
    fits = isinstance(args, TrainingArguments) and is_seq2seq == takes_encoder_decoders
    if args is not None and not fits:
        raise TypeError(f"args is a {type(args).__name__}, and this trainer takes a {wanted}.")


def check_arguments(
    args: TrainingArguments, copilot_args: CopilotArguments, copilot: Any, has_evaluation_set: bool
) -> None:
    """Raise a `ValueError` for arguments that do not go together, warn where they do harm.

    Args:
        copilot: As the trainer was given it.
    """
    strength = copilot_args.copilot_strength
    if copilot_args.copilot_predict and not getattr(args, "predict_with_generate", False):
        raise ValueError(
            "copilot_predict=True needs CopilotSeq2SeqTrainer with predict_with_generate=True; elsewhere generate "
            "with a CopilotLogitsProcessor."
        )
    if strength in AUTO_STRENGTHS and not has_evaluation_set:
        raise ValueError(
            f"copilot_strength={strength!r} chooses λ on `eval_dataset`: pass one, or leave it at 'config'."
        )
    is_given = isinstance(copilot, CopilotConfig) and copilot.strength != CopilotConfig.strength
    if strength is None and has_evaluation_set and is_given:
        logger.warning(
            f"λ = {copilot.strength:g} of the config will give way to the one that is chosen on `eval_dataset`: "
            "copilot_strength='config' keeps it."
        )
    if args.greater_is_better and least_is_best(args.metric_for_best_model):
        logger.warning(
            f"metric_for_best_model={args.metric_for_best_model!r} is best where it is least, and "
            "greater_is_better=True keeps the checkpoint where it is greatest: set greater_is_better=False."
        )


def check_own_stream(pilot: nn.Module, has_streams: bool, processes: int) -> None:
    """Raise if the Copilot's rounds can't have a stream of their own beside this Pilot.

    Raises:
        ValueError: If the device has no streams.
        NotImplementedError: With several processes, or a Pilot that is sharded or on several devices.
    """
    way_out = "set copilot_own_stream=False (own_stream=False of a CopilotLearner)"
    if not has_streams:
        raise ValueError(f"A stream of the Copilot's own would do nothing here, the Pilot is not on CUDA: {way_out}.")
    if processes > 1 or is_sharded(pilot) or len({parameter.device for parameter in pilot.parameters()}) > 1:
        raise NotImplementedError(
            f"A stream of the Copilot's own is for one process and a Pilot that is whole, on one device: {way_out}."
        )


def check_own_stream_arguments(args: TrainingArguments, copilot_compiles: bool) -> None:
    """Raise a `NotImplementedError` if the Copilot's rounds can't have a stream of their own in this training."""
    if args.optim.startswith(("lomo", "adalomo", "schedule_free")):
        raise NotImplementedError(
            f"optim={args.optim.value!r} changes the Pilot's weights outside of its step, where the Copilot's stream "
            "is not waited for: take another, or set copilot_own_stream=False."
        )
    if copilot_compiles and args.torch_compile and args.torch_compile_mode in ("reduce-overhead", "max-autotune"):
        raise NotImplementedError(
            "CUDA graphs of the Pilot and of the Copilot share memory, and must not run side by side: leave out "
            f"torch_compile_mode={args.torch_compile_mode!r}, or set copilot_own_stream=False."
        )


def check_folding(pilot: nn.Module, args: TrainingArguments) -> None:
    """Raise if a Copilot can't be folded into this Pilot with these arguments.

    Raises:
        NotImplementedError: With several processes or devices.
        ValueError: If no weight is trainable, or for an argument that the labels of folding have no use for.
    """
    if args.world_size > 1 or args.n_gpu > 1:
        raise NotImplementedError(
            "A Copilot is folded in one process on one device: load Pilot and Copilot in a script of one process, "
            "and call hf_copilot.fold_copilot there."
        )
    if not any(parameter.requires_grad for parameter in pilot.parameters()):
        raise ValueError(
            "No weight of the Pilot is trainable: load its adapter with is_trainable=True, or give it one with "
            "peft.get_peft_model."
        )
    if args.label_smoothing_factor:
        raise ValueError("Folding learns from distributions, which are smooth: set label_smoothing_factor=0.")


def _check_parent(trainer: Trainer) -> None:
    lacking = [name for name in OVERRIDDEN if not hasattr(Trainer, name)]
    if lacking:
        raise NotImplementedError(
            f"Trainer of transformers {__version__} has no {', '.join(lacking)}, where {type(trainer).__name__} saves "
            f"and loads the Copilot: use a version from {' to '.join(TESTED_TRANSFORMERS)}."
        )


def _check_processes(trainer: Trainer, name: str) -> None:
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise NotImplementedError(
            f"{name} does not support context, sequence or tensor parallelism: a process must see "
            "whole sequences and the whole head. Use DDP (torchrun or accelerate launch, without a "
            "parallelism_config)."
        )
    if trainer.is_fsdp_enabled and is_encoder_decoder(trainer.model):
        raise NotImplementedError(
            "FSDP is not supported for encoder-decoders, whose embeddings are shared by several modules: use one "
            "process or DDP."
        )
    if trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
        raise NotImplementedError(
            f"{name} does not support DeepSpeed or FSDP1: use FSDP2 "
            "(fsdp_config={'fsdp_version': 2}), or DDP with LoRA or gradient checkpointing."
        )
    if trainer.args.n_gpu > 1:
        raise NotImplementedError(
            f"{name} does not support several GPUs in one process (DataParallel): launch it with "
            "torchrun or accelerate, or make one GPU visible with CUDA_VISIBLE_DEVICES."
        )


def _check_model(trainer: Trainer, name: str) -> None:
    if trainer.model_init is not None:
        raise NotImplementedError(
            f"{name} does not support model_init (and with it hyperparameter_search): its Copilot "
            "belongs to one model. Make a trainer for each model."
        )
    if is_encoder_decoder(trainer.model) and not trainer.takes_encoder_decoders:
        raise NotImplementedError(
            f"{name} is for decoder-only models, as SFTTrainer is: use CopilotSeq2SeqTrainer for "
            f"{type(trainer.model).__name__}."
        )
    if isinstance(trainer.processing_class, ProcessorMixin):
        raise NotImplementedError(
            f"{name} is for language models, and this one has a processor, as a vision-language model has: use "
            "SFTTrainer."
        )


def check_data(argument: str, data: Any) -> None:
    """Raise a `ValueError` for a data set without rows."""
    parts = data if isinstance(data, dict) else {"": data}
    for name, part in parts.items():
        if hasattr(part, "__len__") and len(part) == 0:
            raise ValueError(f"`{argument}` {name} is empty: it has no rows to train on or to measure.")

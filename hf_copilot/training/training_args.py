"""The Copilot's part of the training arguments."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from transformers import Seq2SeqTrainingArguments
from trl import SFTConfig

from .mistake_log import check_bounds
from .optimizer import check_ranges

FIXED_STRENGTH = " For a fixed λ set CopilotConfig(strength=...) or CopilotLogitsProcessor(strength=...)."
AUTO_STRENGTHS = {"auto": "nll", "auto_accuracy": "token_accuracy"}  # the metric that λ is chosen by


def least_is_best(metric: str | None) -> bool:
    """Whether a metric of ours is best where it is least; transformers knows it of names that end with "loss"."""
    return metric is not None and metric.endswith("nll")


@dataclass
class CopilotArguments:
    """How a Copilot is trained beside a Pilot; the defaults hold where a trainer is given other arguments.

    Parameters:
        copilot_learning_rate (`float`, defaults to `3e-4`): Peak learning rate of the Copilot's own AdamW. Its
            schedule and warm-up follow the Pilot's `lr_scheduler_type` and `warmup_steps`.
        copilot_weight_decay (`float`, defaults to `0.1`): Weight decay of its matrices.
        copilot_max_grad_norm (`float`, defaults to `1.0`): Its gradient is clipped to this norm; 0 does not
            clip.
        copilot_steps_per_round (`int`, defaults to `4`): Its optimizer steps for one of the Pilot's (the paper's: 1);
            each draws from the log anew and costs as much as the first.
        copilot_mistake_source (`str`, defaults to `"train"`): Whose errors are logged: `"train"`, every forward of the
            Pilot's training (the paper); `"first_visit"`, those of the first epoch, before the Pilot has seen the
            document; the last `copilot_log_rounds` of that epoch stay in the log (for Pilots whose head is frozen, as
            with LoRA); `"holdout"`, those on a slice that it never trains on.
        copilot_holdout (`float`, defaults to `0.1`): That slice's share of `train_dataset`. One more batch of
            `per_device_train_batch_size` of its rows goes through the Pilot, without gradient, at every step.
        copilot_log_rounds (`int`, defaults to `128`): Rounds (optimizer steps) that the Mistake Log keeps.
        copilot_log_max_bytes (`int`, defaults to 1 GiB): Bound on the log in CPU memory. With several processes
            each has a log of its own. On CUDA it is pinned memory, which PyTorch rounds up to powers of two: at worst
            it takes twice as much.
        copilot_log_dtype (`str`, defaults to `"bfloat16"`): Type of the hidden states in the log.
        copilot_gradient_checkpointing (`bool`, defaults to `False`): Recompute its activations in the backward pass.
        copilot_torch_compile (`bool`, defaults to `False`): Compile its blocks, with the Pilot's
            `torch_compile_backend` (inductor, which makes CUDA graphs of them). The first steps take far longer. Where
            it fails, training goes on without and says so.
        copilot_own_stream (`bool`, defaults to `False`): Run its steps on a CUDA stream of their own, beside the
            Pilot's next forward and backward pass, with the same results. The GPU's time is shared, that of launching
            is not: use it with `copilot_torch_compile`. Memory is needed for both at a time. In one process, on CUDA
            alone. It has not been run on a GPU yet.
        copilot_save_mistake_log (`bool`, defaults to `True`): Save the log in checkpoints. Without it the Pilot still
            resumes exactly, the Copilot with an empty log. It may be large, and holds token ids of the training data.
        copilot_mistake_ledger (`bool`, defaults to `True`): Write a ledger of the run into `output_dir`, 12 bytes for
            each labelled token of each epoch: its row, how likely it was, what was likelier. It is never pushed.
            Trainers write it, `CopilotCallback` does not.
        copilot_strength (`str`, *optional*): Where λ comes from. `"config"` leaves the Copilot's own. `"auto"` takes
            the best one on `eval_dataset` when training ends, by NLL; `"auto_accuracy"` by token accuracy (for greedy
            answers; its probabilities may be too sure). None is `"auto"` with an `eval_dataset`; without one, or
            where nothing can be measured on it, λ is 0.5, if the config has its default of 1.
        copilot_predict (`bool`, defaults to `False`): With `predict_with_generate=True` (Seq2Seq), evaluation and
            prediction generate with the Copilot.
        copilot_start_fresh (`bool`, defaults to `False`): On resuming from a checkpoint that holds no Copilot, start a
            fresh one instead of raising an error.

    Raises:
        ValueError: For a value that is not among a field's choices or out of its range, or one that would do nothing.
    """

    copilot_learning_rate: float = field(
        default=3e-4, metadata={"help": "Peak learning rate of the Copilot's own AdamW; its schedule is the Pilot's."}
    )
    copilot_weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of the Copilot's matrices."})
    copilot_max_grad_norm: float = field(
        default=1.0, metadata={"help": "The Copilot's gradient is clipped to this norm; 0 does not clip."}
    )
    copilot_steps_per_round: int = field(
        default=4, metadata={"help": "The Copilot's optimizer steps for one of the Pilot's."}
    )
    copilot_mistake_source: str = field(
        default="train",
        metadata={
            "help": "Whose errors are logged: all of training, its first epoch, or a slice held out from it.",
            "choices": ["train", "first_visit", "holdout"],
        },
    )
    copilot_holdout: float = field(
        default=0.1, metadata={"help": "Share of train_dataset that is held out for the Mistake Log."}
    )
    copilot_log_rounds: int = field(
        default=128, metadata={"help": "Rounds (optimizer steps) that the Mistake Log keeps."}
    )
    copilot_log_max_bytes: int = field(
        default=2**30, metadata={"help": "Bound on the Mistake Log in CPU memory, in bytes."}
    )
    copilot_log_dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "Type of the hidden states in the Mistake Log.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    copilot_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute the Copilot's activations in the backward pass."}
    )
    copilot_torch_compile: bool = field(
        default=False, metadata={"help": "Compile the Copilot's blocks, with the Pilot's torch_compile_backend."}
    )
    copilot_own_stream: bool = field(
        default=False,
        metadata={"help": "Run the Copilot's steps on a CUDA stream of their own, beside the Pilot's next pass."},
    )
    copilot_save_mistake_log: bool = field(
        default=True,
        metadata={"help": "Save the Mistake Log (with token ids of the training data) in checkpoints."},
    )
    copilot_mistake_ledger: bool = field(
        default=True,
        metadata={"help": "Write a ledger of every labelled token's likelihood, 12 bytes each, into output_dir."},
    )
    copilot_strength: str | None = field(
        default=None,
        metadata={
            "help": "λ is the config's, or the best on eval_dataset when training ends: by NLL (the default with "
            "an eval_dataset), or by token accuracy. By default 0.5 without an eval_dataset.",
            "choices": ["config", *AUTO_STRENGTHS],
        },
    )
    copilot_predict: bool = field(
        default=False,
        metadata={"help": "With predict_with_generate=True, evaluation and prediction generate with the Copilot."},
    )
    copilot_start_fresh: bool = field(
        default=False,
        metadata={"help": "On resuming from a checkpoint that holds no Copilot, start a fresh one."},
    )

    def __post_init__(self):
        for option in fields(CopilotArguments):
            choices = option.metadata.get("choices")
            if choices is not None and getattr(self, option.name) not in [*choices, option.default]:
                hint = FIXED_STRENGTH if option.name == "copilot_strength" else ""
                raise ValueError(f"{option.name}={getattr(self, option.name)!r}: choose one of {choices}.{hint}")
        check_ranges(
            self.copilot_steps_per_round,
            self.copilot_learning_rate,
            self.copilot_weight_decay,
            self.copilot_max_grad_norm,
            prefix="copilot_",
        )
        check_bounds(self.copilot_log_rounds, self.copilot_log_max_bytes)
        if not 0 < self.copilot_holdout < 1:
            raise ValueError(f"copilot_holdout={self.copilot_holdout}: it is a share between 0 and 1.")
        if self.copilot_holdout != CopilotArguments.copilot_holdout and self.copilot_mistake_source != "holdout":
            raise ValueError(
                f"copilot_holdout={self.copilot_holdout} holds nothing out while copilot_mistake_source="
                f"{self.copilot_mistake_source!r}: set copilot_mistake_source='holdout', or leave it out."
            )
        if least_is_best(getattr(self, "metric_for_best_model", None)) and self.greater_is_better is None:
            self.greater_is_better = False
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()


@dataclass
class CopilotSFTConfig(CopilotArguments, SFTConfig):
    """[`trl.SFTConfig`] with the fields of [`CopilotArguments`]."""


@dataclass
class CopilotSeq2SeqConfig(CopilotArguments, Seq2SeqTrainingArguments):
    """[`transformers.Seq2SeqTrainingArguments`] with the fields of [`CopilotArguments`]."""

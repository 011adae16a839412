"""The same learner for a Trainer that can't be subclassed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..model.configuration_copilot import CopilotConfig
from ..model.modeling_copilot import CopilotModel
from ..pilot.forward_arguments import ForwardArguments
from ..pilot.inspect import unwrap
from .checkpoint import STATE_FOLDER, save_state, save_weights
from .learner import CopilotLearner
from .lifecycle import CopilotLifecycle, make_copilot, make_learner
from .refusals import check_callback, check_callback_arguments
from .training_args import CopilotArguments


class CopilotCallback(CopilotLifecycle):
    """Co-trains a Copilot in any `transformers.Trainer`: `Trainer(..., callbacks=[CopilotCallback()])`.

    It reads the labels and masks that the Pilot's forward is given in training. What a callback can't do, and
    [`CopilotTrainer`] does: metrics in evaluation, choosing λ, `load_best_model_at_end` (it raises), pushing during
    training, finding torn checkpoints, saving at once (`enable_jit_checkpoint`), removing its hooks when training ends
    with an exception (call [`close`]), and putting its training metrics before reporters that were added earlier (they
    are in `trainer.state.log_history`). A resumed run takes the Copilot up from `output_dir/checkpoint-<step>`; a
    second `train()` trains the same Copilot on.

    Args:
        copilot, copilot_peft_config: As in [`CopilotTrainer`].
        copilot_args: The fields that begin with `copilot_`; by default those of the trainer's own `args`, if it has
            them.

    Raises:
        ValueError, NotImplementedError: Here or when training begins, for anything that is not supported; the message
            says what to use instead.
    """

    learner_class = CopilotLearner
    way_to_choose = "Choose it with hf_copilot.calibrate_on_rows(pilot, callback.copilot, rows)"

    def __init__(
        self,
        copilot: CopilotModel | CopilotConfig | str | os.PathLike | None = None,
        copilot_args: CopilotArguments | None = None,
        copilot_peft_config: PeftConfig | None = None,
    ):
        self.given, self.given_args, self.copilot_peft_config = copilot, copilot_args, copilot_peft_config
        super().__init__(None, copilot_args if copilot_args is not None else CopilotArguments())
        check_callback_arguments(self.copilot_args)
        self.handles: list[RemovableHandle] = []
        self._watch: Any = None

    @property
    def copilot(self) -> CopilotModel:
        """The Copilot; there is one from the start of training on."""
        if self.learner is None:
            raise ValueError("There is no Copilot before training has begun.")
        return self.learner.exported()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the Pilot has its hooks: there they stay silent, and hold nothing."""
        return {"learner": None, "handles": [], "_watch": None}

    def close(self) -> None:
        """Remove all hooks from the Pilot; call it yourself if training ended with an exception."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.learner is not None:
            self.learner.close()

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        check_callback(args, model)
        self.close()
        if self.given_args is None:
            self.use(args if isinstance(args, CopilotArguments) else CopilotArguments())
        check_callback_arguments(self.copilot_args)
        if self.learner is None or self.learner.head.pilot is not unwrap(model):  # else it is trained further
            copilot = make_copilot(self.given, model, processing_class)
            self.learner = make_learner(
                copilot, model, args, self.copilot_args, self.copilot_peft_config, self.learner_class
            )
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.checkpoint = checkpoint if state.global_step else None
        super().on_train_begin(args, state, control, **kwargs)
        base = unwrap(model)
        self.forward_arguments = ForwardArguments(base)
        self.handles = [
            base.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            base.register_forward_hook(self._after_forward, always_call=True),
        ]

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._watch = None
        if not model.training or self.learner is None or not torch.is_grad_enabled():
            return
        inputs = self.forward_arguments.named(args, kwargs)
        if inputs.get("labels") is None:
            raise ValueError(
                "CopilotCallback found no `labels` in the Pilot's forward (label smoothing, compute_loss_func or a "
                "compute_loss of your own hold them back): leave these off, or use CopilotTrainer."
            )
        self._watch = self.learner.observe(inputs)
        self._watch.__enter__()

    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        watch, self._watch = self._watch, None
        if watch is not None and output is not None:
            watch.__exit__(None, None, None)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs:
            metrics = self.learner.pop_metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_weights(self.learner, checkpoint)
        if not args.save_only_model:
            own = self.copilot_args.copilot_save_mistake_log, args.should_save
            save_state(self.learner, checkpoint / STATE_FOLDER, *own)

    def on_train_end(self, args, state, control, **kwargs):
        save_weights(self.learner, args.output_dir)
        self.close()

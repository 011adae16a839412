"""The trainer of encoder-decoders that co-trains a Copilot: what it generates, and what it measures there."""

from __future__ import annotations

import contextlib

import torch
from transformers import LogitsProcessorList, Seq2SeqTrainer
from transformers.utils import logging

from ..generation.logits_processor import CopilotLogitsProcessor
from .trainer import CopilotMixin

logger = logging.get_logger(__name__)


class CopilotSeq2SeqTrainer(CopilotMixin, Seq2SeqTrainer):
    """[`transformers.Seq2SeqTrainer`], and beside the Pilot that it fine-tunes a Copilot learns from its mistakes.

    As [`CopilotTrainer`], for encoder-decoders (T5, FLAN-T5, BART, ...). With `predict_with_generate=True` generation
    is the Pilot's own, or the rectified one with `CopilotSeq2SeqConfig(copilot_predict=True)`; none of it is recorded.

    Takes every argument of Seq2SeqTrainer, and `copilot` and `copilot_peft_config` of [`CopilotTrainer`]; raises as
    that does.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.model_accepts_loss_kwargs and self.args.gradient_accumulation_steps * self.args.world_size > 1:
            logger.warning(
                f"{type(self.model).__name__} gives the mean loss of a micro-batch, and Trainer takes it for part of "
                "the whole batch's: gradients grow with gradient_accumulation_steps and processes, with a Copilot and "
                "without. Left as it is; to set it right: trainer.model_accepts_loss_kwargs = False."
            )

    @contextlib.contextmanager
    def _rectified(self, gen_kwargs):
        """The arguments of `generate`, with the Copilot's processor among them where it is asked for."""
        if not (self.args.predict_with_generate and self.copilot_args.copilot_predict):
            yield gen_kwargs
            return
        with CopilotLogitsProcessor(self.copilot, self.model) as processor:
            processors = LogitsProcessorList([*(gen_kwargs.get("logits_processor") or []), processor])
            yield gen_kwargs | {"logits_processor": processors}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **gen_kwargs):
        with self._rectified(gen_kwargs) as gen_kwargs:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        if self.args.predict_with_generate and not prediction_loss_only and "labels" in inputs:
            with torch.no_grad():  # the parent calls the model itself here, behind the forwards of generate
                self.compute_loss(model, self._prepare_inputs(inputs))
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test", **gen_kwargs):
        with self._rectified(gen_kwargs) as gen_kwargs:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)

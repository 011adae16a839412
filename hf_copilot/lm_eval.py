"""Pilot + Copilot as a model of lm-evaluation-harness (the extra `lm-eval`), under the name `hf-copilot`.

    import hf_copilot.lm_eval  # registers it
    lm_eval.simple_evaluate("hf-copilot", model_args="pretrained=out,copilot=out/copilot", tasks=["gsm8k"])

Generated text is rectified by a [`CopilotLogitsProcessor`], likelihoods by [`score`]: the Copilot's run begins at the
continuation, and what comes before it is memory alone. A rolling window is one run. Several processes
(`accelerate launch`) share the documents, on any device; with a Pilot that is passed as an object, after
`lm.accelerator = Accelerator()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from .generation.logits_processor import CopilotLogitsProcessor
from .model.modeling_copilot import CopilotModel
from .pilot.compatibility import check_pilot
from .training.records import IGNORE
from .training.teacher_forced import RowScore, TeacherForced

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context and continuation


@register_model("hf-copilot")
class CopilotLM(HFLM):
    """lm-eval's own `hf` model, rectified.

    Args:
        pretrained: The Pilot, as for `hf`; every other argument of `hf` holds too.
        copilot: A folder, a Hub id, or a [`CopilotModel`].
        strength: λ; None for the Copilot's own. At 0 every answer is that of `hf`, to the last digit.
        copilot_revision, copilot_subfolder: Of the Copilot on the Hub. A pushed run has it in `copilot`.

    Raises:
        ValueError: If the Copilot does not fit the Pilot, or λ is negative or not finite.
        NotImplementedError: With `tp_plan`, where no process has the whole head.
    """

    def __init__(
        self,
        pretrained: Any,
        copilot: str | CopilotModel,
        strength: float | None = None,
        copilot_revision: str = "main",
        copilot_subfolder: str = "",
        **kwargs: Any,
    ):
        if kwargs.get("tp_plan") is not None:
            raise NotImplementedError("hf-copilot needs the Pilot's whole head: use parallelize=True, not tp_plan.")
        super().__init__(pretrained, **kwargs)
        if not isinstance(copilot, CopilotModel):
            places = {"revision": copilot_revision, "subfolder": copilot_subfolder}
            copilot = CopilotModel.from_pretrained(copilot, **places)
        self.copilot = copilot.to(self.model.get_output_embeddings().weight.device)
        check_pilot(self.copilot, self.model, self.tokenizer)
        self.strength = self.copilot.config.strength_or_own(strength)

    def get_model_info(self) -> dict[str, Any]:
        return super().get_model_info() | {"copilot_strength": self.strength, "copilot": self.copilot.name_or_path}

    @property
    def rank(self) -> int:
        """Of this process among all. (`hf` has one on several GPUs alone, that on its machine.)"""
        return self.accelerator.process_index if hasattr(self, "accelerator") else 0

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes if hasattr(self, "accelerator") else 1

    # ---- text ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        with CopilotLogitsProcessor(self.copilot, self.model, self.strength, self.tokenizer) as self.processor:
            return super().generate_until(requests, disable_tqdm)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """`[B, n]` -> `[B, max_length at most]`, token ids."""
        return super()._model_generate(context, max_length, stop, logits_processor=[self.processor], **kwargs)

    # ---- likelihoods -----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-likelihood, and whether greedy decoding gives it."""
        if not self.strength:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        batch_size, title = override_bs or self.batch_size, None if disable_tqdm or self.rank else "Scoring"
        if batch_size == "auto":
            scores = find_executable_batch_size(self._score, self.max_batch_size)(rows, title)
        else:
            scores = self._score(batch_size, rows, title)
        answers = [(score.log_likelihoods.sum().item(), bool(score.is_likeliest.all())) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # else a window, whose sum is kept by `loglikelihood_rolling`
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _row(self, context: list[int], continuation: list[int]) -> dict[str, list[int]]:
        """As `hf` cuts it: a decoder reads the last `max_length` tokens before the last one."""
        if self.backend == "seq2seq":
            return {"input_ids": context[-self.max_length :], "labels": continuation[-self.max_length :]}
        ids = (context + continuation)[-self.max_length - 1 :]
        return {"input_ids": ids, "labels": [IGNORE] * (len(ids) - len(continuation)) + continuation}

    def _score(self, batch_size: int, rows: Sequence[dict[str, list[int]]], title: str | None) -> list[RowScore]:
        dtype = self.mixed_precision_dtype
        with (
            torch.autocast(self.device.type, dtype, enabled=dtype is not None),
            TeacherForced(self.copilot, self.model, dtype) as forced,
        ):
            return forced.score(rows, [self.strength], batch_size, title)

"""The Copilot inside the standard `model.generate`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.utils import logging

from ..model.configuration_copilot import check_strength
from ..model.discrepancy import fuse
from ..model.modeling_copilot import CopilotModel
from ..pilot.compatibility import check_pilot
from ..pilot.inspect import unwrap
from .cuda_graphs import recorder
from .rectifier import Rectifier, pad_to_vocabulary

logger = logging.get_logger(__name__)


class CopilotLogitsProcessor(LogitsProcessor):
    """Rectifies the Pilot's scores at every step of `generate` (Eq. 8, or its form in logit space).

        with CopilotLogitsProcessor(copilot, pilot) as processor:
            pilot.generate(**inputs, logits_processor=[processor], num_beams=4)

    Works with greedy search, sampling, beams, left-padded batches, static and kept caches, streamers and pipelines.
    Its hooks on the Pilot go when the block ends, on [`detach`], or when the processor is garbage-collected. Scores
    that are NaN stay NaN. Generating on from where the last call stopped continues it, as if there had been one call,
    and so does a text that is one given token longer; any other text starts anew, and so does another processor.

    Args:
        copilot: Trained beside this Pilot or one like it; it may live on another device and in another type.
        pilot: The model that generates, PEFT-wrapped or not.
        strength: λ, finite and >= 0; None for the one in the Copilot's config. 0 gives back the scores untouched.
        tokenizer: The Pilot's; lets [`check_pilot`] see that both share one vocabulary.
        cuda_graphs: Record the Copilot's step of one more token as a CUDA graph, anew when the number of rows changes,
            and replay it: one launch on the GPU instead of hundreds. The Copilot runs without autocast then.

    Raises:
        ValueError: If the Copilot does not fit the Pilot, if λ is negative or not finite, if it is on no GPU and
            `cuda_graphs` is asked for, and in use if it is called for tokens that the Pilot has not just been run on
            (assisted decoding, prompt lookup, guidance_scale).
        NotImplementedError: For a Pilot that is sharded, offloaded at its head, has virtual tokens, or is no language
            model of one piece.
    """

    def __init__(
        self,
        copilot: CopilotModel,
        pilot: nn.Module,
        strength: float | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        cuda_graphs: bool = False,
    ):
        check_pilot(copilot, pilot, tokenizer)
        self._strength = copilot.config.strength_or_own(strength)
        self.fusion = copilot.config.fusion
        record = recorder(copilot.device) if cuda_graphs else None
        self.rectifier = Rectifier(copilot, pilot, record) if self.strength else None
        if self.strength:
            warn_if_left_behind(copilot.device, unwrap(pilot).device)
        self._finalizer = weakref.finalize(self, self.rectifier.close if self.rectifier else lambda: None)

    @property
    def strength(self) -> float:
        """λ; it can be set, but for a processor that was made at 0 and has no hooks."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if check_strength(value) and self.rectifier is None:
            raise ValueError("This processor was made at λ = 0, without hooks: make one with strength=... instead.")
        self._strength = value

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `[R, V]` for the token after `input_ids` `[R, n]` -> rectified scores `[R, V]`."""
        if self.rectifier is None:
            return scores
        correction = self.rectifier.correction(input_ids).to(scores.device)
        return fuse(scores, pad_to_vocabulary(correction, scores.shape[-1]), self.strength, self.fusion)

    def detach(self) -> None:
        """Remove the hooks from the Pilot; the processor can't be used any more."""
        self._finalizer()

    def __enter__(self) -> CopilotLogitsProcessor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        try:
            if kind is None and self.rectifier is not None:
                self.rectifier.follower.settle()
        finally:
            self.detach()


def warn_if_left_behind(copilot: torch.device, pilot: torch.device) -> None:
    """Where the Pilot is on an accelerator and the Copilot was not moved there."""
    if copilot.type == "cpu" and pilot.type not in ("cpu", "meta"):
        logger.warning_once(
            "The Copilot is on the CPU and its Pilot on %s, so every token waits for the CPU. Move it before it is "
            "given to a processor: copilot.to(pilot.device).",
            pilot,
        )

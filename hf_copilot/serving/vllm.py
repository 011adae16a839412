"""A Copilot in vLLM (0.32 or newer), whose server loads this class by its name:

    vllm serve out --logits-processors hf_copilot.serving.vllm:CopilotProcessor

vLLM has two model runners, and each an interface for processors of its own. The first tells of every change of the
batch, and has tokens in lists. The second has slots that are written anew, and tokens on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor

from ..model.configuration_copilot import CopilotConfig
from ..model.modeling_copilot import CopilotModel
from .batch_rectifier import BatchRectifier
from .refusals import SETTINGS, check_engine, check_tokens, strength_of
from .requests import Lists, Request, Slots, Turn

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState


class CopilotProcessor(LogitsProcessor, SlotLogitsProcessor):
    """Rectifies the Pilot's logits for every request (Eq. 8, or its form in logit space).

    The Copilot is the one in `copilot/` beside the Pilot's weights, where the trainers save it, or the folder or Hub
    id in `additional_config={"copilot": ...}`. λ is the one in its config, or `"copilot_strength"` in
    `additional_config`; of a request, the one in `SamplingParams(extra_args={"copilot_strength": 0.5})`. 0 leaves its
    logits untouched.

    Raises:
        NotImplementedError: When the engine starts, for what can't be served rightly (serving/refusals.py).
        ValueError: Likewise for a Copilot that can't be found or does not fit, and for a request with another λ than a
            finite number >= 0.
    """

    def __init__(self, vllm_config: VllmConfig, *engine: Any):
        """`engine` is `(device, is_pin_memory)` of the first runner, `(req_states,)` of the second."""
        self.states: LogitsProcRequestState | None = engine[0] if len(engine) == 1 else None
        device = engine[0] if self.states is None else self.states.device
        config, place = find_copilot(vllm_config)
        check_engine(config, vllm_config, sees_raw_logits=self.states is None)
        model, settings = vllm_config.model_config, vllm_config.additional_config
        check_tokens(config, vllm_config, cached_tokenizer_from_config(model))
        self.strength = strength_of(settings, config.strength, SETTINGS)
        copilot = CopilotModel.from_pretrained(**place).to(device)
        requests = vllm_config.scheduler_config.max_num_seqs
        read = self._read_lists if self.states is None else self._read_states
        self.rectifier = BatchRectifier(copilot, read, requests, model.max_model_len)
        # One that is pushed out comes in again before any new one. So at most all others that run can leave before it;
        # twice as many are kept, for those that waited for their grammar in front of it.
        self.slots = Slots(self.rectifier.free, 0 if config.copilot_input == "token" else 2 * requests)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise a `ValueError` for a request's λ that is none."""
        strength_of(sampling_params.extra_args, 1.0)

    def is_argmax_invariant(self) -> bool:
        return False

    def _new_request(self, params: SamplingParams, prompt_length: int, source: Any) -> Request | None:
        """None where the Copilot is switched off."""
        strength = strength_of(params.extra_args, self.strength)
        return Request(prompt_length, strength, source) if strength else None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """The logits `[R, V]` float32, rectified in place."""
        return self.rectifier.rectify(logits, self._turns_of_rows(len(logits)) if ctx is None else self._turns_of(ctx))

    # ---- the first runner: a batch that is changed, tokens in lists -------------------------------------------------

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        added = [
            (slot, self._new_request(params, len(prompt), Lists(prompt, output)))
            for slot, params, prompt, output in batch_update.added
        ]
        moved = [(start, end, kind is MoveDirectionality.SWAP) for start, end, kind in batch_update.moved]
        self.slots.update(batch_update.removed, added, moved)

    def _turns_of_rows(self, rows: int) -> list[Turn]:
        found = ((row, self.slots.of.get(row)) for row in range(rows))
        return [Turn(row, request, len(request.source)) for row, request in found if request is not None]

    def _read_lists(self, requests: Sequence[Request], starts: Sequence[int], size: int) -> torch.Tensor:
        tokens = [request.source.read(start, start + size) for request, start in zip(requests, starts, strict=True)]
        return torch.tensor(tokens, device=self.rectifier.copilot.device)  # [R, size]

    # ---- the second runner: slots that are written anew, tokens on the device ---------------------------------------

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        request = self._new_request(sampling_params, int(self.states.prompt_len.np[req_idx]), req_idx)
        self.slots.update((), [(req_idx, request)])
        return request is not None

    def _turns_of(self, ctx: LogitsContext) -> list[Turn]:
        """Of those whose prompt is read to its end. What is held of requests that are not in this batch goes: nobody
        says whether they are done."""
        slots, lengths = ctx.idx_mapping_np.tolist(), ctx.seq_lens_upper_bound_np.tolist()
        for slot in self.slots.of.keys() - set(slots):
            self.rectifier.free(self.slots.of[slot])
        turns = []
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            if slot in self.slots.of and length >= self.states.prefill_len.np[slot]:
                turns.append(Turn(row, self.slots.of[slot], length))
        return turns

    def _read_states(self, requests: Sequence[Request], starts: Sequence[int], size: int) -> torch.Tensor:
        tokens = self.states.all_token_ids.gpu
        slots = torch.tensor([request.source for request in requests], device=tokens.device)[:, None]  # [R, 1]
        first = torch.tensor(starts, device=tokens.device)[:, None]  # [R, 1]
        return tokens[slots, first + torch.arange(size, device=tokens.device)].long()  # [R, size]


def find_copilot(vllm_config: VllmConfig) -> tuple[CopilotConfig, dict[str, str]]:
    """A Copilot's config, and the arguments that load it."""
    model, named = vllm_config.model_config, vllm_config.additional_config.get("copilot")
    place = {"pretrained_model_name_or_path": named or model.model}
    if named is None:
        place["subfolder"] = "copilot"
        if model.revision is not None:
            place["revision"] = model.revision
    try:
        return CopilotConfig.from_pretrained(**place), place
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No Copilot in {named or f'copilot/ beside {model.model}'}: name its folder or Hub id, "
            f"""--additional-config '{{"copilot": "out/copilot"}}'. {error}"""
        ) from error

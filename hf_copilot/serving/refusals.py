"""What can't be served rightly is refused when the engine starts. Rules and texts; they read vLLM's config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..model.configuration_copilot import CopilotConfig, check_strength
from ..pilot.compatibility import check_architecture, check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.config import VllmConfig

STRENGTH = "copilot_strength"  # λ of the server, or of a request
SETTINGS = ("copilot", STRENGTH)  # of the server
IN_TRANSFORMERS = "or generate with transformers, model.generate(..., logits_processor=[CopilotLogitsProcessor(...)])"


def check_engine(config: CopilotConfig, vllm_config: VllmConfig, sees_raw_logits: bool) -> None:
    """Raise if vLLM can't serve this Copilot, as it is started.

    Args:
        sees_raw_logits: Whether a processor is shown logits before penalties, and is told what it lost at preemption:
            vLLM's first model runner does so, the second does not.

    Raises:
        NotImplementedError: With what to use instead.
    """
    _check_copilot(config)
    _check_parallelism(vllm_config)
    model = vllm_config.model_config
    if model.is_encoder_decoder or model.is_multimodal_model or model.enable_prompt_embeds:
        raise NotImplementedError(
            "A Copilot reads the token ids of a decoder, and this Pilot reads more than text, has an encoder, or is "
            f"given embeddings (enable_prompt_embeds): serve a language model alone, {IN_TRANSFORMERS}."
        )
    if config.copilot_input != "token":
        _check_discrepancies_stay(config, vllm_config, sees_raw_logits)


def check_tokens(
    config: CopilotConfig, vllm_config: VllmConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise a `ValueError` if the served model has other tokens than the Copilot; warn as [`check_pilot`] does."""
    model = vllm_config.model_config
    check_vocabulary(config, model.get_vocab_size(), tokenizer)
    check_architecture(config, model.hf_text_config.model_type)


def strength_of(settings: dict[str, Any] | None, default: float, known: tuple[str, ...] = (STRENGTH,)) -> float:
    """λ among the settings of a server or a request.

    Raises:
        ValueError: If it is no finite number >= 0, or another setting begins with `copilot`.
    """
    settings = settings or {}
    unknown = [name for name in settings if name.startswith("copilot") and name not in known]
    if unknown:
        raise ValueError(f"{unknown}: the settings of a Copilot are {', '.join(known)}.")
    strength = settings.get(STRENGTH, default)
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise ValueError(f"{STRENGTH}={strength!r}: λ is a number.")
    return check_strength(float(strength))


def _check_copilot(config: CopilotConfig) -> None:
    if config.vocab_projection == "pilot":
        raise NotImplementedError(
            "This Copilot uses its Pilot's vocabulary matrices, which vLLM lends no processor: train one with "
            f"CopilotConfig(), which has its own, {IN_TRANSFORMERS}."
        )
    if config.reads_states:
        raise NotImplementedError(
            "This is a state Copilot (memory='pilot'), and vLLM shows a processor none of the Pilot's hidden states: "
            f"train a token Copilot, CopilotConfig(memory='tokens'), {IN_TRANSFORMERS}."
        )
    if config.error_feedback == "predicted" and config.copilot_input != "token":
        raise NotImplementedError(
            "error_feedback='predicted' feeds the Copilot its own last correction, which is lost at preemption: use "
            f"error_feedback='realized' or copilot_input='token', {IN_TRANSFORMERS}."
        )


def _check_parallelism(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        raise NotImplementedError(
            "With speculative decoding rows of logits are of drafts, which a Copilot does not follow: leave "
            "speculative_config out."
        )
    if parallel.pipeline_parallel_size > 1 or parallel.tensor_parallel_size > 1:
        raise NotImplementedError(
            "A Copilot is served beside a Pilot in one process, and this engine spreads the Pilot "
            f"(pipeline_parallel_size={parallel.pipeline_parallel_size}, "
            f"tensor_parallel_size={parallel.tensor_parallel_size}): leave both at 1, and start more engines "
            "(data_parallel_size)."
        )


def _check_discrepancies_stay(config: CopilotConfig, vllm_config: VllmConfig, sees_raw_logits: bool) -> None:
    """A Copilot that is fed discrepancies needs the Pilot's own logits, and those of a request that comes back after
    its preemption: it must come back soon, and be known by its tokens."""
    way_out = (
        f"and this Copilot reads discrepancies (copilot_input={config.copilot_input!r}): train one with "
        "CopilotConfig(copilot_input='token'), which reads tokens alone"
    )
    if not sees_raw_logits:
        raise NotImplementedError(
            "vLLM's second model runner shows a processor logits after penalties, and not which request came back "
            f"after preemption, {way_out}, or start the engine with VLLM_USE_V2_MODEL_RUNNER=0."
        )
    policy = vllm_config.scheduler_config.policy
    if policy != "fcfs":
        raise NotImplementedError(
            f"With scheduling_policy={policy!r} a request that is pushed out may come back after any number of "
            f"others, {way_out}, or leave the policy at 'fcfs'."
        )
    if vllm_config.lora_config is not None or vllm_config.kv_transfer_config is not None:
        raise NotImplementedError(
            "With LoRA requests or a KV connector two requests of the same tokens may have other distributions, "
            f"{way_out}, or leave enable_lora and kv_transfer_config out."
        )

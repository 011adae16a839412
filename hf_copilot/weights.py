"""A Copilot for a Pilot: its sizes and its first weights, taken over from a decoder by parameter name."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .configuration_copilot import CopilotConfig
from .modeling_copilot import CopilotModel
from .pilot_tap import PilotHead, find_layers, isolated_rng, unwrap

# Families whose block is the Copilot's own: pre-norm RMSNorm, gated MLP, plain scaled attention (rotary left out).
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")


def copilot_for(pilot: nn.Module, config: CopilotConfig | None = None) -> CopilotModel:
    """Build the Copilot of a Pilot. The global random state is left as it was.

    Args:
        pilot: A causal LM, PEFT-wrapped and quantised ones included.
        config: Sizes left at None come from the source that `config.init` names. Not changed.

    Returns:
        A float32 Copilot on the CPU, in training mode.

    Raises:
        ValueError: If weights can't be taken over from the source; the message names the way out.
    """
    config = copy.deepcopy(config) if config is not None else CopilotConfig()
    base = unwrap(pilot)
    config.vocab_size = PilotHead(pilot).vocab_size
    config.pilot_hidden_size = base.config.get_text_config().hidden_size
    config.pilot_model_type = base.config.get_text_config().model_type
    if config.init == "random":
        _fill_sizes(config, base.config.get_text_config(), len(find_layers(base)[1]))
        return _build(config)
    source = base if config.init == "pilot" else AutoModelForCausalLM.from_pretrained(config.init)
    return _take_over(config, source)


def _take_over(config: CopilotConfig, source: nn.Module) -> CopilotModel:
    """A Copilot whose layers, norm and embedding are the source's; heads, start vector and alignment are new."""
    decoder, layers = find_layers(source)
    source_config = source.config.get_text_config()
    states = [block_state(layer) for layer in layers]
    if source_config.model_type not in FAMILIES:
        raise ValueError(_no_way(config, f"the family {source_config.model_type!r} is not among {FAMILIES}"))
    config.attention_bias = "attention.q_proj.bias" in states[0]
    config.attention_output_bias = "attention.o_proj.bias" in states[0]
    config.mlp_bias = "mlp.up_proj.bias" in states[0]
    config.qk_norm = "attention.q_norm.weight" in states[0]
    config.rms_norm_eps = source_config.rms_norm_eps
    _fill_sizes(config, source_config, len(layers))
    copilot = _build(config)
    picked = torch.linspace(0, len(layers) - 1, config.num_hidden_layers).round().int().tolist()
    for layer, index in zip(copilot.layers, picked, strict=True):
        state = dict(states[index])
        if layer.layer_type == "cross":
            state["memory_layernorm.weight"] = state["input_layernorm.weight"]
        _load(layer, state, config)
    _load(copilot.norm, {"weight": decoder.norm.weight}, config)
    _copy_embedding(copilot, source.get_input_embeddings().weight)
    return copilot


def block_state(layer: nn.Module) -> dict[str, torch.Tensor]:
    """A decoder layer's plain weights under the Copilot's names: adapters dropped, quantised weights dequantised."""
    state = {}
    for name, parameter in layer.named_parameters():
        if "lora_" in name or ".original_module." in name:
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and is_quantized(layer.get_submodule(owner)):
            parameter = dequantized(layer.get_submodule(owner))
        clean = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
        state[clean.replace("self_attn.", "attention.")] = parameter.detach()
    return state


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight in another form than a floating-point matrix."""
    weight = module.weight
    return isinstance(module, nn.Linear) and not (
        weight.is_floating_point() and weight.ndim == 2 and weight.shape[1] == module.in_features
    )


@torch.no_grad()
def dequantized(linear: nn.Linear) -> torch.Tensor:
    """The weight `[out, in]` of a quantised layer, whatever the kind: what it makes of the identity matrix."""
    was_training = linear.training
    linear.train()  # bitsandbytes repacks weights on a CPU for inference, and can't train on them any more
    zero, identity = torch.zeros(1, linear.in_features), torch.eye(linear.in_features)
    device = linear.weight.device
    weight = (linear(identity.to(device)) - linear(zero.to(device))).T
    linear.train(was_training)
    return weight


def _fill_sizes(config: CopilotConfig, source: PreTrainedConfig, num_source_layers: int) -> None:
    """Set the sizes that the user left open to the source's."""
    if config.num_hidden_layers is None:
        config.num_hidden_layers = num_source_layers
    shares_width = config.hidden_size in (None, source.hidden_size)
    for name in _SIZES:
        if getattr(config, name) is None and (shares_width or name == "num_attention_heads"):
            setattr(config, name, getattr(source, name, None))
    if config.init != "random":
        config.hidden_act = source.hidden_act
    config.intermediate_size = config.intermediate_size or 4 * config.hidden_size
    config.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
    config.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads


def _build(config: CopilotConfig) -> CopilotModel:
    with isolated_rng(torch.device("cpu")):
        return CopilotModel(config).float().train()


def _load(module: nn.Module, state: dict[str, torch.Tensor], config: CopilotConfig) -> None:
    """Copy `state` into `module`, which must have exactly these tensors in these shapes."""
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) + [
        name for name in own.keys() & state.keys() if own[name].shape != state[name].shape
    ]
    if wrong:
        raise ValueError(_no_way(config, f"these weights do not fit the Copilot's layer: {wrong}"))
    module.load_state_dict(state)


@torch.no_grad()
def _copy_embedding(copilot: CopilotModel, embedding: torch.Tensor) -> None:
    """Start the input map from the source's embedding matrix; padding rows beyond it get its mean."""
    weight = copilot.embed_tokens.weight  # [V, d]
    rows = min(len(weight), len(embedding))
    if abs(len(weight) - len(embedding)) > 0.01 * len(weight):
        raise ValueError(
            f"init={copilot.config.init!r} has {len(embedding)} token rows and the Pilot {len(weight)}: this is "
            "another vocabulary. Start from a checkpoint of the Pilot's own family."
        )
    weight[:] = embedding.float().mean(0)
    weight[:rows] = embedding[:rows]


def _no_way(config: CopilotConfig, reason: str) -> str:
    return (
        f"The Copilot can't start from init={config.init!r}: {reason}. Use CopilotConfig(init='random'), or "
        "init='<path or Hub id>' of a checkpoint of the same vocabulary from one of these families."
    )

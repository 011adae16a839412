"""A Copilot for a Pilot: its sizes and its first weights, taken over from a decoder by parameter name."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedTokenizerBase

from ..model.configuration_copilot import CopilotConfig
from ..model.modeling_copilot import CopilotModel
from .compatibility import check_kind, describe_pilot
from .head import PilotHead
from .inspect import find_decoder, find_layers, is_encoder_decoder, isolated_rng, unwrap
from .vocabulary import lent_vocabulary

logger = logging.getLogger(__name__)

# Families whose block is the Copilot's own: pre-norm RMSNorm, MLP, attention (T5's relative positions left out).
LLAMA_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
T5_FAMILIES = ("t5", "mt5")
FAMILIES = LLAMA_FAMILIES + T5_FAMILIES
HEAD_WIDTH = 64  # of attention, where the source has none
COPILOT_NAMES = {  # of a layer's parameters, by the source's; applied one after the other
    "self_attn.": "attention.",
    "layer.0.SelfAttention.": "attention.",
    "layer.0.layer_norm.": "input_layernorm.",
    "layer.1.EncDecAttention.": "cross_attention.",
    "layer.1.layer_norm.": "cross_layernorm.",
    "layer.2.DenseReluDense.": "mlp.",
    "layer.2.layer_norm.": "post_attention_layernorm.",
    "attention.q.": "attention.q_proj.",
    "attention.k.": "attention.k_proj.",
    "attention.v.": "attention.v_proj.",
    "attention.o.": "attention.o_proj.",
    "mlp.wi_0.": "mlp.gate_proj.",
    "mlp.wi_1.": "mlp.up_proj.",
    "mlp.wi.": "mlp.up_proj.",
    "mlp.wo.": "mlp.down_proj.",
}


class DoesNotFit(ValueError):
    """The weights of a source can't be taken over into the Copilot that is asked for."""


def copilot_for(
    pilot: nn.Module, config: CopilotConfig | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> CopilotModel:
    """Build the Copilot of a Pilot. The global random state is left as it was.

    Args:
        pilot: A causal LM or an encoder-decoder, PEFT-wrapped and quantised ones included.
        config: Sizes left at None come from the source that `config.init` names. Not changed; `init=None` becomes
            `"pilot"` or `"random"` in the Copilot's own.
        tokenizer: The Pilot's. Its fingerprint goes into the Copilot's config, by which [`check_pilot`] tells whether
            another Pilot has the same tokens.

    Returns:
        A float32 Copilot on the CPU, in training mode.

    Raises:
        ValueError: If weights can't be taken over from the source that `init` names, or the config asks for another
            kind of block than the source's, or other sizes than the Pilot's; the message names the way out.
        NotImplementedError: If the Pilot is no language model of one piece.
    """
    config = copy.deepcopy(config) if config is not None else CopilotConfig()
    base = unwrap(pilot)
    check_kind(base)
    _take_from("the Pilot", config, "vocab_size", PilotHead(pilot).vocab_size)
    _take_from("the Pilot", config, "pilot_is_encoder_decoder", is_encoder_decoder(base))
    _take_from("the Pilot", config, "pilot_hidden_size", base.config.get_text_config().hidden_size)
    config.resolve_defaults()
    if not config.reads_states:
        config.pilot_hidden_size = None
    if config.vocab_projection == "pilot":
        lent_vocabulary(base, torch.device("meta"))  # raises where it can't
    copilot = _start(config, base)
    describe_pilot(copilot.config, pilot, tokenizer)
    return copilot


def _start(config: CopilotConfig, base: nn.Module) -> CopilotModel:
    """The Copilot with its first weights."""
    if config.init is None:
        return _start_where_it_fits(config, base)
    if config.init == "random":
        _fill_sizes(config, base)
        return _build(config)
    if config.init == "pilot":
        return _take_over(config, base)
    loader = AutoModelForSeq2SeqLM if config.pilot_is_encoder_decoder else AutoModelForCausalLM
    return _take_over(config, loader.from_pretrained(config.init))


def _start_where_it_fits(config: CopilotConfig, base: nn.Module) -> CopilotModel:
    """From the Pilot's layers where its block is the Copilot's, else from random weights: with a warning, where it is
    a setting of the user's that does not fit."""
    from_pilot = copy.deepcopy(config)
    from_pilot.init, config.init = "pilot", "random"
    try:
        return _start(from_pilot, base)
    except DoesNotFit as reason:
        if base.config.get_text_config().model_type in FAMILIES:
            logger.warning(f"The Copilot starts from random weights, not from the Pilot's layers: {reason}")
        return _start(config, base)


def _take_over(config: CopilotConfig, source: nn.Module) -> CopilotModel:
    """A Copilot whose layers, norm and embedding are the source's; heads, start vector and alignment are new."""
    source_config = source.config.get_text_config()
    if source_config.model_type not in FAMILIES:
        raise DoesNotFit(_cannot_start(config, f"the family {source_config.model_type!r} is not among {FAMILIES}"))
    layers = find_layers(source)
    first = block_state(layers[0])
    if "mlp.up_proj.weight" not in first:
        raise DoesNotFit(_cannot_start(config, "its weights are stored in a form that is not known (quantised?)"))
    for name, value in _block_settings(source_config, first).items():
        _take_from(f"its source (init={config.init!r})", config, name, value, ", or use init='random'")
    config.intermediate_size = config.intermediate_size or len(first["mlp.up_proj.weight"])
    _fill_sizes(config, source)
    copilot = _build(config)
    picked = torch.linspace(0, len(layers) - 1, config.num_hidden_layers).round().int().tolist()
    for layer, index in zip(copilot.layers, picked, strict=True):
        _load(layer, _layer_state(block_state(layers[index]), layer.layer_type, source), config)
    decoder = find_decoder(source)
    final_norm = decoder.final_layer_norm if source_config.model_type in T5_FAMILIES else decoder.norm
    _load(copilot.norm, {"weight": final_norm.weight}, config)
    if config.vocab_projection == "own":
        _copy_embedding(copilot, source.get_input_embeddings().weight)
    elif config.init == "pilot":
        nn.init.eye_(copilot.input_proj.weight)  # the Pilot's embedding, as it was
    return copilot


def _take_from(owner: str, config: CopilotConfig, name: str, value: Any, way_out: str = "") -> None:
    """Set a field that another model decides, or raise if a user has decided otherwise."""
    given = getattr(config, name)
    if given not in (getattr(CopilotConfig, name), value):
        raise DoesNotFit(f"CopilotConfig.{name}={given!r}, but {owner} has {value!r}: leave it out{way_out}.")
    setattr(config, name, value)


def _block_settings(source: PreTrainedConfig, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of the Copilot's config that say what the source's block computes."""
    is_t5 = source.model_type in T5_FAMILIES
    return {
        "attention_bias": "attention.q_proj.bias" in state,
        "attention_output_bias": "attention.o_proj.bias" in state,
        "attention_scaling": 1.0 if is_t5 else None,
        "mlp_bias": "mlp.up_proj.bias" in state,
        "mlp_gated": "mlp.gate_proj.weight" in state,
        "qk_norm": "attention.q_norm.weight" in state,
        "num_attention_heads": source.num_attention_heads,
        "rope_theta": CopilotConfig.rope_theta if is_t5 else source.rope_parameters["rope_theta"],
        "hidden_act": source.dense_act_fn if is_t5 else source.hidden_act,
        "rms_norm_eps": source.layer_norm_epsilon if is_t5 else source.rms_norm_eps,
    }


def _layer_state(state: dict[str, torch.Tensor], layer_type: str, source: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a source's layer for a layer of the Copilot, with a norm of the memory.

    A decoder-only source norms a layer's input: the memory gets a copy of that norm. An encoder's output comes normed,
    w * x / rms(x): norming it again with the root mean square of w leaves it about as it is.
    """
    if layer_type == "cross" and source.config.is_encoder_decoder:
        kept = {name: tensor for name, tensor in state.items() if name.startswith(("mlp.", "post_", "cross_"))}
        state = {
            name.replace("cross_attention.", "attention.").replace("cross_layernorm.", "input_layernorm."): tensor
            for name, tensor in kept.items()
        }
    if layer_type == "self":
        return state
    memory_norm = state["input_layernorm.weight"]
    if source.config.is_encoder_decoder:
        weight = source.get_encoder().final_layer_norm.weight.detach()
        memory_norm = weight.square().mean().sqrt().expand_as(weight)
    return state | {"memory_layernorm.weight": memory_norm}


def block_state(layer: nn.Module) -> dict[str, torch.Tensor]:
    """A decoder layer's plain weights under the Copilot's names: adapters dropped, quantised weights dequantised; of
    modules that PEFT trains whole those of the active adapter."""
    state, inactive = {}, _inactive_copies(layer)
    adapted = tuple(f"{name}." for name, module in layer.named_modules() if isinstance(module, BaseTunerLayer))
    for name, parameter in layer.named_parameters():
        of_adapter = name.startswith(adapted) and ".base_layer." not in name
        if of_adapter or name.startswith(inactive) or "relative_attention_bias" in name:
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and is_quantized(layer.get_submodule(owner)):
            parameter = dequantized(layer.get_submodule(owner))
        clean = re.sub(r"\.modules_to_save\.[^.]+", "", name.replace(".base_layer", ""))
        for theirs, ours in COPILOT_NAMES.items():
            clean = clean.replace(theirs, ours)
        state[clean] = parameter.detach()
    return state


def _inactive_copies(layer: nn.Module) -> tuple[str, ...]:
    """Where PEFT keeps the copies of a whole module that no forward reads: the first one, and other adapters'."""
    prefixes = []
    for name, module in layer.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            others = set(module.modules_to_save) - set(module.active_adapters)
            prefixes += [f"{name}.original_module.", *(f"{name}.modules_to_save.{other}." for other in others)]
    return tuple(prefixes)


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight in another form than a floating-point matrix."""
    weight = module.weight
    return isinstance(module, nn.Linear) and not (
        weight.is_floating_point() and weight.ndim == 2 and weight.shape[1] == module.in_features
    )


@torch.no_grad()
def dequantized(linear: nn.Linear) -> torch.Tensor:
    """The weight `[out, in]` of a quantised layer, whatever the kind: what it makes of the identity matrix. (PEFT's
    `dequantize_module_weight` knows no 8-bit weight that no forward has been through.)"""
    was_training = linear.training
    linear.train()  # bitsandbytes repacks weights on a CPU for inference, and can't train on them any more
    zero, identity = torch.zeros(1, linear.in_features), torch.eye(linear.in_features)
    device = linear.weight.device
    weight = (linear(identity.to(device)) - linear(zero.to(device))).T
    linear.train(was_training)
    return weight


def _fill_sizes(config: CopilotConfig, model: nn.Module) -> None:
    """Set the sizes that the user left open to the source's, where its width or its heads are the Copilot's too."""
    source = model.config.get_text_config()
    if config.num_hidden_layers is None:
        config.num_hidden_layers = len(find_layers(model))
    shares_width = config.hidden_size in (None, source.hidden_size)
    shares_heads = shares_width and config.num_attention_heads in (None, getattr(source, "num_attention_heads", None))
    shared = ["num_attention_heads"]
    if shares_width:
        shared += ["hidden_size", "intermediate_size"]
    if shares_heads:
        shared += ["num_key_value_heads", "head_dim"]
    for name in shared:
        value = getattr(source, name, None)
        if getattr(config, name) is None and isinstance(value, int):  # Gemma 3n has a list, one for each layer
            setattr(config, name, value)
    if config.num_attention_heads is None:  # beside a state-space model
        config.num_attention_heads = max(config.hidden_size // HEAD_WIDTH, 1)
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
        raise DoesNotFit(_cannot_start(config, f"these weights do not fit the Copilot's layer: {wrong}"))
    module.load_state_dict(state)


@torch.no_grad()
def _copy_embedding(copilot: CopilotModel, embedding: torch.Tensor) -> None:
    """Start the input map from the source's embedding matrix; padding rows beyond it get its mean."""
    weight = copilot.embed_tokens.weight  # [V, d]
    rows = min(len(weight), len(embedding))
    if abs(len(weight) - len(embedding)) > 0.01 * len(weight):
        raise DoesNotFit(
            f"init={copilot.config.init!r} has {len(embedding)} token rows and the Pilot {len(weight)}: this is "
            "another vocabulary. Start from a checkpoint of the Pilot's own family."
        )
    weight[:] = embedding.float().mean(0)
    weight[:rows] = embedding[:rows]


def _cannot_start(config: CopilotConfig, reason: str) -> str:
    return (
        f"The Copilot can't start from init={config.init!r}: {reason}. Use CopilotConfig(init='random'), or "
        "init='<path or Hub id>' of a checkpoint of the same vocabulary from one of these families."
    )

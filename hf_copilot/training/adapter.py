"""A Copilot that is trained with a PEFT adapter: small in training, plain weights when it is saved."""

from __future__ import annotations

import copy

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from ..model.modeling_copilot import CopilotModel


def add_adapter(copilot: CopilotModel, peft_config: PeftConfig, compute_dtype: torch.dtype | None = None) -> PeftModel:
    """Put an adapter into the Copilot, in place. Its new maps are trained in full, and so is the embedding of one that
    started from random weights; the random matrices of its layers are changed by the adapter alone.

    Args:
        compute_dtype: Of autocast, where there is one: frozen matrices are held in it, and not cast at every use.

    Raises:
        ValueError: If it is no config of PEFT, no adapter of weights, lies on the embedding, or can't be merged.
    """
    _check_kind(peft_config)
    peft_config = copy.deepcopy(peft_config)  # PEFT writes into it, and the Pilot may have been given the same
    peft_config.task_type = None
    peft_config.target_modules = peft_config.target_modules or "all-linear"
    if copilot.embed_tokens is not None and check_target_module_exists(peft_config, "embed_tokens"):
        raise ValueError(
            "copilot_peft_config puts an adapter on embed_tokens, which the Copilot reads by its rows: name it in "
            "modules_to_save instead of target_modules."
        )
    maps = [name for name in ("memory_proj", "input_proj") if isinstance(copilot.get_submodule(name), nn.Linear)]
    own = ["embed_tokens"] if copilot.config.init == "random" and copilot.embed_tokens is not None else []
    new = [copilot.last_map, "start", *maps, *own]
    peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), *new})
    names = {*copilot.state_dict()}
    model = get_peft_model(copilot, peft_config)
    _check_merges(model, names, type(peft_config).__name__)
    for parameter in copilot.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in copilot.modules():
        if compute_dtype is not None and isinstance(module, BaseTunerLayer):
            frozen = (p for p in module.get_base_layer().parameters() if not p.requires_grad)
            for parameter in frozen:
                parameter.data = parameter.data.to(compute_dtype)
    return model


def _check_kind(peft_config: PeftConfig) -> None:
    if not isinstance(peft_config, PeftConfig):
        raise ValueError(f"copilot_peft_config={peft_config!r}: pass a config of PEFT, as LoraConfig(r=8) is.")
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"copilot_peft_config={type(peft_config).__name__} adds virtual tokens, and a Copilot has no prompt: use "
            "an adapter of its weights, such as LoraConfig()."
        )


def _check_merges(model: PeftModel, names: set[str], name: str) -> None:
    """Merge a copy, as for saving: what can't be, or leaves other weights than these names', is found out before
    training. With its values, without which some adapters can't be merged."""
    try:
        if merged_copy(model, model.get_base_model().device).state_dict().keys() != names:
            raise ValueError("weights of the adapter are left")
    except Exception as error:
        raise ValueError(
            f"copilot_peft_config={name} can't be merged into the Copilot's weights, as which a Copilot is saved "
            f"({error!r}): use another adapter, such as LoraConfig()."
        ) from error


def merged_copy(model: PeftModel, device: str | torch.device) -> CopilotModel:
    """A Copilot of plain weights, made on `device`, in its own type or a wider one; it shares the config."""
    own = model.get_base_model().norm.weight.dtype
    copies = {
        id(p): nn.Parameter(p.detach().to(device, torch.promote_types(p.dtype, own), copy=True))
        for p in model.parameters()
    }
    merged = copy.deepcopy(model, copies).merge_and_unload()
    merged.config = model.get_base_model().config
    return merged

"""What a Pilot is made of: the model inside its wrappers, its decoder, its layers; and how to leave it undisturbed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule


def unwrap(pilot: nn.Module) -> nn.Module:
    """The language model inside DDP, `torch.compile` and PEFT wrappers."""
    pilot = extract_model_from_parallel(pilot, keep_torch_compile=False)
    return unwrap(pilot.get_base_model()) if isinstance(pilot, PeftModel) else pilot


@contextmanager
def isolated_rng(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Leave the global random state (CPU and every accelerator) as it was; inside, start from `seed` if given."""
    kind = "cuda" if device.type == "cpu" else device.type
    backend = getattr(torch, kind)
    devices = list(range(backend.device_count())) if backend.is_available() else []  # manual_seed seeds them all
    with torch.random.fork_rng(devices, device_type=kind):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A model in eval mode inside, each module as it was afterwards. Layers of bitsandbytes stay in training mode: on
    a CPU they repack their weights for inference, and could not be trained any more."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if type(module).__module__.startswith("bitsandbytes."):
            module.training = True
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """No dropout in the module inside, which draws from the global random state: of its own, and of an adapter that
    drops ranks or all of itself. Every other mode stays."""
    drops = nn.Dropout, BaseTunerLayer
    active = [child for child in module.modules() if isinstance(child, drops) and child.training]
    for dropout in active:
        dropout.training = False
    try:
        yield
    finally:
        for dropout in active:
            dropout.training = True


def is_encoder_decoder(pilot: nn.Module) -> bool:
    """Whether the Pilot, wrapped or not, has an encoder whose output its decoder reads."""
    return getattr(unwrap(pilot).config, "is_encoder_decoder", False)


def find_decoder(pilot: nn.Module) -> nn.Module:
    """The Pilot's decoder, or a `ValueError` if it has none."""
    base = unwrap(pilot)
    if not (hasattr(base, "get_decoder") and base.can_generate()):
        raise ValueError(
            f"{type(base).__name__} has no decoder that generates: use a Pilot that transformers ships as "
            "`...ForCausalLM` or `...ForConditionalGeneration`."
        )
    return base.get_decoder()


def find_layers(pilot: nn.Module) -> nn.ModuleList:
    """The layers of the Pilot's decoder, or a `ValueError` if they can't be found."""
    lists = [child for child in find_decoder(pilot).children() if isinstance(child, nn.ModuleList) and len(child)]
    if len(lists) != 1:
        tokens = (
            "A Copilot that reads tokens does not look for them: CopilotConfig(memory='tokens', init='random'), with "
            "num_hidden_layers of its own."
        )
        raise ValueError(
            f"The decoder layers of {type(unwrap(pilot)).__name__} can't be found: expected one non-empty ModuleList "
            f"that holds them, found {len(lists)}. {'Take another Pilot.' if is_encoder_decoder(pilot) else tokens}"
        )
    return lists[0]


def is_sharded(pilot: nn.Module) -> bool:
    """Whether processes share its parameters (FSDP2, `fully_shard`)."""
    return any(isinstance(module, FSDPModule) for module in pilot.modules())


def without_logits(pilot: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward whose logits nobody reads, as of SFTTrainer's own: one position of them where the
    Pilot can leave the others out, and no cache, with which packed documents would not be told apart. An
    encoder-decoder makes its decoder's inputs of the labels."""
    if is_encoder_decoder(pilot):
        return dict(inputs)
    taken = signature(unwrap(pilot).forward).parameters
    kept = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
    return kept | {name: value for name, value in (("logits_to_keep", 1), ("use_cache", False)) if name in taken}

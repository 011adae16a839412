"""Which argument of a forward is which: what hooks read of a call hangs on no single name and on no position.

transformers renames the arguments of its forwards (`past_key_values` became `cache` in 5.24), and callers may pass
them by position. So a signature is read once, when hooks are put on, and the cache is known by its type.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

import transformers
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import Cache

from ..version import TESTED_TRANSFORMERS
from .cache import find_cache

OF_DECODERS = ("input_ids", "attention_mask")
OF_CROSS_ATTENTION = ("encoder_hidden_states", "encoder_attention_mask")
OF_LAYERS = "hidden_states"
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # since 5.24; before it; of state-space models before it


class ForwardArguments:
    """The names of a forward's arguments, through wrappers such as torch.compile's and accelerate's."""

    def __init__(self, module: nn.Module):
        self.forward = type(module).__name__ + ".forward"
        parameters = _parameters(extract_model_from_parallel(module, keep_torch_compile=False))
        self.names = tuple(parameters)
        self.positional = tuple(  # in their order
            name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        )
        self.cache_names = tuple(  # what a cache can be passed as
            name
            for name, parameter in parameters.items()
            if name in CACHE_NAMES or "Cache" in str(parameter.annotation)
        )

    def named(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one call by their names, also those that were given by position.

        Raises:
            NotImplementedError: If there are more by position than have names.
        """
        if len(args) > len(self.positional):
            raise NotImplementedError(
                f"{self.forward} is called with {len(args)} arguments by position, and its signature names "
                f"{len(self.positional)}: pass them by name."
            )
        return dict(zip(self.positional, args, strict=False)) | dict(kwargs)

    def first(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The first argument of one call."""
        if args:
            return args[0]
        return kwargs[self.positional[0] if self.positional else OF_LAYERS]

    def require(self, names: tuple[str, ...]) -> None:
        """Raise a `NotImplementedError` if the forward has no argument of one of these names."""
        missing = [name for name in names if name not in self.names]
        if missing:
            raise NotImplementedError(self._not_found(str(missing)))

    def require_cache(self) -> None:
        """Raise a `NotImplementedError` if the forward uses a cache, and none of its arguments can be one."""
        if "use_cache" in self.names and not self.cache_names:
            raise NotImplementedError(self._not_found("the cache"))

    def cache(self, named: Mapping[str, Any]) -> Cache | None:
        """The cache among the arguments of one call, which is known by its type.

        Raises:
            NotImplementedError: If what is passed for it is no `transformers.Cache`.
        """
        cache = find_cache(named.values())
        if cache is not None:
            return cache
        for name in (*CACHE_NAMES, *self.cache_names):
            if named.get(name) is not None:
                raise NotImplementedError(
                    f"The Pilot's cache is a {type(named[name]).__name__}, not a transformers.Cache: pass one, or "
                    "use_cache=False. Paged attention (cache_implementation='paged', generate_batch) drops logits "
                    "processors, and its text would not be rectified: detach the CopilotLogitsProcessor first."
                )
        return None

    def _not_found(self, what: str) -> str:
        first, last = TESTED_TRANSFORMERS
        return (
            f"hf_copilot reads {what} from the calls of {self.forward}, which has no such argument. Installed is "
            f"transformers {transformers.__version__}, tested are {first} to {last}. If it is lacking there too, this "
            "Pilot is not supported: take another, or report it."
        )


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Of its forward, or of its class's where that of the module was replaced by `lambda *args, **kwargs: ...`."""
    parameters = inspect.signature(module.forward).parameters
    if all(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters.values()):
        return inspect.signature(MethodType(type(module).forward, module)).parameters
    return parameters

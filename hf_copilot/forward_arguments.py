"""Which argument of a forward is which: what hooks read of a call hangs on no single name and on no position.

transformers renames the arguments of its forwards (`past_key_values` became `cache` in 5.24), and callers may pass
them by position. So a signature is read once, when hooks are put on, and the cache is known by its type.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import Cache

from .version import TESTED_TRANSFORMERS

OF_DECODERS = ("input_ids", "attention_mask")
OF_CROSS_ATTENTION = ("encoder_hidden_states", "encoder_attention_mask")
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # since 5.24, before it, and of state-space models


class ForwardArguments:
    """The names of a module's forward, through every wrapper that keeps its signature."""

    def __init__(self, module: nn.Module):
        self.forward = type(module).__name__ + ".forward"
        inner = extract_model_from_parallel(module, keep_torch_compile=False)
        self.parameters = inspect.signature(inner.forward).parameters
        self.positional = tuple(  # in their order
            name for name, parameter in self.parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        )

    def named(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one call by their names, also those that were given by position."""
        return dict(zip(self.positional, args, strict=False)) | dict(kwargs)

    def first(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The first argument of one call."""
        return args[0] if args else kwargs[self.positional[0]]

    def require(self, names: tuple[str, ...]) -> None:
        """Raise a `NotImplementedError` if the forward has no argument of one of these names."""
        missing = [name for name in names if name not in self.parameters]
        if missing:
            raise NotImplementedError(self._not_found(f"no argument {missing}"))

    def require_cache(self) -> None:
        """Raise a `NotImplementedError` if the forward uses a cache, and none of its arguments can be one."""
        if "use_cache" in self.parameters and not self._cache_names():
            raise NotImplementedError(self._not_found("a cache, but no argument that holds it"))

    def cache(self, named: Mapping[str, Any]) -> Cache | None:
        """The cache among the arguments of one call, by its type.

        Raises:
            NotImplementedError: If what is passed for it is no `transformers.Cache`.
        """
        for value in named.values():
            if isinstance(value, Cache):
                return value
        for name in (*CACHE_NAMES, *self._cache_names()):
            if named.get(name) is not None:
                raise NotImplementedError(
                    f"The Pilot generates with a {type(named[name]).__name__}, which is no transformers.Cache. Paged "
                    "attention (cache_implementation='paged', generate_batch) drops logits processors, so its text "
                    "would not be rectified. Use another cache, or detach the CopilotLogitsProcessor first."
                )
        return None

    def _cache_names(self) -> tuple[str, ...]:
        """The arguments that a cache can be passed as, by their names or annotations."""
        return tuple(
            name
            for name, parameter in self.parameters.items()
            if name in CACHE_NAMES or "Cache" in str(parameter.annotation)
        )

    def _not_found(self, what: str) -> str:
        first, last = TESTED_TRANSFORMERS
        return (
            f"{self.forward} has {what}, and hf_copilot reads the Pilot's calls there. Installed is transformers "
            f"{transformers.__version__}, tested are {first} to {last}: use one of these, or report the model if it "
            "fails there too."
        )

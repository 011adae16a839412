"""What depends on the installed versions: names that were changed, and tests that fail with or without us."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from transformers import LlamaForCausalLM

# transformers renamed it in 5.24
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

# it loads a Pilot's optimizer to cpu:0, which torch.load does not know
CANT_RESUME_ON_TWO_CPU_PROCESSES = "transformers<5.18"


def is_installed(requirement: str) -> bool:
    library = Requirement(requirement)
    return library.specifier.contains(version(library.name), prereleases=True)


def fails_with(requirement: str) -> pytest.MarkDecorator:
    """Skip a test that fails with these versions of a library, whether hf_copilot is there or not."""
    return pytest.mark.skipif(is_installed(requirement), reason=f"fails with {requirement} without hf_copilot too")

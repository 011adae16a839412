"""A CUDA graph that is pretended: the operators of a step on a tape, which is played again into the same tensors.

What does not belong into a graph is seen: a number of the CPU, or a tensor in another place, stays what it was when it
was recorded, and a value that the CPU asks for raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ASKS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::_unique2", "aten::masked_select"}


class Tape(TorchDispatchMode):
    """Records the operators of a block."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.played = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ASKS:
            raise RuntimeError(f"{func} asks for a value, which a CUDA graph can't.")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    def play(self) -> None:
        """All of them again. Like one launch: no other mode sees them."""
        self.played += 1
        with _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, output in self.calls:
                for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(output), strict=True):
                    if isinstance(old, torch.Tensor) and new is not old:
                        old.copy_(new)


def record(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """As `record_cuda_graph`: what plays the call again, and its output, which holds nothing before."""
    with Tape() as tape:
        output = run()
    output.fill_(torch.nan)
    return tape.play, output


@contextmanager
def pretended_graphs() -> Iterator[None]:
    """Inside the block `CopilotLogitsProcessor(cuda_graphs=True)` records so, on any device."""
    with patch("hf_copilot.generation.logits_processor.recorder", lambda device: record):
        yield

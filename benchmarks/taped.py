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

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ASKS:
            raise RuntimeError(f"{func} asks for a value, which a CUDA graph can't.")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    def play(self) -> None:
        """All of them again. Like one launch: no other mode sees them."""
        with _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, output in self.calls:
                for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(output), strict=True):
                    if isinstance(old, torch.Tensor) and new is not old:
                        old.copy_(new)


class TapedGraph:
    """Like `CudaGraph`, and as late as can be: it is played when it is waited for, and its output is NaN before."""

    def __init__(self, run: Callable[[], torch.Tensor]):
        with Tape() as self.tape:
            self.output = run()
        self.output.fill_(torch.nan)

    def start(self) -> None:
        with _disable_current_modes():
            self.output.fill_(torch.nan)

    def join(self) -> None:
        self.tape.play()


@contextmanager
def pretended_graphs() -> Iterator[None]:
    """Inside the block `CopilotLogitsProcessor(cuda_graphs=True)` records so, on any device."""
    with patch("hf_copilot.generation.logits_processor.recorder", lambda device: TapedGraph):
        yield

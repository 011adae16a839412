"""Counts what a device would be asked for: operators dispatched, and calls that wait for it.

On a GPU every operator is a launch, and every call that needs a value on the CPU waits for all launches before it.
Both can be counted without one.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

VALUES = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__}
VALUES |= {torch.Tensor.__index__, torch.Tensor.numpy, torch.Tensor.cpu, torch.equal, torch.Tensor.equal}
SIZES = {torch.Tensor.nonzero, torch.nonzero, torch.unique, torch.Tensor.unique, torch.unique_consecutive}
VIEWS = {"view", "_unsafe_view", "expand", "t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select"}
VIEWS |= {"alias", "detach", "split", "split_with_sizes", "unbind", "_reshape_alias", "as_strided", "unfold"}


class Waits(TorchFunctionMode):
    """Calls that give a value, or a size that depends on one, to the CPU."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in VALUES | SIZES:
            self.calls[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Operators that are launched; views are not."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name not in VIEWS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


class Count:
    """`with Count() as count:` and then `count.operators`, `count.waits`."""

    def __enter__(self) -> Count:
        self._operators, self._waits = Operators(), Waits()
        self._waits.__enter__()
        self._operators.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._operators.__exit__(*exception)
        self._waits.__exit__(*exception)

    @property
    def operators(self) -> int:
        return self._operators.calls.total()

    @property
    def waits(self) -> int:
        return self._waits.calls.total()

    def __repr__(self) -> str:
        operators, waits = self._operators.calls, self._waits.calls
        return f"{self.operators} operators {dict(operators.most_common(12))}, {self.waits} waits {dict(waits)}"

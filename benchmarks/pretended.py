"""A GPU that is pretended: tensors that say they lie on one, computed on the CPU, and a count of what is waited for.

What comes to the CPU without a wait holds nothing before its event has been looked at, as on a GPU that is slow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("lazy:0")  # of a kind that PyTorch runs on the CPU's own threads
VALUES = {"aten::_local_scalar_dense", "aten::equal"}  # give a value to the CPU
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # by masks too
NOT_YET = 7  # what a copy holds that has not arrived
SIZES = {"aten::nonzero", "aten::_unique2", "aten::unique_consecutive", "aten::masked_select"}  # or a size


class Far(torch.Tensor):
    """A tensor that says that it is on [`DEVICE`]."""

    near: torch.Tensor  # its values

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        size = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, near.shape, device=DEVICE, **size)

    def __init__(self, near: torch.Tensor):
        self.near = near

    def __repr__(self) -> str:
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Event:
    """Of the copies that were begun before it."""

    def __init__(self, pretended: Pretended):
        self.pretended, self.copies = pretended, list(pretended.copies)

    def synchronize(self) -> None:
        self.pretended.waits["event"] += 1
        for target, source in self.copies:
            target.copy_(source)


class Stream:
    device = DEVICE

    def __init__(self, pretended: Pretended):
        self.pretended = pretended

    def wait_stream(self, other: Stream) -> None:
        """The CPU goes on. Who waits for whom is looked at in [`benchmarks.streams`]."""

    def record_event(self) -> Event:
        return Event(self.pretended)


def is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def nearer(value: Any) -> Any:
    if isinstance(value, Far):
        return value.near
    return torch.device("cpu") if isinstance(value, torch.device) and is_far(value) else value


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operator, on the CPU; what it gives is far where it was asked for there, or one of its arguments is."""
    given: list[Far] = []
    tree_map(lambda value: given.append(value) if isinstance(value, Far) else None, (args, kwargs))
    out = func(*tree_map(nearer, args), **tree_map(nearer, kwargs))
    if not given and not is_far(kwargs.get("device")):
        return out
    if kwargs.get("device") is not None and not is_far(kwargs["device"]):
        return out
    known = {id(far.near): far for far in given}  # in place
    return tree_map(lambda t: known.get(id(t), Far(t)) if isinstance(t, torch.Tensor) else t, out)


class Pretended(TorchDispatchMode):
    """Runs operators, and counts in `waits` by name what the CPU waits for."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # begun: where to, and what

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """The waits of the block."""
        before, found = self.waits.copy(), Counter()
        yield found
        found.update(self.waits - before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        if name == "aten::is_pinned":
            return False
        if name == "aten::_pin_memory":
            return args[0].clone()
        if name == "aten::_to_copy" and kwargs.get("device") is not None:
            return self.copied(func, args, kwargs)
        indices = args[1] if name in INDEXED else ()
        is_mask = any(isinstance(index, Far) and index.dtype == torch.bool for index in indices)
        if is_mask or (name in VALUES | SIZES and any(isinstance(value, Far) for value in args)):
            self.waits[name] += 1
        return run(func, args, kwargs)

    def copied(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        is_read, is_sent = isinstance(args[0], Far), is_far(kwargs["device"])
        if is_read is not is_sent and not kwargs.get("non_blocking"):
            self.waits["copy to the device" if is_sent else "copy to the CPU"] += 1
        found = run(func, args, kwargs)
        if is_read and not is_sent and kwargs.get("non_blocking"):
            self.copies.append((found, found.clone()))
            found.fill_(NOT_YET)
        return found


@contextmanager
def pretended_gpu() -> Iterator[Pretended]:
    """Inside the block `.to("cuda")` is [`Far`]."""
    device = Pretended()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            patch("hf_copilot.training.transfer.GPU", DEVICE.type),
            patch(f"torch.{DEVICE.type}", SimpleNamespace(is_available=lambda: False), create=True),
            patch("hf_copilot.training.teacher_forced.TeacherForced.autocast", lambda *_: nullcontext()),
            patch("torch.is_autocast_enabled", lambda *_: False),  # it does not know the kind
            patch("hf_copilot.training.beside.KIND", DEVICE.type),
            patch("torch.cuda.current_stream", lambda *_: Stream(device)),
            patch("torch.cuda.Stream", lambda *_: Stream(device)),
            patch("torch.cuda.stream", lambda _: nullcontext()),
            patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: [DEVICE.type]),
            sdpa_kernel(SDPBackend.MATH),
            device,
        ):
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)

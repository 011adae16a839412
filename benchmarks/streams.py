"""CUDA streams that are pretended: operators on the CPU count as launched on one, and races between two are found.

A race is an operator that writes what another stream has read or written, or reads what it has written, without a wait
in between; or memory that goes back to its stream while another may not be done with it. A GPU shows one now and then,
this does always.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    """Operators in a row; `clock` says how many of each stream are done before its next one."""

    def __init__(self, device: torch.device, is_main: bool = False):
        self.device, self.is_main, self.clock = device, is_main, Counter()

    def wait_stream(self, other: Stream) -> None:
        self.clock |= other.clock


class Memory:
    """Of one storage: the stream that it goes back to, the last to write, and all that have read since."""

    def __init__(self, home: Stream):
        self.home, self.writes, self.reads = home, {}, {}

    def used(self) -> dict[Stream, int]:
        return {**self.writes, **self.reads}


class Streams(TorchDispatchMode):
    """Notes what every operator reads and writes.

    Attributes:
        races: Operators in a race; `"free"` is memory that went back too early.
    """

    def __init__(self):
        super().__init__()
        self.main = self.current = Stream(torch.device("cpu"), is_main=True)
        self.memory: dict[int, Memory] = {}
        self.races: list[str] = []

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """`torch.cuda.stream`."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema, self.current.clock[self.current] = func._schema, self.current.clock[self.current] + 1
        if schema.returns and all(r.alias_info and not r.alias_info.is_write for r in schema.returns):
            return out  # a view
        named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        written = [named.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        self.note(schema.name, list(named.values()), written)
        self.note(schema.name, [], [t for t in tree_leaves(out) if self.is_new(t)])
        return out

    def is_new(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.memory

    def note(self, name: str, read: list[Any], written: list[Any]) -> None:
        """Look for a race; what was not seen before was made on this stream."""
        reads, writes = (
            {id(t.untyped_storage()): t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)}
            for tensors in (read, written)
        )
        for key, tensor in {**reads, **writes}.items():
            if key not in self.memory:
                self.memory[key] = Memory(self.current)
                weakref.finalize(tensor.untyped_storage(), self.free, key)
            memory, clock = self.memory[key], self.current.clock
            before = memory.used() if key in writes else memory.writes
            if any(clock[stream] < time for stream, time in before.items()):
                self.races.append(name)
            now = {self.current: clock[self.current]}
            memory.writes, memory.reads = (now, {}) if key in writes else (memory.writes, memory.reads | now)

    def free(self, key: int) -> None:
        memory = self.memory.pop(key)
        if any(memory.home.clock[stream] < time for stream, time in memory.used().items()):
            self.races.append("free")


@contextmanager
def pretended_streams() -> Iterator[Streams]:
    """Inside the block a learner takes the CPU for a device with streams."""
    streams, tolist = Streams(), torch.Tensor.tolist
    patches = {
        "hf_copilot.training.beside.KIND": "cpu",
        "torch.cuda.current_stream": lambda *_: streams.current,
        "torch.cuda.Stream": Stream,
        "torch.cuda.stream": streams.on,
        "torch.Tensor.tolist": lambda tensor: tolist(tensor.clone()),  # on a GPU a copy, which is an operator
    }
    with ExitStack() as stack:
        for target, value in patches.items():
            stack.enter_context(patch(target, value))
        yield stack.enter_context(streams)

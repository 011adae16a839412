"""The Copilot's round on a CUDA stream of its own, beside the Pilot's next forward and backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .distributed import num_processes
from .refusals import check_own_stream

KIND = "cuda"  # of device that has streams


class OwnStream:
    """Where the Copilot's round is launched; where it is not on, on the current stream. The CPU waits for neither.

    The round begins when all that was launched before it is done. Until [`join`] nothing else may write what it reads,
    the Pilot's head among it, or touch what it writes. Every optimizer's step in the process joins, since by one the
    Pilot changes, and so does every look at a [`Joined`] attribute.

    The memory of a tensor goes back to the stream that it was made on when Python lets go of it. So a round may not
    let go of a tensor that was made outside, and the other way round: what lasts is changed in place. CUDA graphs that
    PyTorch keeps share their memory: beside a compiled Copilot nothing else may run as one.
    """

    def __init__(self, is_on: bool):
        self.is_on, self.is_pending = is_on, False
        self.stream: torch.cuda.Stream | None = None  # from `start` on
        self.handle: RemovableHandle | None = None

    def start(self, pilot: nn.Module, device: torch.device) -> None:
        """Begin a run; raises as [`check_own_stream`]."""
        self.close()
        if self.is_on:
            check_own_stream(pilot, device.type == KIND, num_processes())
            self.stream = torch.cuda.Stream(device)

    def close(self) -> None:
        """Join, and leave the optimizers alone until the next round."""
        self.join()
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Launch what is inside on the stream."""
        if self.stream is None:
            yield
            return
        if self.handle is None:
            self.handle = register_optimizer_step_pre_hook(self._before_step)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            self.is_pending = True

    def join(self) -> None:
        """Put what is launched from now on behind the last round."""
        if self.is_pending:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
            self.is_pending = False

    def _before_step(self, *_: Any) -> None:
        self.join()


class Joined:
    """An attribute of a learner that holds what a round writes: looking at it joins. Its name with `_` before it is
    the same without."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, learner: Any, owner: type | None = None) -> Any:
        if learner is None:
            return self
        learner.join()
        return getattr(learner, self.name)

    def __set__(self, learner: Any, value: Any) -> None:
        setattr(learner, self.name, value)


class BesideThePilot:
    """What a learner has of its own stream.

    Attributes:
        stream: Of its rounds.
    """

    copilot, peft_model, forced, optimizer, metrics = (Joined() for _ in range(5))
    stream: OwnStream

    def join(self) -> None:
        """Put what is launched from now on behind the last round, where rounds have a stream of their own. Call it
        before the Pilot changes by anything but an optimizer's step, and before the Copilot is used past its learner
        or trainer."""
        self.stream.join()

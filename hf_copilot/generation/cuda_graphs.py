"""A step of a Copilot that is recorded once and then replayed: one launch on a GPU instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch

Inputs = Mapping[str, torch.Tensor]


class Launch(Protocol):
    """A call that is recorded, which reads and writes the same places whenever it is replayed."""

    output: torch.Tensor

    def start(self) -> None:
        """Replay it, beside whatever comes next."""

    def join(self) -> None:
        """Whatever comes next comes after it."""


Record = Callable[[Callable[[], torch.Tensor]], Launch]


class Recording(NamedTuple):
    """A step of inputs of certain shapes and types."""

    inputs: dict[str, torch.Tensor]  # what it reads
    launch: Launch


class RecordedStep:
    """A function of tensors, recorded for every set of shapes and types that it is called with.

    Args:
        run: Depends on what tensors hold on the device alone. It may be run twice on the same.
        record: Records a call of it.
    """

    def __init__(self, run: Callable[[Inputs], torch.Tensor], record: Record):
        self.run, self.record = run, record
        self.running: Launch | None = None
        self.forget()

    def forget(self) -> None:
        """Give back what is recorded."""
        self.join()
        self.weights: tuple[Hashable, ...] = ()  # where they lie
        self.addresses: tuple[Hashable, ...] = ()  # where all lies that a recording has, beside its inputs
        self.recordings: dict[Hashable, Recording] = {}

    def use(self, weights: Iterable[torch.Tensor]) -> None:
        """These are the weights of the calls from now on."""
        self.weights = tuple(map(address, weights))

    def start(self, inputs: Inputs, written: Iterable[torch.Tensor]) -> torch.Tensor:
        """Begin a call; gives what `run` gives, to be read after [`join`] and before the next call.

        Args:
            written: What else it writes to. Where that, or a weight, lies elsewhere now, all is recorded anew.
        """
        self.join()
        addresses = (*self.weights, *map(address, written))
        if addresses != self.addresses:
            self.addresses, self.recordings = addresses, {}
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        if shapes not in self.recordings:
            own = {name: tensor.clone() for name, tensor in inputs.items()}
            self.recordings[shapes] = Recording(own, self.record(lambda: self.run(own)))
        recording = self.recordings[shapes]
        for name, tensor in inputs.items():
            recording.inputs[name].copy_(tensor)
        self.running = recording.launch
        self.running.start()
        return self.running.output

    def join(self) -> None:
        """Have what comes next come after the call that was begun, if there is one."""
        if self.running is not None:
            self.running.join()
            self.running = None


def address(tensor: torch.Tensor) -> Hashable:
    """Where a tensor lies; another may lie there once it is gone."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def recorder(device: torch.device) -> Record:
    """What records on a device.

    Raises:
        ValueError: If that is no GPU of CUDA.
    """
    if device.type != "cuda":
        raise ValueError(
            f"cuda_graphs=True asks for a Copilot on a GPU of CUDA, and this one is on {device}: move it there, "
            "or leave cuda_graphs out."
        )
    return partial(CudaGraph, device=device)


class CudaGraph:
    """A [`Launch`] on a stream of its own. The call is run once before it is recorded: libraries set themselves up."""

    def __init__(self, run: Callable[[], torch.Tensor], device: torch.device):
        with torch.cuda.device(device):
            self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                run()
            self.join()
            recorded_on = torch.cuda.Stream()  # another, so that what cuBLAS works in belongs to the graph
            with torch.cuda.graph(self.graph, stream=recorded_on, capture_error_mode="thread_local"):
                self.output = run()

    def start(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    def join(self) -> None:
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

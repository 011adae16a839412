"""A step of a Copilot that is recorded once and then replayed: one launch on a GPU instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

Inputs = Mapping[str, torch.Tensor]
Record = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], Any], torch.Tensor]]


class Recording(NamedTuple):
    """A step of inputs of certain shapes."""

    inputs: dict[str, torch.Tensor]  # what it reads
    replay: Callable[[], Any]
    output: torch.Tensor  # what it writes


class RecordedStep:
    """A function of tensors, recorded for every set of shapes that it is called with.

    Args:
        run: Depends on what tensors hold on the device alone. It may be run twice on the same.
        record: Records a call of it, which reads and writes the same places whenever it is replayed. Gives what
            replays it, and its output.
    """

    def __init__(self, run: Callable[[Inputs], torch.Tensor], record: Record):
        self.run, self.record = run, record
        self.forget()

    def forget(self) -> None:
        """Give back what is recorded."""
        self.read: tuple[int, ...] = ()  # where the weights lie
        self.places: tuple[int, ...] = ()  # where all lies that a recording has, beside its inputs
        self.recordings: dict[Hashable, Recording] = {}

    def reads(self, weights: Iterable[torch.Tensor]) -> None:
        """The weights of the calls from now on."""
        self.read = tuple(tensor.data_ptr() for tensor in weights)

    def __call__(self, inputs: Inputs, written: Iterable[torch.Tensor]) -> torch.Tensor:
        """What `run` gives; it lasts until the next call.

        Args:
            written: What else it writes to. Where that, or a weight, lies elsewhere now, all is recorded anew.
        """
        places = (*self.read, *(tensor.data_ptr() for tensor in written))
        if places != self.places:
            self.places, self.recordings = places, {}
        shapes = tuple((name, tensor.shape) for name, tensor in inputs.items())
        if shapes not in self.recordings:
            own = {name: tensor.clone() for name, tensor in inputs.items()}
            self.recordings[shapes] = Recording(own, *self.record(lambda: self.run(own)))
        recording = self.recordings[shapes]
        for name, tensor in inputs.items():
            recording.inputs[name].copy_(tensor)
        recording.replay()
        return recording.output


def recorder(device: torch.device) -> Record:
    """What records on a device.

    Raises:
        ValueError: If that is no GPU of CUDA.
    """
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs=True asks for a Copilot on a GPU of CUDA, and this one is on {device}.")
    return partial(record_cuda_graph, device=device)


def record_cuda_graph(
    run: Callable[[], torch.Tensor], device: torch.device
) -> tuple[Callable[[], None], torch.Tensor]:
    """Record `run` as a CUDA graph, after a call of it that lets libraries set themselves up."""
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = run()
    return graph.replay, output

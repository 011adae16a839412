"""The Pilot's forward and backward, step by step or as one CUDA graph: launches take most of a small model's time.

Shapes: B rows, T positions, N targets, d_P the Pilot's hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from benchmarks.pretrained.tasks import Example
from hf_copilot import CopilotLearner
from hf_copilot.generation.cuda_graphs import Record
from hf_copilot.pilot.tap import PilotStates
from hf_copilot.training.records import IGNORE

Inputs = dict[str, torch.Tensor]


def autocast(device: torch.device) -> torch.autocast:
    """Both models are trained in bf16 on a GPU, and in float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def pilot_loss(pilot: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """Mean cross-entropy over the targets; logits are made there alone."""
    known = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    hidden = pilot.get_decoder()(**known, use_cache=False).last_hidden_state[:, :-1]  # [B, T - 1, d_P]
    labels = inputs["labels"][:, 1:]
    targets = labels != IGNORE
    logits = pilot.get_output_embeddings()(hidden[targets])  # [N, V]
    return F.cross_entropy(logits.float(), labels[targets])


def longest(examples: list[Example]) -> int:
    """Tokens of the longest."""
    return max(len(prompt) + len(completion) for prompt, completion in examples)


def collate(
    examples: list[Example], pad: int, device: torch.device, length: int | None = None
) -> dict[str, torch.Tensor]:
    """Padded on the right, to `length` or the longest, labels on the completions: `input_ids`, `attention_mask`,
    `labels` `[B, T]`."""
    length = length or longest(examples)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, completion in examples:
        extra = length - len(prompt) - len(completion)
        rows["input_ids"].append([*prompt, *completion] + [pad] * extra)
        rows["attention_mask"].append([1] * (length - extra) + [0] * extra)
        rows["labels"].append([IGNORE] * len(prompt) + completion + [IGNORE] * extra)
    return {name: torch.tensor(values).to(device) for name, values in rows.items()}


def most_targets(examples: list[Example], rows: int) -> int:
    """That so many of them can have."""
    return sum(sorted((len(completion) for _, completion in examples), reverse=True)[:rows])


class GraphedPilot:
    """Gradients of [`pilot_loss`] for batches of one size, from a recording. What a Copilot's tap reads in a forward
    is recorded as well, and shown to it after each replay.

    Args:
        pilot: In training mode, without dropout.
        pad: The token that rows are padded with.
        optimizer: Of the parameters that are trained, whose gradients are zeroed at the start of each replay.
        learner: Of the Copilot beside it, if there is one.
        shape: B, and T and N at most.
        record: Records a call, as `hf_copilot.generation.cuda_graphs.recorder` has it.
    """

    def __init__(
        self,
        pilot: PreTrainedModel,
        pad: int,
        optimizer: torch.optim.Optimizer,
        learner: CopilotLearner | None,
        shape: tuple[int, int, int],
        record: Record,
    ):
        self.pilot, self.pad, self.optimizer, self.learner = pilot, pad, optimizer, learner
        rows, length, targets = shape
        like = {"device": pilot.device, "dtype": torch.int64}
        self.ids = torch.zeros(rows, length, **like)  # [B, T]
        self.places = torch.zeros(targets, **like)  # [N], of the flattened positions
        self.labels = torch.full((targets,), IGNORE, **like)  # [N]
        visible = torch.ones(length, length, dtype=torch.bool, device=pilot.device).tril()
        self.mask = visible.expand(rows, 1, length, length)  # padding is on the right: nothing reads it
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.states: PilotStates | None = None  # of the recorded forward: a replay writes into its tensors
        with self._catching():
            self.launch = record(self._run)

    def _run(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=False)
        decoder, head = self.pilot.get_decoder(), self.pilot.get_output_embeddings()
        with autocast(self.pilot.device):
            out = decoder(input_ids=self.ids, attention_mask=self.mask, use_cache=False)
            hidden = out.last_hidden_state  # [B, T, d_P]
            logits = head(hidden.flatten(0, 1)[self.places])  # [N, V]
        loss = F.cross_entropy(logits.float(), self.labels, ignore_index=IGNORE)
        loss.backward()
        return loss.detach()

    @contextmanager
    def _catching(self) -> Iterator[None]:
        """Keep what the learner's tap reads, instead of giving it to the learner."""
        if self.learner is None:
            yield
            return
        tap = self.learner.forced.tap
        usual = tap.sink, tap.listen
        tap.sink, tap.listen = (lambda states: setattr(self, "states", states)), (lambda: True)
        yield
        tap.sink, tap.listen = usual

    def __call__(self, examples: list[Example]) -> None:
        """The gradients of B examples, and their records."""
        length = self.ids.shape[1]
        inputs = collate(examples, self.pad, self.pilot.device, length)
        places = [
            row * length + len(prompt) + i - 1
            for row, (prompt, completion) in enumerate(examples)
            for i in range(len(completion))
        ]
        labels = [token for _, completion in examples for token in completion]
        unused = len(self.places) - len(places)
        self.ids.copy_(inputs["input_ids"])
        self.places.copy_(torch.tensor(places + [0] * unused))
        self.labels.copy_(torch.tensor(labels + [IGNORE] * unused))
        self.launch.start()
        self.launch.join()
        if self.learner is not None:
            self._show(inputs)

    def _show(self, inputs: Inputs) -> None:
        read = {field.name: getattr(self.states, field.name) for field in fields(PilotStates)}
        copies = {name: value.clone() for name, value in read.items() if isinstance(value, torch.Tensor)}
        copies |= {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with self.learner.observe(inputs):
            self.learner.forced.tap.sink(replace(self.states, **copies))


class Clock:
    """Seconds by part; `exact` waits for the device at the end of each."""

    def __init__(self, device: torch.device, exact: bool):
        self.wait = exact and device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def end(self, part: str) -> None:
        if self.wait:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


class SteppedPilot:
    """The same, operator by operator, and timed: the forward alone where nothing is trained."""

    def __init__(
        self,
        pilot: PreTrainedModel,
        pad: int,
        optimizer: torch.optim.Optimizer | None,
        learner: CopilotLearner | None,
        clock: Clock,
    ):
        self.pilot, self.pad, self.optimizer, self.learner, self.clock = pilot, pad, optimizer, learner, clock

    def __call__(self, examples: list[Example]) -> None:
        inputs = collate(examples, self.pad, self.pilot.device)
        observed = nullcontext() if self.learner is None else self.learner.observe(inputs)
        trains = self.optimizer is not None
        with observed, torch.set_grad_enabled(trains), autocast(self.pilot.device):
            loss = pilot_loss(self.pilot, inputs)
            self.clock.end("pilot")
        self.clock.end("observe")
        if trains:
            self.optimizer.zero_grad()
            loss.backward()

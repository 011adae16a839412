"""The Pilot's forward and backward, step by step or as one CUDA graph: launches take most of a small model's time.

Shapes: B rows, T positions, N targets, d_P the Pilot's hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial

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
    hidden = decoded(pilot, inputs)[:, :-1]  # [B, T - 1, d_P]
    labels = inputs["labels"][:, 1:]
    targets = labels != IGNORE
    logits = pilot.get_output_embeddings()(hidden[targets])  # [N, V]
    return F.cross_entropy(logits.float(), labels[targets])


def decoded(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """The decoder's output `[B, T, d_P]`."""
    known = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return model.get_decoder()(**known, use_cache=False).last_hidden_state


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
    lengths = 2 * [len(completion) for _, completion in examples]  # the end of an epoch, and the start of the next
    return sum(sorted(lengths, reverse=True)[:rows])


class GraphedPilot:
    """Gradients of [`pilot_loss`] for batches of one size, from a recording. What the taps of Copilots read in a
    forward is recorded as well, and shown to them after each replay.

    Args:
        pilot: In training mode, without dropout.
        pad: The token that rows are padded with.
        optimizer: Of the parameters that are trained, whose gradients are zeroed at the start of each replay.
        learners: Of the Copilots beside it.
        shape: B, and T and N at most.
        record: Records a call, as `hf_copilot.generation.cuda_graphs.recorder` has it.
    """

    def __init__(
        self,
        pilot: PreTrainedModel,
        pad: int,
        optimizer: torch.optim.Optimizer,
        learners: Sequence[CopilotLearner],
        shape: tuple[int, int, int],
        record: Record,
    ):
        self.pilot, self.pad, self.optimizer, self.learners = pilot, pad, optimizer, learners
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
        self.states: dict[int, PilotStates] = {}  # of the recorded forward: a replay writes into their tensors
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
        """Keep what the learners' taps read, instead of giving it to the learners."""
        taps = [learner.forced.tap for learner in self.learners]
        usual = [(tap.sink, tap.listen) for tap in taps]
        for i, tap in enumerate(taps):
            tap.sink, tap.listen = partial(self.states.__setitem__, i), lambda: True
        yield
        for tap, (sink, listen) in zip(taps, usual, strict=True):
            tap.sink, tap.listen = sink, listen

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
        for learner, states in zip(self.learners, self.states.values(), strict=True):
            with learner.observe(inputs):
                learner.forced.tap.sink(copy_of(states, inputs))


def copy_of(states: PilotStates, inputs: Inputs) -> PilotStates:
    """What a replay has written, of this batch."""
    read = {field.name: getattr(states, field.name) for field in fields(PilotStates)}
    copies = {name: value.clone() for name, value in read.items() if isinstance(value, torch.Tensor)}
    return replace(states, **(copies | {name: inputs[name] for name in ("input_ids", "attention_mask")}))


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
        learners: Sequence[CopilotLearner],
        clock: Clock,
    ):
        self.pilot, self.pad, self.optimizer, self.learners, self.clock = pilot, pad, optimizer, learners, clock

    def __call__(self, examples: list[Example]) -> None:
        inputs = collate(examples, self.pad, self.pilot.device)
        trains = self.optimizer is not None
        with ExitStack() as observed:
            for learner in self.learners:
                observed.enter_context(learner.observe(inputs))
            observed.enter_context(torch.set_grad_enabled(trains))
            observed.enter_context(autocast(self.pilot.device))
            loss = pilot_loss(self.pilot, inputs) if trains else decoded(self.pilot, inputs)
            self.clock.end("pilot")
        self.clock.end("observe")
        if trains:
            self.optimizer.zero_grad()
            loss.backward()

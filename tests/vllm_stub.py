"""Stands for vLLM: the names that a processor imports, and its two model runners around a tiny Pilot.

The runners only do what a processor sees of the real ones (vLLM 0.32): requests come, are pushed out and come back,
in an order that is drawn; prompts are read in chunks; the first runner closes gaps without naming who left them.
"""

from __future__ import annotations

import random
import sys
from abc import ABC
from dataclasses import dataclass, field
from enum import Enum, auto
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny import VOCAB_SIZE

CHUNK = 7  # tokens of a prompt that are read in a step
LENGTH = 64  # tokens of a request, at most


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


def install(monkeypatch) -> None:
    """Put the names where a processor looks for them."""
    found = {
        "vllm.tokenizers": {"cached_tokenizer_from_config": lambda model: model.tokenizer},
        "vllm.v1.sample.logits_processor": {
            "LogitsProcessor": type("LogitsProcessor", (ABC,), {}),
            "MoveDirectionality": MoveDirectionality,
        },
        "vllm.v1.worker.gpu.sample.logits_processor": {"LogitsProcessor": type("LogitsProcessor", (ABC,), {})},
    }
    for name, members in found.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            parent = ".".join(parts[:i])
            if parent not in found:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hf_copilot.serving.vllm", raising=False)


def vllm_config(folder: Any, tokenizer: Any = None, slots: int = 4, **changes: Any) -> SimpleNamespace:
    """What is read of vLLM's configuration; `changes` by their path, `parallel_config__tensor_parallel_size=2`."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder),
            revision=None,
            max_model_len=LENGTH,
            tokenizer=tokenizer,
            hf_text_config=SimpleNamespace(model_type="llama"),
            is_encoder_decoder=False,
            is_multimodal_model=False,
            enable_prompt_embeds=False,
            get_vocab_size=lambda: VOCAB_SIZE,
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=slots, policy="fcfs"),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        additional_config={},
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return config


@dataclass(eq=False)
class Job:
    """One request, as the engine has it."""

    prompt: list[int]
    new: int  # tokens that it asks for
    extra: dict[str, Any] | None = None
    output: list[int] = field(default_factory=list)
    read: int = 0  # tokens that are in the Pilot's cache

    @property
    def params(self) -> SimpleNamespace:
        return SimpleNamespace(extra_args=self.extra)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class Runner:
    """What both share: who is in, who waits, and the Pilot."""

    def __init__(self, processor: Any, pilot: Any, slots: int, seed: int = 0):
        self.processor, self.pilot, self.slots = processor, pilot, slots
        self.random, self.preemptions = random.Random(seed), 0

    def serve(self, jobs: list[Job]) -> list[list[int]]:
        """Their answers."""
        self.waiting, self.running = list(jobs), []
        while self.waiting or self.running:
            self.step()
        return [job.output for job in jobs]

    def leave(self) -> list[Job]:
        """Those that are done, and now and then the last ones, which wait as the first."""
        done = [job for job in self.running if len(job.output) >= job.new]
        pushed = []
        while self.random.random() < 0.3 and len(self.running) > len(done) + len(pushed) + 1:
            pushed.append([job for job in self.running if job not in (*done, *pushed)][-1])
            self.preemptions += 1
        for job in pushed:
            job.read = 0
        self.waiting = [*reversed(pushed), *self.waiting]
        self.running = [job for job in self.running if job not in (*done, *pushed)]
        return done + pushed

    def enter(self, left: list[Job]) -> list[Job]:
        """Those that there is room for, but now and then none; what was pushed out waits for one step at least."""
        entering = []
        while self.waiting and len(self.running) < self.slots and self.waiting[0] not in left:
            if self.random.random() < 0.2:
                break
            entering.append(self.waiting.pop(0))
            self.running.append(entering[-1])
        return entering

    @torch.no_grad()
    def logits(self, job: Job) -> torch.Tensor:
        """The Pilot's, after what it has read: `[V]`; of a prompt that is not read to its end they mean nothing."""
        job.read = min(job.read + CHUNK, len(job.tokens))
        return self.pilot(torch.tensor([job.tokens[: job.read]])).logits[0, -1].float()


class FirstRunner(Runner):
    """A batch without gaps: `update_state` and `apply(logits)`."""

    batch: list[Job | None] = []
    is_async = False  # whether the last token is known when the logits are there, and not before

    def step(self) -> None:
        left = self.leave()
        removed = sorted((i for i, job in enumerate(self.batch) if job in left), reverse=True)
        batch = [None if job in left else job for job in self.batch]
        added, moved = [], []
        for job in self.enter(left):
            if job.output and self.is_async:
                job.output = list(job.output)  # another list
            slot = removed.pop() if removed else len(batch)
            batch[slot:slot] = [None] if slot == len(batch) else []
            batch[slot] = job
            added.append((slot, job.params, job.prompt, job.output))
        while removed:  # close the gaps with the last ones
            while batch and batch[-1] is None:
                batch.pop()
            gap = removed.pop()
            if gap >= len(batch):
                removed.append(gap)  # behind the end: these are named
                break
            moved.append((len(batch) - 1, gap, MoveDirectionality.UNIDIRECTIONAL))
            batch[gap] = batch.pop()
        if len(batch) > 1 and self.random.random() < 0.2:
            first, second = self.random.sample(range(len(batch)), 2)
            moved.append((first, second, MoveDirectionality.SWAP))
            batch[first], batch[second] = batch[second], batch[first]
        update = SimpleNamespace(removed=removed, added=added, moved=moved)
        self.processor.update_state(update if removed or added or moved else None)
        self.batch = batch
        if batch:
            self.sample()

    def sample(self) -> None:
        for job in self.batch:
            if job.output and job.output[-1] == -1:
                job.output[-1] = job.drawn
        logits = torch.stack([self.logits(job) for job in self.batch])
        for job, row in zip(self.batch, self.processor.apply(logits), strict=True):
            if job.read == len(job.tokens):
                job.drawn = int(row.argmax())
                job.output.append(-1 if self.is_async and len(job.output) + 1 < job.new else job.drawn)


class SecondRunner(Runner):
    """Slots that are written anew: `add_request` and `apply(logits, ctx)`."""

    def __init__(self, processor: Any, pilot: Any, slots: int, states: Any, seed: int = 0):
        super().__init__(processor, pilot, slots, seed)
        self.states, self.free, self.slot_of = states, list(range(slots)), {}

    def step(self) -> None:
        left = self.leave()
        self.free += [self.slot_of.pop(job) for job in left]
        for job in self.enter(left):
            slot = self.slot_of[job] = self.free.pop(0)
            self.states.prompt_len.np[slot], self.states.prefill_len.np[slot] = len(job.prompt), len(job.tokens)
            self.states.all_token_ids.gpu[slot, : len(job.tokens)] = torch.tensor(job.tokens)
            self.processor.add_request(slot, job.params)
        jobs = self.random.sample(self.running, len(self.running))  # in any order, and not always all
        if jobs:
            self.sample(jobs[: max(1, len(jobs) - (self.random.random() < 0.2))])

    def sample(self, jobs: list[Job]) -> None:
        logits = torch.stack([self.logits(job) for job in jobs])
        ctx = SimpleNamespace(
            idx_mapping_np=np.array([self.slot_of[job] for job in jobs]),
            seq_lens_upper_bound_np=np.array([job.read for job in jobs]),
        )
        for job, row in zip(jobs, self.processor.apply(logits, ctx), strict=True):
            if job.read == len(job.tokens):
                self.states.all_token_ids.gpu[self.slot_of[job], job.read] = row.argmax()
                job.output.append(int(row.argmax()))


def request_states(slots: int) -> SimpleNamespace:
    """The second runner's, as far as they are read."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        prompt_len=SimpleNamespace(np=np.zeros(slots, dtype=np.int32)),
        prefill_len=SimpleNamespace(np=np.zeros(slots, dtype=np.int32)),
        all_token_ids=SimpleNamespace(gpu=torch.full((slots, LENGTH), -1, dtype=torch.int32)),
    )

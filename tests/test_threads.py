"""Several threads generate with one Pilot, each with its own processor: each gets what it would get alone."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from test_generation import PROMPT, generate, left_padded
from tiny import MEMORIES, tiny_pilot, tiny_seq2seq, trained_like
from transformers import CompileConfig

from hf_copilot import CopilotConfig, CopilotLogitsProcessor

PROMPTS = [PROMPT[:1], PROMPT[1:2], PROMPT[2:, :3], left_padded()[0][1:2]]  # two of one length
ROUNDS = 6


@contextmanager
def switching():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(pilot, copilots, prompts, rounds=ROUNDS, **settings):
    """The texts of each thread, or what it raised."""
    ready = threading.Barrier(len(prompts))

    def work(copilot, prompt):
        with CopilotLogitsProcessor(copilot, pilot, strength=3.0) as processor:
            ready.wait()
            try:
                return [generate(pilot, processor, prompt, **settings) for _ in range(rounds)]
            except ValueError as error:
                return error
            finally:
                ready.wait()  # all hooks stay to the end

    with switching(), ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(work, copilots, prompts))


def alone(pilot, copilots, prompts, **settings):
    texts = []
    for copilot, prompt in zip(copilots, prompts, strict=True):
        with CopilotLogitsProcessor(copilot, pilot, strength=3.0) as processor:
            texts.append(generate(pilot, processor, prompt, **settings))
    return texts


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no_cache"])
def test_threads_get_what_they_would_get_alone(pilot, memory, settings):
    copilots = [trained_like(pilot, CopilotConfig(memory=memory), seed=seed) for seed in range(len(PROMPTS))]
    expected = alone(pilot, copilots, PROMPTS, **settings)
    for texts, text in zip(together(pilot, copilots, PROMPTS, **settings), expected, strict=True):
        assert not isinstance(texts, ValueError), texts
        assert all(torch.equal(found, text) for found in texts)


def test_threads_beside_an_encoder_decoder():
    pilot = tiny_seq2seq("bart").eval()
    copilots = [trained_like(pilot, seed=seed) for seed in range(len(PROMPTS))]
    expected = alone(pilot, copilots, PROMPTS)
    for texts, text in zip(together(pilot, copilots, PROMPTS), expected, strict=True):
        assert not isinstance(texts, ValueError), texts
        assert all(torch.equal(found, text) for found in texts)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("compiled", ["layers", "static cache"])
def test_threads_of_a_pilot_that_is_compiled(memory, compiled):
    pilot = tiny_pilot().eval()
    copilots = [trained_like(pilot, CopilotConfig(memory=memory), seed=seed) for seed in range(2)]
    expected = alone(pilot, copilots, PROMPTS[:2])
    compiling, settings = CompileConfig(mode="default", backend="eager"), {}
    compiling._compile_all_devices = True
    if compiled == "static cache":
        settings = {"cache_implementation": "static", "compile_config": compiling}
    else:
        for layer in pilot.model.layers:
            layer.compile(backend="eager")
    assert all(map(torch.equal, alone(pilot, copilots, PROMPTS[:2], **settings), expected))
    for texts, text in zip(together(pilot, copilots, PROMPTS[:2], 2, **settings), expected, strict=True):
        assert not isinstance(texts, ValueError), texts
        assert all(torch.equal(found, text) for found in texts)


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_processor_that_goes_while_another_thread_runs_the_pilot(pilot, memory):
    """PyTorch calls the hook once more then, without keyword arguments."""
    with CopilotLogitsProcessor(trained_like(pilot, CopilotConfig(memory=memory)), pilot):
        for module in (pilot.model, pilot.model.layers[0]):
            module._forward_pre_hooks_with_kwargs.clear()
        with torch.no_grad():
            expected = pilot(PROMPT).logits
    with torch.no_grad():
        assert torch.equal(pilot(PROMPT).logits, expected)

"""Pilots whose state is no cache of keys and values: they are followed, or raise where their states are not.

tests/test_families.py trains them all, and generates.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from test_families import make_pilot
from test_generation import DECODINGS, PROMPT, Recorder, check_against_training_path, generate, left_padded
from tiny import MEMORIES, trained_like
from transformers import CompileConfig
from versions import CACHE

from hf_copilot import CopilotConfig, CopilotLogitsProcessor
from hf_copilot.pilot.cache import find_cache
from hf_copilot.pilot.head import PilotHead

RECURRENT = {name: settings for name, settings in DECODINGS.items() if name != "chunked_prefill"}  # raises without us


def spread_pilot(family: str):
    """One whose greedy choices are no ties."""
    pilot = make_pilot(family).eval()
    with torch.no_grad():
        for parameter in pilot.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    return pilot


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("decoding", RECURRENT)
def test_a_state_space_pilot_is_followed(decoding, padded, memory):
    """Its cache does not say how many positions it holds."""
    pilot = spread_pilot("Mamba")
    copilot = trained_like(pilot, CopilotConfig(memory=memory))
    ids, mask = left_padded() if padded else (PROMPT, None)
    torch.manual_seed(0)
    with Recorder(copilot, pilot) as processor:
        generate(pilot, processor, ids, mask, **RECURRENT[decoding])
    pads = (lambda row: int((row != 0).int().argmax())) if padded else (lambda row: 0)
    check_against_training_path(copilot, pilot, processor.calls, ids.shape[1], pads)


def test_compiled_with_a_static_cache():
    pilot = spread_pilot("Mamba")
    compiling = CompileConfig(mode="default", backend="eager")
    compiling._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": compiling}
    with CopilotLogitsProcessor(trained_like(pilot), pilot) as processor:
        compiled = generate(pilot, processor, **settings)
        assert torch.equal(compiled, generate(pilot, processor))
    assert not torch.equal(compiled, generate(pilot, None))


def test_a_decoding_loop_in_which_the_decoder_makes_its_cache():
    """Turn by turn, on a cache that is kept; one that was filled before the processor was there, and a copy, raise."""
    pilot = spread_pilot("Mamba")
    copilot = trained_like(pilot)
    with CopilotLogitsProcessor(copilot, pilot) as processor, torch.no_grad():
        expected = generate(pilot, processor, max_new_tokens=4)
    arguments = inspect.signature(pilot.forward).parameters
    name = next(name for name in (CACHE, "cache_params") if name in arguments)  # the second before transformers 5.24
    ids, new, cache = PROMPT, PROMPT, None
    with CopilotLogitsProcessor(copilot, pilot) as processor, torch.no_grad():
        for _ in range(4):
            output = pilot(new, **{name: cache}, use_cache=True)
            cache, scores = find_cache(output.values()), processor(ids, output.logits[:, -1])
            new = scores.argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)
        assert torch.equal(ids, expected)
        output = pilot(new, **{name: copy.deepcopy(cache)}, use_cache=True)
        with pytest.raises(ValueError, match="must be filled while the processor is attached"):
            processor(ids, output.logits[:, -1])


@pytest.mark.parametrize("family", ["RecurrentGemma", "MiniMax"])
def test_beams_whose_states_do_not_follow_raise(family):
    pilot = spread_pilot(family)
    copilot = trained_like(pilot)
    with Recorder(copilot, pilot) as processor:
        generate(pilot, processor)
        with pytest.raises(ValueError, match="use_cache=False, or num_beams=1"):
            generate(pilot, processor, num_beams=4)
        generate(pilot, processor, num_beams=4, use_cache=False)
    check_against_training_path(copilot, pilot, processor.calls, PROMPT.shape[1], lambda row: 0)


def test_the_cap_of_recurrent_gemma_is_known():
    pilot = spread_pilot("RecurrentGemma")
    with torch.no_grad():
        pilot.lm_head.weight.mul_(10)
    caught = []
    pilot.get_decoder().register_forward_hook(lambda module, args, output: caught.append(output[0]))
    with torch.no_grad():
        logits = pilot(PROMPT).logits
    assert logits.abs().max() > 5  # the cap, 30, is felt
    torch.testing.assert_close(PilotHead(pilot)(caught[0]), logits, atol=1e-5, rtol=0)

"""What a Copilot asks of a device: operators and waits, of a step in training and of a generated token.

The bounds are what was counted, and a little more. Raise one only with a reason in the commit.
"""

from __future__ import annotations

import pytest
import torch
from tiny import MEMORIES, tiny_pilot, trained_like
from transformers import DynamicCache
from versions import CACHE

from benchmarks.counting import HOW, token, training_round, waits_of_a_round
from hf_copilot import CopilotConfig, CopilotLogitsProcessor
from hf_copilot.generation.follower import Follower
from hf_copilot.training.transfer import Transfer

OPERATORS_OF_A_TOKEN = {"greedy": 180, "beams": 195}
OPERATORS_BESIDE_A_GRAPH = {"greedy": 40, "beams": 55}  # of a token, where the Copilot's step is recorded
OPERATORS_OF_A_STEP = 540
OPERATORS_OF_A_LOOK = 110  # at one forward of the Pilot


@pytest.mark.parametrize(
    ("recorded", "bounds"), [(False, OPERATORS_OF_A_TOKEN), (True, OPERATORS_BESIDE_A_GRAPH)], ids=["run", "recorded"]
)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_token(memory, how, recorded, bounds, monkeypatch):
    """A run that goes on waits for nothing, as on an accelerator."""
    monkeypatch.setattr(Follower, "waits", False)
    pilot = tiny_pilot().eval()
    alone = token(pilot, None, **HOW[how])
    copilot = trained_like(pilot, CopilotConfig(memory=memory))
    operators, waits = token(pilot, copilot, recorded=recorded, **HOW[how])
    assert operators - alone[0] <= bounds[how]
    assert waits - alone[1] == 1  # for what the last call left to be seen, before the Pilot's next forward


def test_tokens_of_another_run_raise_one_call_later(monkeypatch):
    """Sizes alone go on; that the tokens do not is seen before the next forward, or when the block ends."""
    monkeypatch.setattr(Follower, "waits", False)
    pilot = tiny_pilot().eval()
    copilot = trained_like(pilot)

    def deceive(processor):
        ids = torch.randint(5, 40, (2, 6))
        cache = DynamicCache(config=pilot.config)
        pilot(ids, **{CACHE: cache})
        scores = processor(ids, torch.zeros(2, pilot.config.vocab_size))
        grown = torch.cat([ids, ids[:, :1]], dim=1)
        pilot(grown[:, -1:], **{CACHE: cache})
        processor(grown + 1, scores)

    with torch.no_grad(), CopilotLogitsProcessor(copilot, pilot) as processor:
        deceive(processor)
        with pytest.raises(ValueError, match="has not just been run on"):
            pilot(torch.randint(5, 40, (2, 6)))
    expected = pytest.raises(ValueError, match="has not just been run on")
    with torch.no_grad(), expected, CopilotLogitsProcessor(copilot, pilot) as processor:
        deceive(processor)
    assert not processor.rectifier.tap.handles


def test_chats_that_take_turns_are_looked_at_at_once(monkeypatch):
    """By sizes alone one would go on from the other: their caches tell them apart."""
    monkeypatch.setattr(Follower, "waits", False)
    pilot = tiny_pilot().eval()
    copilot = trained_like(pilot)
    ids = torch.randint(5, 40, (1, 12))
    with torch.no_grad(), CopilotLogitsProcessor(copilot, pilot) as processor:
        caches = [pilot(ids[:, i : i + 6], use_cache=True)[CACHE] for i in (0, 5)]
        pilot(ids[:, 4:10])
        processor(ids[:, 4:10], torch.zeros(1, pilot.config.vocab_size))  # six tokens, of another cache
        output = pilot(ids[:, 11:12], **{CACHE: caches[1]})
        found = processor(ids[:, 5:12], output.logits[:, -1])
        fresh = CopilotLogitsProcessor(copilot, pilot)
        pilot(ids[:, 5:12])
        expected = fresh(ids[:, 5:12], output.logits[:, -1])
        fresh.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_round(memory):
    """Neither grows with the documents, but for what a document is asked once in its life."""
    (few_look, few_step), (look, step) = training_round(memory, 4), training_round(memory, 16)
    assert few_look == look <= OPERATORS_OF_A_LOOK
    assert few_step <= step <= OPERATORS_OF_A_STEP


@pytest.mark.parametrize(("memory", "is_frozen"), [("tokens", False), ("pilot", False), ("pilot", True)])
def test_a_round_waits_for_nothing(memory, is_frozen, monkeypatch):
    """On a pretended GPU: a copy is looked at when it is used, once in a look and once in a step. Copies that the CPU
    waits for give the same Copilot, bit for bit."""
    look, step, weights = waits_of_a_round(memory, 4, is_frozen)
    assert dict(look) == dict(step) == {"event": 1}
    monkeypatch.setattr(Transfer, "send", lambda _, tensor, device: tensor.to(device))
    look, step, expected = waits_of_a_round(memory, 4, is_frozen)
    assert look["copy to the CPU"] >= 10 and torch.equal(weights, expected)


def test_a_copy_that_is_read_too_early_is_seen(monkeypatch):
    """The pretended GPU is late."""
    _, _, weights = waits_of_a_round("tokens", 4)
    arrived = Transfer.arrived

    def too_early(self):
        return self.tensors if "values" in self.tensors else arrived(self)

    monkeypatch.setattr(Transfer, "arrived", too_early)
    _, _, found = waits_of_a_round("tokens", 4)
    assert not torch.equal(found, weights)

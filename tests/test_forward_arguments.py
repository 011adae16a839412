"""What hooks read of a forward hangs on no argument's name or place, and what they can't find raises."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from test_generation import PROMPT, Recorder, generate, left_padded
from test_learner import padded_batch
from tiny import MEMORIES, QUIET, tiny_pilot, tiny_seq2seq, trained_like
from transformers import Cache, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from versions import CACHE

from hf_copilot import CopilotCallback, CopilotConfig, CopilotLogitsProcessor
from hf_copilot.pilot.forward_arguments import ForwardArguments


class OtherName(LlamaModel):
    """As a release might that renames the cache once more."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, kept=kwargs.pop(CACHE, None), **kwargs)

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, kept: Cache | None = None, **kwargs):
        return super().forward(input_ids, attention_mask, use_cache=use_cache, **{CACHE: kept}, **kwargs)


class ByPosition(LlamaModel):
    """Called with the first four of its arguments by position."""

    def __call__(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().__call__(input_ids, attention_mask, position_ids, kwargs.pop(CACHE, None), **kwargs)


class OtherLayer(LlamaDecoderLayer):
    """Called with its first argument by name, after others, and under another name."""

    def __call__(self, hidden_states, **kwargs):
        return super().__call__(**kwargs, states=hidden_states)

    def forward(self, states, **kwargs):
        return super().forward(states, **kwargs)


class WrappedLayer(LlamaDecoderLayer):
    """As a wrapper that shows no signature."""

    def __call__(self, hidden_states, **kwargs):
        return super().__call__(**kwargs, hidden_states=hidden_states)

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def corrections(pilot, copilot, **settings):
    ids, mask = left_padded()
    with Recorder(copilot, pilot) as processor:
        text = generate(pilot, processor, ids, mask, **settings)
    return text, torch.cat([f for _, f in processor.calls])


@pytest.mark.parametrize(
    ("memory", "other"),
    [(memory, other) for memory in MEMORIES for other in (OtherName, ByPosition)]
    + [("pilot", other) for other in (OtherLayer, WrappedLayer)],  # tokens need no layer
)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_names_and_places_make_no_difference(pilot, memory, other, settings):
    copilot = trained_like(pilot, CopilotConfig(memory=memory))
    expected, expected_f = corrections(pilot, copilot, **settings)
    for module in [pilot.model, *pilot.model.layers]:
        if issubclass(other, type(module)):
            module.__class__ = other
    text, f = corrections(pilot, copilot, **settings)
    assert torch.equal(text, expected) and torch.equal(f, expected_f)


class NoMask(LlamaModel):
    def forward(self, input_ids=None, padding_mask=None, use_cache=None, cache=None, **kwargs):
        raise AssertionError


class NoCache(LlamaModel):
    def forward(self, input_ids=None, attention_mask=None, use_cache=None, state=None, **kwargs):
        raise AssertionError


@pytest.mark.parametrize(("other", "missing"), [(NoMask, r"reads \['attention_mask'\]"), (NoCache, "reads the cache")])
def test_what_cannot_be_found_raises_when_hooks_are_put_on(pilot, other, missing):
    copilot = trained_like(pilot)
    pilot.model.__class__ = other
    with pytest.raises(NotImplementedError, match=rf"{missing} from.*Installed is transformers 5\..*, tested are 5\."):
        CopilotLogitsProcessor(copilot, pilot)
    assert not pilot.model._forward_pre_hooks and not pilot._forward_hooks


def test_a_decoder_that_does_not_read_the_encoder_raises():
    pilot = tiny_seq2seq()
    copilot = trained_like(pilot)

    class NoEncoder(type(pilot.get_decoder())):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            raise AssertionError

    pilot.get_decoder().__class__ = NoEncoder
    with pytest.raises(NotImplementedError, match="'encoder_hidden_states', 'encoder_attention_mask'"):
        CopilotLogitsProcessor(copilot, pilot)


def test_a_cache_of_another_kind_raises(pilot):
    unknown = pytest.raises(NotImplementedError, match=r"is a dict, not a transformers\.Cache")
    with CopilotLogitsProcessor(trained_like(pilot), pilot), torch.no_grad(), unknown:
        pilot.model(PROMPT, **{CACHE: {"keys": PROMPT}})


def hand_patched(pilot):
    forward = pilot.forward
    pilot.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return pilot


def dispatched(pilot):
    return add_hook_to_module(pilot, AlignDevicesHook())


@pytest.mark.parametrize("wrap", [torch.compile, hand_patched, dispatched], ids=lambda wrap: wrap.__name__)
def test_the_names_come_through_wrappers(pilot, wrap):
    named = ForwardArguments(wrap(pilot)).named((1, 2), {"labels": 3})
    assert named == {"input_ids": 1, "attention_mask": 2, "labels": 3}


def test_arguments_by_position_without_a_name_raise():
    with pytest.raises(NotImplementedError, match="called with 2 arguments by position, and its signature names 1"):
        ForwardArguments(torch.nn.ReLU()).named((1, 2), {})


class Positional(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss


def test_the_callback_sees_arguments_by_position(tmp_path):
    rows = [{name: tensor[i] for name, tensor in padded_batch().items()} for i in range(3)]
    logs = []
    for trainer_class in (Trainer, Positional):
        callback = CopilotCallback(CopilotConfig(dropout=0.0))
        args = TrainingArguments(str(tmp_path), max_steps=2, **QUIET)
        trainer_class(model=tiny_pilot(), args=args, train_dataset=rows, callbacks=[callback]).train()
        logs.append([record for records in callback.learner.log.rounds for record in records])
    assert len(logs[0]) == len(logs[1]) > 0
    for expected, record in zip(*logs, strict=True):
        assert torch.equal(record.input_ids, expected.input_ids) and torch.equal(record.positions, expected.positions)

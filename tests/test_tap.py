"""Exactly one record per training forward, with the right values, whatever wraps or recomputes the Pilot."""

from __future__ import annotations

import contextlib
import copy
import pickle
from functools import partial

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from tiny import SHAPE, assert_same, tiny_pilot
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.common import CHECKPOINTING
from hf_copilot import CopilotConfig, CopilotLearner, CopilotLogitsProcessor, copilot_for
from hf_copilot.pilot.head import PilotHead
from hf_copilot.pilot.inspect import find_layers
from hf_copilot.pilot.tap import PilotTap

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def plain(pilot):
    return pilot


def lora(pilot):
    return get_peft_model(pilot, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))


def modules_to_save(pilot):
    saved = ["embed_tokens", "lm_head"]
    return get_peft_model(pilot, LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=saved))


def prompt_tuning(pilot):
    return get_peft_model(pilot, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def taps(pilot, pooling="mean", pooled="all"):
    records = []
    config = CopilotConfig(memory="pilot", pooled_layers=pooled, pooling=pooling)
    return PilotTap(pilot, config, records.append, lambda: True), records


def reference(pilot):
    """X̃ and every layer's raw output by transformers' own means, from a forward without any tap."""
    outputs = []
    layers = find_layers(pilot)
    handles = [layer.register_forward_hook(lambda m, a, out: outputs.append(out.detach())) for layer in layers]
    with torch.no_grad():
        first = pilot(input_ids=IDS, output_hidden_states=True).hidden_states[0]
    for handle in handles:
        handle.remove()
    return first, torch.stack(outputs)


def test_the_check_of_the_head_leaves_every_mode(pilot):
    pilot.train()
    pilot.model.layers[0].eval()
    PilotHead(pilot).check()
    assert pilot.training and pilot.model.layers[1].training and not pilot.model.layers[0].mlp.training


@pytest.mark.parametrize("wrap", [plain, lora, modules_to_save, prompt_tuning])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
def test_one_record_per_forward(wrap, reentrant):
    pilot = wrap(tiny_pilot()).train()
    embeddings, layers = reference(pilot)
    if reentrant is not None:
        getattr(pilot, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
        pilot.enable_input_require_grads()
    tap, records = taps(pilot)
    with tap:
        pilot(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(records) == 1
    length = IDS.shape[1]
    assert torch.allclose(records[0].embeddings[:, -length:], embeddings[:, -length:], atol=1e-6)
    assert torch.allclose(records[0].hidden_states, layers.mean(0), atol=1e-5)
    assert not records[0].hidden_states.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_checkpointed_from_outside(monkeypatch, reentrant):
    """As older transformers and FSDP's wrapper do: layer hooks run again in the backward pass."""
    calls = []

    def recomputed(self, *args, **kwargs):
        calls.append(self)
        return checkpoint(partial(nn.Module.__call__, self, **kwargs), *args, use_reentrant=reentrant)

    pilot = tiny_pilot().train()
    pilot.enable_input_require_grads()
    _, layers = reference(pilot)
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", recomputed)
    tap, records = taps(pilot)
    with tap:
        pilot(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert calls and len(records) == 1
    assert torch.allclose(records[0].hidden_states, layers.mean(0), atol=1e-5)


@pytest.mark.parametrize("pooled", ["all", "first_half", "second_half"])
@pytest.mark.parametrize("pooling", ["mean", "max", "sum"])
def test_pooling(pooling, pooled):
    pilot = tiny_pilot(num_hidden_layers=4).eval()
    _, layers = reference(pilot)
    layers = {"all": layers, "first_half": layers[:2], "second_half": layers[2:]}[pooled]
    expected = {"mean": layers.mean(0), "max": layers.amax(0), "sum": layers.sum(0)}[pooling]
    tap, records = taps(pilot, pooling, pooled)
    with tap:
        pilot(input_ids=IDS)
    assert torch.allclose(records[0].hidden_states, expected, atol=1e-5)


def test_a_failed_forward_leaves_nothing(pilot):
    tap, records = taps(pilot)
    handle = pilot.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with tap:
        with pytest.raises(ZeroDivisionError):
            pilot(input_ids=IDS)
        handle.remove()
        assert not records and tap.states is None
        pilot(input_ids=IDS)
    assert len(records) == 1


def test_the_hooks_of_a_copied_pilot_are_silent(pilot):
    tap, records = taps(pilot)
    with tap:
        copied = copy.deepcopy(pilot)
        copied(input_ids=IDS)
        assert not records
        pilot(input_ids=IDS)
    assert len(records) == 1
    held = [hook.__self__ for module in copied.modules() for hook in module._forward_hooks.values()]
    assert held and all(copy_of.sink is copy_of.layers is None for copy_of in held)


def test_the_hooks_of_a_saved_pilot_are_silent(pilot):
    """`torch.save`, pickling, a spawned process: with a processor, and in a training loop."""
    copilot = copilot_for(pilot)
    learner = CopilotLearner(copilot, pilot, num_training_steps=1)
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        pickle.dumps(processor)
        loaded = pickle.loads(pickle.dumps(pilot))
    learner.close()
    held = [hook.__self__ for module in loaded.modules() for hook in module._forward_hooks.values()]
    assert held and all(tap.sink is tap.layers is None for tap in held)
    assert torch.equal(loaded(input_ids=IDS).logits, pilot(input_ids=IDS).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter_on_the_head_draws_as_without_us(dropout):
    """The head is called once more for ℓ, in training: without its dropout, so that random states stay the same."""

    def weights(with_copilot):
        config = LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        pilot = get_peft_model(tiny_pilot(), config).train()
        learner = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=3) if with_copilot else None
        optimizer = torch.optim.AdamW([p for p in pilot.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            inputs = {"input_ids": IDS, "labels": IDS}
            with learner.observe(inputs) if learner else contextlib.nullcontext():
                loss = pilot(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if learner:
                learner.step()
        return pilot

    assert_same(weights(True), weights(False))


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_a_matrix_without_a_weight_is_named(pilot, name):
    pilot.set_submodule(name, nn.Sequential(pilot.get_submodule(name)))
    with pytest.raises(ValueError, match="Sequential without a `weight`"):
        PilotHead(pilot)


@pytest.mark.parametrize("drops", ["module_dropout", "rank_dropout"])
def test_an_adapter_of_the_head_that_drops_draws_nothing(pilot, drops):
    config = LoHaConfig(r=2, target_modules=["lm_head"], init_weights=False, **{drops: 0.5})
    head, before = PilotHead(get_peft_model(pilot, config).train()), torch.get_rng_state()
    first, *others = (head(torch.ones(1, SHAPE["hidden_size"])) for _ in range(6))
    assert all(other.equal(first) for other in others) and torch.get_rng_state().equal(before)


def test_a_head_that_is_trained_whole_beside_another_type(pilot):
    """PEFT keeps the original, first among the parameters."""
    model = get_peft_model(pilot.bfloat16(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.lm_head.modules_to_save.float()
    assert {parameter.dtype for parameter in model.lm_head.parameters()} == {torch.bfloat16, torch.float32}
    assert PilotHead(model)(torch.randn(2, 32, dtype=torch.bfloat16)).shape == (2, pilot.config.vocab_size)


def test_a_weight_that_is_made_at_each_look_is_not_looked_at(pilot):
    class Head(nn.Module):
        looks = 0

        def __init__(self, linear):
            super().__init__()
            self.linear, self.out_features = linear, linear.out_features

        @property
        def weight(self):
            type(self).looks += 1
            return self.linear.weight

        def forward(self, hidden):
            return self.linear(hidden)

    pilot.lm_head = Head(pilot.lm_head)
    head = PilotHead(pilot)
    before = Head.looks
    head.check()
    assert (head.device.type, head.vocab_size) == ("cpu", pilot.config.vocab_size) and Head.looks == before


SCALED = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gpt2": {},
}


@pytest.mark.parametrize("family", SCALED)
def test_the_head_gives_the_models_own_logits(family):
    pilot = tiny_pilot(family, **SCALED[family]).train()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    PilotHead(pilot).check()
    assert torch.equal(torch.get_rng_state(), state) and pilot.training
    tap, records = taps(pilot.eval())
    with tap, torch.no_grad():
        logits = pilot(input_ids=IDS).logits
    assert torch.allclose(PilotHead(pilot)(records[0].last_hidden_state), logits, atol=1e-6)


def test_divided_and_multiplied_logits():
    from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
    PilotHead(CohereForCausalLM(CohereConfig(logit_scale=0.1, **shape))).check()
    PilotHead(GraniteForCausalLM(GraniteConfig(logits_scaling=4.0, **shape))).check()


def test_a_head_with_an_unknown_scale_fails_loudly(pilot):
    head = PilotHead(pilot)
    head.scale = 0.5
    with pytest.raises(ValueError, match="can't be recomputed"):
        head.check()

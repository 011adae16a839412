"""`score`: likelihoods of labelled tokens without a learner, in any order and any batch."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from tiny import VOCAB_SIZE, teacher_forced, tiny_pilot, tiny_seq2seq, trained_like
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, RobertaConfig, RobertaForCausalLM

from hf_copilot import CopilotConfig, copilot_for, score
from hf_copilot.training.folding import teach

ROWS = [  # a prompt and a completion; two completions; no prompt; nothing labelled
    {"input_ids": [5, 9, 12, 20, 21, 2], "labels": [-100, -100, -100, 20, 21, 2]},
    {"input_ids": [5, 9, 12, 30, 31, 7, 8], "labels": [-100, 9, -100, -100, 31, 7, 8]},
    {"input_ids": [11, 12, 13], "labels": [11, 12, 13]},
    {"input_ids": [11, 12, 13], "labels": [-100, -100, -100]},
]
CONFIGS = {"tokens": {}, "states": {"memory": "pilot"}, "lent": {"vocab_projection": "pilot"}}


@pytest.fixture(params=CONFIGS)
def copilot(request, pilot):
    return trained_like(pilot, CopilotConfig(**CONFIGS[request.param]))


def test_the_pilots_likelihoods_are_its_own(pilot, copilot):
    for row, found in zip(ROWS, score(pilot, copilot, ROWS, strengths=[0.0]), strict=True):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
        logits = pilot(input_ids=ids[None]).logits[0, :-1][labels != -100]  # [m, V]
        expected = logits.log_softmax(-1).gather(1, labels[labels != -100, None])[:, 0]
        torch.testing.assert_close(found.log_likelihoods[0], expected.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.is_likeliest[0], logits.argmax(-1) == labels[labels != -100])


def test_the_rectified_are_those_of_the_training_path(pilot, copilot):
    row, strength = ROWS[0], 0.7
    (found,) = score(pilot, copilot, [row], strengths=[strength])
    ids = torch.tensor(row["input_ids"])
    f = teacher_forced(copilot, pilot, ids, prompt_length=3)[:-1]  # [m, V]
    logits = pilot(input_ids=ids[None]).logits[0, 2:-1]
    expected = (logits + strength * f).log_softmax(-1).gather(1, ids[3:, None])[:, 0]
    torch.testing.assert_close(found.log_likelihoods[0], expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_change_nothing(pilot, copilot, batch_size):
    together = score(pilot, copilot, ROWS, batch_size=batch_size)
    alone = [score(pilot, copilot, [row])[0] for row in ROWS]
    for a, b in zip(together, alone, strict=True):
        assert a.log_likelihoods.shape[0] == 2
        torch.testing.assert_close(a.log_likelihoods, b.log_likelihoods, rtol=1e-4, atol=1e-4)
    assert [score.log_likelihoods.shape[1] for score in together] == [3, 4, 2, 0]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_beside_an_encoder_decoder(family):
    pilot = tiny_seq2seq(family).eval()
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [9, 10, 2]}, {"input_ids": [5, 6], "labels": [9, -100, 11, 12, 2]}]
    found = score(pilot, trained_like(pilot), rows, strengths=[0.0, 1.0])
    for row, own in zip(rows, found, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = pilot(input_ids=ids, labels=labels).logits[0].log_softmax(-1)
        expected = logits[labels[0] != -100].gather(1, labels[labels != -100][:, None])[:, 0]
        torch.testing.assert_close(own.log_likelihoods[0], expected.detach(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0].log_likelihoods[0], found[0].log_likelihoods[1], atol=1e-3)


def test_a_row_may_have_one_token_more_than_the_pilot_has_positions():
    """As lm-eval's windows have: the last token is predicted, not read."""
    pilot = tiny_pilot("gpt2").eval()  # learned positions
    ids = torch.randint(5, 40, (257,), generator=torch.Generator().manual_seed(0))
    (found,) = score(pilot, trained_like(pilot), [{"input_ids": ids.tolist(), "labels": ids.tolist()}])
    expected = pilot(input_ids=ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(found.log_likelihoods[0], expected.detach(), rtol=1e-4, atol=1e-4)
    (alone,) = score(pilot, trained_like(pilot), [{"input_ids": [5], "labels": [5]}])
    assert alone.log_likelihoods.shape == (2, 0)


def test_both_models_are_as_they_were(pilot, copilot):
    pilot.train(), copilot.train()
    modes, state = [module.training for module in pilot.modules()], torch.get_rng_state()
    score(pilot, copilot, ROWS)
    assert copilot.training and [module.training for module in pilot.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pilot.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_quantised_pilot_is_scored_without_its_dropout(pilot, tmp_path):
    """bitsandbytes' layers stay in training mode; nothing else does."""
    pilot = tiny_pilot(hidden_size=64, intermediate_size=64, attention_dropout=0.5)
    pilot.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    ).train()
    copilot = trained_like(pilot)
    first, second = (score(quantised, copilot, ROWS[:1])[0].log_likelihoods for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_head(tmp_path, bits):
    """As a user's own `llm_int8_skip_modules` leaves it: its size is the vocabulary's, not that of packed numbers."""
    pilot = tiny_pilot(hidden_size=64, intermediate_size=64)
    pilot.save_pretrained(tmp_path)
    own = BitsAndBytesConfig(**{bits: True}, llm_int8_skip_modules=["q_proj"])
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=own, device_map="cpu")
    assert not quantised.lm_head.weight.is_floating_point()
    copilot = copilot_for(quantised, CopilotConfig(init="random", hidden_size=32, num_attention_heads=2))
    assert copilot.config.vocab_size == pilot.config.vocab_size
    assert score(quantised, copilot, ROWS[:1])[0].log_likelihoods.isfinite().all()


def test_what_can_not_be_scored_raises(pilot, copilot):
    with pytest.raises(ValueError, match="Row 1 has 3 tokens and 2 labels"):
        score(pilot, copilot, [ROWS[0], {"input_ids": [5, 6, 7], "labels": [6, 7]}])
    for row in ({"prompt": "2+2=", "completion": "4"}, {"input_ids": [5]}, "2+2="):
        with pytest.raises(ValueError, match="Row 1 has no input_ids and labels"):
            score(pilot, copilot, [ROWS[0], row])
        with pytest.raises(ValueError, match="Row 1 has no input_ids and labels"):
            teach(pilot, copilot, [ROWS[0], row])
    with pytest.raises(ValueError, match="Row 0 has 0 tokens"):
        score(pilot, copilot, [{"input_ids": [], "labels": []}])
    with pytest.raises(ValueError, match="finite"):
        score(pilot, copilot, ROWS, strengths=[-1.0])
    with pytest.raises(ValueError, match="decoder-only"):
        score(tiny_seq2seq(), copilot, ROWS)
    broken = tiny_pilot()
    broken.get_input_embeddings().weight.data[20] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        score(broken, copilot, ROWS)


def test_a_row_that_is_too_long_for_learned_positions_raises():
    pilot = tiny_pilot("gpt2")
    length = pilot.config.n_positions + 2
    rows = [{"input_ids": [5] * count, "labels": [5] * count} for count in (2, length)]
    with pytest.raises(ValueError, match=f"can't read {length} tokens: cut row 1"):
        score(pilot, trained_like(pilot), rows)


def test_a_head_that_is_offloaded_raises_and_leaves_the_copilot_where_it_is():
    pilot = tiny_pilot().eval()
    copilot = trained_like(pilot)
    cpu_offload(pilot, execution_device=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="head is offloaded"):
        score(pilot, copilot, ROWS)
    assert {parameter.device.type for parameter in copilot.parameters()} == {"cpu"}


def test_logits_that_are_not_the_heads_raise():
    """Else the Pilot alone would be measured wrongly, without a word."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    settings = sizes | {"vocab_size": VOCAB_SIZE, "is_decoder": True, "initializer_range": 0.3, "pad_token_id": 0}
    pilot = RobertaForCausalLM(RobertaConfig(**settings, max_position_embeddings=64)).eval()
    with pytest.raises(ValueError, match="can't be recomputed"):
        score(pilot, trained_like(tiny_pilot()), ROWS)

"""`memory="tokens"`, the default: a Copilot that reads nothing of its Pilot but the distribution, and so fits every
size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig
from test_generation import count_hooks
from test_trainer import losses, train, train_beside_a_pilot_that_hardly_learns
from tiny import VOCAB_SIZE, assert_same, tiny_pilot, tiny_seq2seq, tiny_tokenizer, trained_like
from trl import SFTTrainer

from hf_copilot import (
    CopilotConfig,
    CopilotLearner,
    CopilotLogitsProcessor,
    CopilotModel,
    CopilotTrainer,
    copilot_for,
)
from hf_copilot.model.hub import copilot_card

TOKENS = {"memory": "tokens"}
IDS = torch.tensor([[5, 9, 12, 7, 20, 31]])
WIDER = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
STATES = ("input_ids", "embeddings", "hidden_states")


def swap(rows):
    """The first two, where there are any, in each other's place."""
    return rows[[1, 0, *range(2, len(rows))]] if len(rows) else rows


def learner_of(copilot, pilot, **settings):
    """With one document in its round, whose last four tokens are labelled."""
    learner = CopilotLearner(copilot, pilot, 1, log_dtype=torch.float32, **settings)
    labels = IDS.clone()
    labels[:, :2] = -100
    with learner.observe({"input_ids": IDS, "labels": labels}), torch.no_grad():
        pilot(input_ids=IDS)
    return learner


def corrections(learner, records):
    (batch,) = learner.forced.batches(records)
    with torch.no_grad():
        return learner.copilot(**batch.inputs, return_logits=True).logits[batch.queries]  # [Q, V]


def test_no_state_of_the_pilot_is_read_or_logged(pilot):
    """Neither hooks on its layers nor states in the log, but those that its head makes logits of."""
    learner = learner_of(copilot_for(pilot, CopilotConfig(**TOKENS)), pilot)
    (record,) = learner.round
    assert len(record.embeddings) == len(record.hidden_states) == 0
    assert len(record.final_states) == len(record.labels) == 4
    assert count_hooks(pilot.model.layers) == 0
    learner.close()
    with CopilotLogitsProcessor(learner.copilot, pilot):
        assert count_hooks(pilot.model.layers) == 0
    assert not any("memory_proj" in name for name in learner.copilot.state_dict())


def test_what_a_query_may_read(pilot):
    """Tokens up to its own, prompt included: a change behind it changes nothing, one before it does."""
    copilot = trained_like(pilot, CopilotConfig(**TOKENS))
    learner = learner_of(copilot, pilot)
    (record,) = learner.round
    base = corrections(learner, [record])
    for changed in range(len(record.input_ids)):
        ids = record.input_ids.clone()
        ids[changed] = 40
        found = corrections(learner, [dataclasses.replace(record, input_ids=ids)])
        differs = ((found - base).abs().amax(-1) > 1e-6).tolist()
        assert differs == [changed <= position for position in record.positions.tolist()]


@pytest.mark.parametrize("memory", ["pilot", "tokens"])
def test_the_order_of_the_tokens_is_read(pilot, memory):
    """With the Pilot's states and its logits out of the way, two tokens of the prompt that change places change f
    where there are positions, and the place of the whole text does not."""
    found = {}
    for embedding in ("rotary", "none"):
        config = CopilotConfig(memory=memory, position_embedding=embedding, copilot_input="token")
        copilot = trained_like(pilot, config)
        learner = learner_of(copilot, pilot)
        (record,) = learner.round
        swapped = dataclasses.replace(record, **{name: swap(getattr(record, name)) for name in STATES})
        change = corrections(learner, [swapped]) - corrections(learner, [record])
        found[embedding] = change[1:].abs().max()  # the first query does not read h of the second token yet
        (batch,) = learner.forced.batches([record])
        moved = {name: batch.inputs[name] + 7 for name in ("positions", "memory_positions") if name in batch.inputs}
        with torch.no_grad():
            here, there = (copilot(**(batch.inputs | changed)).last_hidden_state for changed in ({}, moved))
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    assert found["rotary"] > 0.01 and found["none"] < 1e-4


def test_its_own_embedding_learns_as_memory_too(pilot):
    """Tokens of the prompt are neither inputs nor labels: their rows' gradient is of what attention reads alone."""
    learner = learner_of(trained_like(pilot, CopilotConfig(**TOKENS, copilot_input="token")), pilot)
    (batch,) = learner.forced.batches(learner.round)
    learner.forced.loss(batch).backward()
    has_gradient = learner.copilot.embed_tokens.weight.grad.abs().amax(-1) > 0
    assert has_gradient.nonzero()[:, 0].tolist() == sorted(IDS[0, :-1].tolist())


@pytest.mark.parametrize("objective", ["ours", "paper"])
def test_it_moves_to_a_pilot_of_another_size(pilot, objective):
    """Where the logits are the same, so is f, whatever the states."""
    make = CopilotConfig if objective == "ours" else CopilotConfig.paper
    copilot = trained_like(pilot, make(**TOKENS, num_hidden_layers=2, error_feedback="realized"))
    pilots = [pilot, tiny_pilot(num_hidden_layers=1).eval(), tiny_pilot(**WIDER).eval()]
    settings = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    found = []
    for one in pilots:
        torch.nn.init.zeros_(one.lm_head.weight)
        with CopilotLogitsProcessor(copilot, one, tokenizer=tiny_tokenizer()) as processor:
            out = one.generate(IDS, logits_processor=[processor], eos_token_id=-1, **settings)
        found.append(torch.stack(out.scores))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert found[0].std() > 0.01
    with pytest.raises(ValueError, match="memory='tokens'"):
        CopilotLogitsProcessor(trained_like(pilot, CopilotConfig(memory="pilot")), pilots[2])


def test_it_goes_on_learning_beside_a_pilot_of_another_size(pilot, tmp_path):
    copilot = trained_like(pilot, CopilotConfig(**TOKENS))
    before = copilot.lm_head.weight.clone()
    ours = train(CopilotTrainer, tmp_path / "a", pilot=tiny_pilot(**WIDER), config=copilot)
    theirs = train(SFTTrainer, tmp_path / "b", pilot=tiny_pilot(**WIDER))
    assert_same(ours.model, theirs.model)
    assert ours.learner.skipped_steps == 0 and not torch.equal(ours.copilot.lm_head.weight, before)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_pilot_is_trained_as_ever(tmp_path, lora):
    peft = {"peft": LoraConfig(r=4, target_modules=["q_proj"])} if lora else {}
    ours = train(CopilotTrainer, tmp_path / "a", config=CopilotConfig(**TOKENS), **peft)
    theirs = train(SFTTrainer, tmp_path / "b", **peft)
    assert_same(ours.model, theirs.model)
    assert losses(ours) == losses(theirs)


def test_it_learns_what_the_pilot_gets_wrong_and_is_saved(tmp_path):
    trainer, metrics = train_beside_a_pilot_that_hardly_learns(tmp_path, CopilotConfig(**TOKENS))
    assert metrics["eval_rectified_nll"] < 0.8 * metrics["eval_pilot_nll"]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = CopilotModel.from_pretrained(tmp_path / "saved" / "copilot")
    assert_same(loaded, trainer.copilot)
    assert loaded.config.memory == "tokens" and loaded.config.pilot_hidden_size is None
    card = (tmp_path / "saved" / "copilot" / "README.md").read_text()
    assert "same tokenizer, of whatever size" in card and "hidden size," in card and "None" not in card


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 0.2)], ids=["float32", "bfloat16"])
def test_with_an_adapter(pilot, dtype, atol):
    """Trained with LoRA and merged it gives the same f, whatever the type of its frozen weights."""
    copilot = trained_like(pilot, CopilotConfig(**TOKENS, dropout=0.0)).to(dtype)
    learner = learner_of(copilot, pilot, peft_config=LoraConfig(r=2))
    records = learner.round
    learner.step()
    copilot.eval()
    expected = corrections(learner, records)
    merged = CopilotLearner(learner.exported().eval(), pilot, log_dtype=torch.float32)
    torch.testing.assert_close(corrections(merged, records), expected, rtol=1e-4, atol=atol)


def test_a_config_that_is_changed_on_loading_is_checked(pilot, tmp_path):
    copilot_for(pilot, CopilotConfig(vocab_projection="pilot")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocab_projection='own'"):
        CopilotModel.from_pretrained(tmp_path, memory="tokens")


def test_what_is_read_by_default(pilot):
    """Tokens where they can be."""
    assert copilot_for(pilot).config.memory == "tokens"
    assert copilot_for(pilot, CopilotConfig.paper()).config.memory == "pilot"
    assert copilot_for(pilot, CopilotConfig(vocab_projection="pilot")).config.memory == "pilot"
    assert copilot_for(tiny_seq2seq()).config.memory == "pilot"
    with pytest.raises(ValueError, match="pooling.*or use memory='pilot'"):
        copilot_for(pilot, CopilotConfig(pooling="max"))


def test_positions_that_are_missing_are_named(pilot):
    copilot = trained_like(pilot, CopilotConfig(**TOKENS))
    (batch,) = (learner := learner_of(copilot, pilot)).forced.batches(learner.round)
    inputs = {name: tensor for name, tensor in batch.inputs.items() if "positions" not in name}
    with pytest.raises(ValueError, match="rotary_positions"):
        copilot(**inputs)


def test_rotary_positions_beside_an_encoder_decoder_raise():
    with pytest.raises(ValueError, match="position_embedding='none'"):
        copilot_for(tiny_seq2seq(), CopilotConfig(position_embedding="rotary"))
    assert copilot_for(tiny_seq2seq()).config.position_embedding == "none"


def test_a_token_that_it_has_no_row_for_is_read_as_the_start(pilot):
    copilot = trained_like(pilot, CopilotConfig(**TOKENS))
    memory = copilot.embed_memory(torch.tensor([[3, VOCAB_SIZE, VOCAB_SIZE + 5]]))
    assert torch.equal(memory[0, 0], copilot.embed_tokens.weight[3])
    assert torch.equal(memory[0, 1:], copilot.start.weight.expand(2, -1))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pilot_is_encoder_decoder": True}, "encoder-decoder"),
        ({"vocab_projection": "pilot"}, "vocab_projection='own'"),
        ({"pooling": "max"}, "pooling"),
        ({"hidden_state_lag": 0, "pooled_layers": "first_half"}, "pooled_layers.*hidden_state_lag"),
    ],
)
def test_what_does_not_go_with_it_raises(settings, message):
    with pytest.raises(ValueError, match=message):
        CopilotConfig(**TOKENS, **settings)


def test_an_encoder_decoder_raises_before_anything_is_built():
    with pytest.raises(ValueError, match="memory='pilot'"):
        copilot_for(tiny_seq2seq(), CopilotConfig(**TOKENS, init="random"))


def test_a_card_says_what_a_pilot_must_have(pilot):
    needs = {
        name: str(copilot_card(copilot_for(pilot, CopilotConfig(memory=name)).config)) for name in ("pilot", "tokens")
    }
    assert "same vocabulary and hidden size." in needs["pilot"] and "states of size 32" in needs["pilot"]
    assert "of whatever size" in needs["tokens"] and "none of the Pilot's states" in needs["tokens"]

"""`vocab_projection="pilot"`: a Copilot between the Pilot's own embedding and output matrix."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from test_trainer import losses, train, train_beside_a_pilot_that_hardly_learns
from tiny import VOCAB_SIZE, assert_same, tiny_pilot, tiny_tokenizer, trained_like
from transformers import OPTConfig, OPTForCausalLM
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
from hf_copilot.pilot.compatibility import tokenizer_fingerprint
from hf_copilot.pilot.vocabulary import lent_vocabulary
from hf_copilot.training.report import count_parameters, multiplied_parameters

LENT = {"vocab_projection": "pilot"}
IDS = torch.tensor([[5, 9, 12, 7, 20, 31]])


def learner_of(copilot, pilot):
    """With one round in its log."""
    learner = CopilotLearner(copilot, pilot, 1, log_dtype=torch.float32)
    with learner.observe({"input_ids": IDS, "labels": IDS}), torch.no_grad():
        pilot(input_ids=IDS)
    return learner


def test_nothing_in_the_copilot_has_the_size_of_the_vocabulary(pilot):
    copilot = copilot_for(pilot, CopilotConfig(**LENT))
    assert all(VOCAB_SIZE not in tensor.shape for tensor in copilot.state_dict().values())
    assert copilot.state_dict().keys() - copilot_for(pilot).state_dict().keys() == {
        "input_proj.weight",
        "output_proj.weight",
    }
    assert not copilot.output_proj.weight.any()
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        settings = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        fresh, bare = pilot.generate(IDS, logits_processor=[processor], **settings), pilot.generate(IDS, **settings)
    assert torch.allclose(torch.stack(fresh.scores), torch.stack(bare.scores), atol=1e-5)


@pytest.mark.parametrize("objective", ["ours", "paper"])
@pytest.mark.parametrize("copilot_input", ["both", "discrepancy", "token"])
def test_it_is_a_copilot_whose_matrices_are_products(pilot, objective, copilot_input):
    """With E = E_P A and W = W_P B of its own, a Copilot computes what maps A and B do on lent matrices, and the
    gradient of B is W_Pᵀ times that of W."""
    make = CopilotConfig if objective == "ours" else CopilotConfig.paper
    config = {"num_hidden_layers": 2, "copilot_input": copilot_input}
    lent = trained_like(pilot, make(**config, **LENT))
    own = copilot_for(pilot, make(memory="pilot", **config)).eval()
    embedding, head = lent_vocabulary(pilot, lent.device)
    with torch.no_grad():
        lent.input_proj.weight.normal_(std=0.2)
        own.load_state_dict({name: t for name, t in lent.state_dict().items() if "put_proj" not in name}, strict=False)
        own.embed_tokens.weight.copy_(embedding @ lent.input_proj.weight.T)
        own.lm_head.weight.copy_(head @ lent.output_proj.weight)
    found = []
    for copilot in (lent, own):
        learner = learner_of(copilot, pilot)
        (batch,) = learner.forced.batches(learner.round)
        loss = learner.forced.loss(batch)
        loss.backward()
        found.append(loss.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lent.output_proj.weight.grad, head.T @ own.lm_head.weight.grad, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in pilot.parameters())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_pilot_that_lends_is_trained_as_ever(tmp_path, lora):
    peft = {"peft": LoraConfig(r=4, target_modules=["q_proj"])} if lora else {}
    ours = train(CopilotTrainer, tmp_path / "a", config=CopilotConfig(**LENT), **peft)
    theirs = train(SFTTrainer, tmp_path / "b", **peft)
    assert_same(ours.model, theirs.model)
    assert losses(ours) == losses(theirs)
    assert ours.copilot.output_proj.weight.abs().sum() > 0 and ours.learner.skipped_steps == 0


def test_it_learns_what_the_pilot_gets_wrong_and_is_saved_small(tmp_path):
    trainer, metrics = train_beside_a_pilot_that_hardly_learns(tmp_path, CopilotConfig(**LENT))
    assert metrics["eval_rectified_nll"] < 0.8 * metrics["eval_pilot_nll"]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = CopilotModel.from_pretrained(tmp_path / "saved" / "copilot")
    assert_same(loaded, trainer.copilot)
    texts = []
    for copilot in (loaded, trainer.copilot):
        with CopilotLogitsProcessor(copilot, trainer.model.eval(), tokenizer=tiny_tokenizer()) as processor:
            texts.append(trainer.model.generate(IDS, logits_processor=[processor], max_new_tokens=5, do_sample=False))
    assert torch.equal(*texts)


def test_one_copilot_serves_two_pilots_at_a_time(pilot):
    """Each processor lends its own Pilot's matrices."""
    copilot, other = trained_like(pilot, CopilotConfig(**LENT)), tiny_pilot(seed=1).eval()
    settings = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}

    def scores(one, processor):
        return torch.stack(one.generate(IDS, logits_processor=[processor], **settings).scores)

    alone = []
    for one in (pilot, other):
        with CopilotLogitsProcessor(copilot, one) as processor:
            alone.append(scores(one, processor))
    with CopilotLogitsProcessor(copilot, pilot) as first, CopilotLogitsProcessor(copilot, other) as second:
        together = scores(pilot, first), scores(other, second)
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


def test_an_adapter_trains_its_maps_in_full(pilot):
    copilot = copilot_for(pilot, CopilotConfig(**LENT))
    learner = CopilotLearner(copilot, pilot, 1, learning_rate=1e-2, peft_config=LoraConfig(r=2))
    with learner.observe({"input_ids": IDS, "labels": IDS}), torch.no_grad():
        pilot(input_ids=IDS)
    trained = {name for name, parameter in copilot.named_parameters() if parameter.requires_grad}
    for module in ("input_proj", "output_proj"):
        assert f"{module}.modules_to_save.default.weight" in trained and not any(
            f"{module}.lora" in n for n in trained
        )
    learner.step()
    plain = learner.exported()
    assert plain.output_proj.weight.any()
    assert plain.state_dict().keys() == copilot_for(pilot, CopilotConfig(**LENT)).state_dict().keys()


def test_an_adapter_on_the_embedding_is_refused(pilot):
    """The embedding's rows are read, not its forward: an adapter on it would not learn."""
    with pytest.raises(ValueError, match="modules_to_save"):
        CopilotLearner(copilot_for(pilot), pilot, peft_config=LoraConfig(r=2, target_modules=["embed_tokens"]))


def test_its_card_says_what_it_needs(pilot):
    cards = [str(copilot_card(copilot_for(pilot, CopilotConfig(**changes)).config)) for changes in ({}, LENT)]
    assert ["embedding and head" in card for card in cards] == [False, True]


def test_half_precision_of_the_pilot(pilot):
    """The lent matrices are in the Pilot's type, the Copilot in float32; training and generation agree on f."""
    pilot = pilot.to(torch.bfloat16)
    learner = learner_of(trained_like(pilot, CopilotConfig(**LENT)), pilot)
    (batch,) = learner.forced.batches(learner.round)
    ((_, _, trained),) = learner.forced.corrections(batch)
    with torch.no_grad():
        generated = (
            learner.copilot(**batch.inputs, return_logits=True, lent=learner.forced.lent).logits[batch.queries].float()
        )
    assert torch.equal(trained, generated)
    before = learner.copilot.output_proj.weight.clone()
    learner.step()
    assert learner.metrics.loss_count == learner.steps_per_round and not torch.equal(
        learner.copilot.output_proj.weight, before
    )


def correction(copilot, pilot, processor=None):
    """f after `IDS`."""
    with processor or CopilotLogitsProcessor(copilot, pilot) as processor, torch.no_grad():
        pilot(input_ids=IDS)
        return processor.rectifier.correction(IDS)


def test_what_is_lent_is_of_now(pilot):
    """A processor reads the Pilot's matrices when a text begins, wherever they have been put since it was made."""
    copilot = trained_like(pilot, CopilotConfig(**LENT))
    processor = CopilotLogitsProcessor(copilot, pilot)
    pilot.load_state_dict(tiny_pilot(seed=3).state_dict(), assign=True)
    assert torch.equal(correction(copilot, pilot, processor), correction(copilot, pilot))
    assert processor.rectifier.lent is None  # detached: nothing of the Pilot is held


@pytest.mark.parametrize("rows", [VOCAB_SIZE - 3, VOCAB_SIZE + 8])
def test_padding_rows_of_another_pilot(pilot, rows):
    """f has the rows that both have; the processor's f is 0 in the others."""
    copilot = trained_like(pilot, CopilotConfig(**LENT))
    other = tiny_pilot(vocab_size=rows).eval()
    state = pilot.state_dict()
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            tensor[: len(state[name])] = state[name][: len(tensor)]
    copilot.config.tokenizer_fingerprint = tokenizer_fingerprint(tiny_tokenizer(), 20)
    with CopilotLogitsProcessor(copilot, other, tokenizer=tiny_tokenizer()) as processor, torch.no_grad():
        other(input_ids=IDS)
        found = processor.rectifier.correction(IDS)
    both = min(rows, VOCAB_SIZE)
    assert found.shape[1] == both
    torch.testing.assert_close(found, correction(copilot, pilot)[:, :both], rtol=1e-4, atol=1e-4)


def test_the_lent_head_counts_in_the_cost_of_a_token(pilot):
    copilot = copilot_for(pilot, CopilotConfig(**LENT))
    assert multiplied_parameters(copilot) == count_parameters(copilot)[0] + pilot.lm_head.weight.numel()


def test_matrices_that_cannot_be_lent_are_named(pilot, monkeypatch):
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    narrow = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, word_embed_proj_dim=16))
    with pytest.raises(ValueError, match="vocab_projection='own'"):
        copilot_for(narrow, CopilotConfig(init="random", **LENT))
    copilot = trained_like(pilot, CopilotConfig(**LENT))
    with pytest.raises(ValueError, match="pass `lent="):
        copilot.vocabulary(None)
    monkeypatch.setattr("hf_copilot.pilot.vocabulary.is_sharded", lambda model: True)
    with pytest.raises(NotImplementedError, match="sharded"):
        CopilotLearner(copilot, pilot, 1)
    monkeypatch.undo()
    adapted = get_peft_model(tiny_pilot(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="has an adapter"):
        CopilotLogitsProcessor(copilot, adapted)
    with pytest.raises(NotImplementedError, match="offloaded"):
        copilot_for(cpu_offload(tiny_pilot()), CopilotConfig(init="random", **LENT))
    pilot.lm_head.weight = torch.nn.Parameter(pilot.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        CopilotLogitsProcessor(copilot, pilot)

"""Encoder-decoder Pilots: the same contracts as for decoder-only ones."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_generation import DECODINGS, NEW_TOKENS, Recorder, generate
from test_trainer import count_hooks
from tiny import (
    QUIET,
    SEQ2SEQ,
    assert_same,
    check_every_row,
    sums,
    tiny_pilot,
    tiny_seq2seq,
    tiny_tokenizer,
    trained_like,
)
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from benchmarks.common import CHECKPOINTING
from hf_copilot import (
    CopilotCallback,
    CopilotConfig,
    CopilotLearner,
    CopilotLogitsProcessor,
    CopilotModel,
    CopilotSeq2SeqConfig,
    CopilotSeq2SeqTrainer,
    check_pilot,
    copilot_for,
)
from hf_copilot.pilot.head import PilotHead
from hf_copilot.training.refusals import check_trainer

IDS = torch.tensor([[5, 15, 6, 17, 2, 0], [8, 15, 9, 9, 17, 2], [7, 15, 11, 17, 2, 0]])
MASK = (IDS != 0).long()
SEQ2SEQ_DECODINGS = {name: kwargs for name, kwargs in DECODINGS.items() if name != "chunked_prefill"}
PAPER = CopilotConfig.paper(num_hidden_layers=2, error_feedback="realized")
CONFIGS = {
    "paper": PAPER,
    "pattern2_lag0": CopilotConfig(pattern=2, num_hidden_layers=1, hidden_state_lag=0),
    "one_layer": CopilotConfig(num_hidden_layers=1, pilot_is_encoder_decoder=True, pooled_layers="first_half"),
    "pilot_vocabulary": CopilotConfig(vocab_projection="pilot"),
    "narrow_random": CopilotConfig(init="random", hidden_size=16, num_attention_heads=2, num_hidden_layers=3, top_k=5),
}


def config_of(family: str) -> CopilotConfig:
    return CopilotConfig(init="random") if family == "bart" else CopilotConfig()


@pytest.fixture(params=SEQ2SEQ)
def family(request):
    return request.param


def check_against_training_path(copilot, pilot, calls, prompts=IDS):
    found = [
        (i * len(prompts) // len(ids), row, row_f)
        for ids, f in calls
        for i, (row, row_f) in enumerate(zip(ids, f, strict=True))
    ]

    def labelled(i: int, row: list[int]) -> dict[str, list[int]]:
        return {"input_ids": [token for token in prompts[i].tolist() if token], "labels": [*row[1:], row[-1]]}

    check_every_row(copilot, pilot, found, labelled, 2e-4)


@pytest.mark.parametrize("decoding", SEQ2SEQ_DECODINGS)
def test_incremental_equals_teacher_forced(family, decoding):
    """Three padded prompts: beams have equal prefixes and different encoder outputs."""
    pilot = tiny_seq2seq(family).eval()
    copilot = trained_like(pilot, config_of(family))
    torch.manual_seed(0)
    with Recorder(copilot, pilot) as processor:
        generate(pilot, processor, IDS, MASK, **SEQ2SEQ_DECODINGS[decoding])
    assert len(processor.calls) == NEW_TOKENS
    check_against_training_path(copilot, pilot, processor.calls)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_incremental_equals_teacher_forced(name):
    pilot = tiny_seq2seq("flan_t5").eval()
    copilot = trained_like(pilot, CONFIGS[name])
    with Recorder(copilot, pilot, strength=0.3) as processor:
        generate(pilot, processor, IDS, MASK, num_beams=3)
    check_against_training_path(copilot, pilot, processor.calls)


def test_equal_prefixes_with_other_encoder_inputs_are_not_confused():
    """A prompt twice and another: whatever the beams do, rows keep to the encoder output of their prompt."""
    pilot = tiny_seq2seq().eval()
    copilot, prompts = trained_like(pilot), IDS[[0, 0, 1]]
    with Recorder(copilot, pilot) as processor:
        text = generate(pilot, processor, prompts, (prompts != 0).long(), num_beams=4)
    assert torch.equal(text[0], text[1]) and not torch.equal(text[0], text[2])
    check_against_training_path(copilot, pilot, processor.calls, prompts)


def test_several_calls_in_a_row_and_a_given_start(family):
    """Each call begins anew; one that goes on with the last text and another prompt too."""
    pilot = tiny_seq2seq(family).eval()
    copilot = trained_like(pilot, config_of(family))
    with Recorder(copilot, pilot) as processor:
        first = generate(pilot, processor, IDS, MASK)
        assert torch.equal(generate(pilot, processor, IDS, MASK), first)
        pilot(input_ids=IDS, decoder_input_ids=first)  # not followed by a call
        processor.calls.clear()
        other = IDS[[1, 0, 2]]
        generate(pilot, processor, other, (other != 0).long(), decoder_input_ids=first)
    alone = CopilotLogitsProcessor(copilot, pilot)
    assert len(processor.calls) == NEW_TOKENS
    expected = generate(pilot, alone, other, (other != 0).long(), decoder_input_ids=first)
    assert torch.equal(processor.calls[-1][0], expected[:, :-1])


@pytest.mark.parametrize("decoding", ["greedy", "sampling", "beams"])
def test_zero_strength_and_a_fresh_copilot_are_the_bare_pilot(family, decoding):
    pilot = tiny_seq2seq(family).eval()
    none = CopilotLogitsProcessor(trained_like(pilot, config_of(family)), pilot, strength=0.0)
    fresh = CopilotLogitsProcessor(copilot_for(pilot, config_of(family)), pilot)
    outputs = []
    for processor in (None, none, fresh):
        torch.manual_seed(1)
        settings = {"output_scores": True, "return_dict_in_generate": True}
        outputs.append(generate(pilot, processor, IDS, MASK, **DECODINGS[decoding], **settings))
    for other in outputs[1:]:
        assert torch.equal(outputs[0].sequences, other.sequences)
        assert all(torch.equal(*pair) for pair in zip(outputs[0].scores, other.scores, strict=True))


@pytest.mark.parametrize("decoding", ["greedy", "beams"])
def test_batch_equals_single(family, decoding):
    pilot = tiny_seq2seq(family).eval()
    with CopilotLogitsProcessor(trained_like(pilot, config_of(family)), pilot) as processor:
        together = generate(pilot, processor, IDS, MASK, **DECODINGS[decoding])
        assert not torch.equal(together, generate(pilot, None, IDS, MASK, **DECODINGS[decoding]))
        for row, mask, expected in zip(IDS, MASK, together, strict=True):
            alone = generate(pilot, processor, row[None, mask.bool()], **DECODINGS[decoding])
            assert torch.equal(alone[0], expected)


def test_the_head_gives_the_models_own_logits(family):
    pilot = tiny_seq2seq(family).eval()
    if family == "bart":
        pilot.final_logits_bias.normal_()
    caught = []
    handle = pilot.get_decoder().register_forward_hook(lambda module, args, output: caught.append(output[0]))
    logits = pilot(input_ids=IDS, decoder_input_ids=IDS).logits
    handle.remove()
    head = PilotHead(pilot)
    head.check()
    assert torch.allclose(head(caught[0]), logits, atol=1e-5)
    assert (head.scale == 32**-0.5) is (family == "t5")


@pytest.mark.parametrize("kind", ["t5", "flan_t5"])
def test_a_layer_taken_over_computes_what_the_pilots_layer_computes(kind):
    """On an encoder output that its norm leaves as it is, and without relative positions."""
    pilot = tiny_seq2seq(kind).eval()
    block = pilot.decoder.block[0]
    with torch.no_grad():
        block.layer[0].SelfAttention.relative_attention_bias.weight.zero_()
        pilot.encoder.final_layer_norm.weight.fill_(0.5)
    copilot = copilot_for(pilot).eval()
    hidden, encoded = torch.randn(2, 5, 32), torch.randn(2, 4, 32)
    encoded = 0.5 * encoded / encoded.square().mean(-1, keepdim=True).sqrt()
    causal = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    additive = torch.zeros(2, 1, 5, 5).masked_fill(~causal[:, None], -1e9)
    with torch.no_grad():
        expected = block(hidden, additive, encoder_hidden_states=encoded)[0]
        found = copilot.layers[0](hidden, encoded, torch.ones(2, 5, 4, dtype=torch.bool), causal, None, None)
    assert torch.allclose(found, expected, atol=1e-4)


def test_bart_names_the_way_out():
    with pytest.raises(ValueError, match="init='random'"):
        copilot_for(tiny_seq2seq("bart"), CopilotConfig(init="pilot"))
    assert copilot_for(tiny_seq2seq("bart")).config.init == "random"


def test_padding_of_the_encoder_is_not_read(family):
    pilot = tiny_seq2seq(family).eval()
    copilot, found = trained_like(pilot, config_of(family)), []
    for filler in (0, 9):
        inputs = {"input_ids": IDS.masked_fill(MASK == 0, filler), "attention_mask": MASK, "labels": IDS}
        learner = CopilotLearner(copilot, pilot, log_dtype=torch.float32)
        with torch.no_grad(), learner.observe(inputs):
            pilot(**inputs)
        learner.close()
        (batch,) = learner.forced.batches(learner.round)
        with torch.no_grad():
            found.append(copilot(**batch.inputs).last_hidden_state[batch.queries])
        assert [len(record.embeddings) for record in learner.round] == MASK.sum(1).tolist()
    assert torch.allclose(*found, atol=1e-5)


def test_labels_are_not_shifted_again():
    """A target is where a label is: teacher-forced, the Pilot's NLL of the records is its own loss."""
    pilot = tiny_seq2seq().eval()
    labels = IDS.masked_fill(MASK == 0, -100)
    learner = CopilotLearner(copilot_for(pilot), pilot)
    with torch.no_grad(), learner.evaluate({"input_ids": IDS, "attention_mask": MASK, "labels": labels}):
        loss = pilot(input_ids=IDS, attention_mask=MASK, labels=labels).loss
    assert learner.pop_metrics("eval")["pilot_nll"] == pytest.approx(loss.item(), rel=1e-4)


def test_check_pilot_tells_the_kinds_apart():
    with pytest.raises(ValueError, match="decoder-only"):
        check_pilot(trained_like(tiny_pilot()), tiny_seq2seq())


# ---- trainers ------------------------------------------------------------------------------------------------------


def make(trainer_class, config_class, folder, pilot=None, data=None, **changes):
    pilot = pilot if pilot is not None else tiny_seq2seq()
    if changes.pop("lora", False):
        torch.manual_seed(0)
        pilot = get_peft_model(pilot, LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, lora_dropout=0.1))
    args = {"max_steps": 6, "logging_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    extra = {"copilot": changes.pop("copilot", None)} if issubclass(trainer_class, CopilotSeq2SeqTrainer) else {}
    callbacks = changes.pop("callbacks", None)
    return trainer_class(
        model=pilot,
        args=config_class(output_dir=str(folder), **(QUIET | args | changes)),
        train_dataset=sums(64) if data is None else data,
        eval_dataset=sums(8, seed=3),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer(), pilot),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        **extra,
    )


VARIANTS = {
    "plain": {},
    "lora": {"lora": True},
    "accumulated": {"gradient_accumulation_steps": 4},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "checkpointed": {CHECKPOINTING: True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pilot_is_the_parents_bit_for_bit(tmp_path, variant):
    ours = make(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path / "a", **VARIANTS[variant])
    ours.train()
    theirs = make(Seq2SeqTrainer, Seq2SeqTrainingArguments, tmp_path / "b", **VARIANTS[variant])
    theirs.train()
    assert_same(ours.model, theirs.model)
    logs = [entry for entry in ours.state.log_history if "loss" in entry]
    assert len(logs) == 3 and all(entry["copilot_loss"] > 0 and entry["rectified_nll"] > 0 for entry in logs)
    assert count_hooks(ours.model) == 0


@pytest.mark.parametrize("config", [None, PAPER], ids=["ours", "paper"])
def test_every_copilot_parameter_moves(tmp_path, config):
    trainer = make(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path, copilot=copy.deepcopy(config))
    before = copy.deepcopy(trainer.copilot.state_dict())
    trainer.train()
    still = [name for name, tensor in trainer.copilot.state_dict().items() if torch.equal(tensor, before[name])]
    assert not still


def test_the_copilot_learns_what_the_pilot_gets_wrong(tmp_path):
    settings = {"learning_rate": 1e-4, "copilot_learning_rate": 3e-3, "max_steps": 60}
    trainer = make(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path, data=sums(240), **settings)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_rectified_nll"] < 0.9 * metrics["eval_pilot_nll"]


def test_resumed_equals_uninterrupted(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    straight = make(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path / "a", **saving)
    straight.train()
    resumed = make(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path / "b", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert_same(straight.model, resumed.model)
    assert_same(straight.copilot, resumed.copilot)
    assert_same(CopilotModel.from_pretrained(tmp_path / "a" / "checkpoint-6" / "copilot"), straight.copilot)


@pytest.mark.parametrize("rectified", [False, True])
def test_prediction_generates_and_records_nothing(tmp_path, rectified):
    settings = {"predict_with_generate": True, "copilot_predict": rectified, "generation_max_length": 6}
    trainer = make(
        CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path, copilot=trained_like(tiny_seq2seq()), **settings
    )
    trainer.model.eval()
    predicted = trainer.predict(trainer.eval_dataset)
    ids = torch.tensor(sums(8, seed=3)[0]["input_ids"])[None]
    processor = CopilotLogitsProcessor(trainer.copilot, trainer.model) if rectified else None
    expected = trainer.model.generate(ids, max_length=6, logits_processor=[processor] if processor else [])[0]
    assert predicted.predictions[0, : len(expected)].tolist() == expected.tolist()
    assert predicted.metrics["test_rectified_nll"] != predicted.metrics["test_pilot_nll"] > 0
    assert trainer.evaluate()["eval_pilot_nll"] == pytest.approx(predicted.metrics["test_pilot_nll"])
    assert len(trainer.learner.log) == 0 and not trainer.learner.round
    if processor:
        processor.detach()
    assert count_hooks(trainer.model) == 0


def test_data_parallel_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(NotImplementedError, match="DataParallel"):
        make(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path)


def test_fsdp_raises(tmp_path, monkeypatch):
    trainer = make(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(NotImplementedError, match="encoder-decoders"):
        check_trainer(trainer, None)


def test_predicting_without_generation_raises(tmp_path):
    with pytest.raises(ValueError, match="predict_with_generate=True"):
        make(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path, copilot_predict=True)
    with pytest.raises(ValueError, match="sees no evaluation"):
        CopilotCallback(copilot_args=CopilotSeq2SeqConfig(str(tmp_path), copilot_predict=True, **QUIET))


def test_groups_hold_as_much_as_the_pilots_batches():
    """Short answers to long questions: the encoder counts."""
    pilot = tiny_seq2seq().eval()
    learner = CopilotLearner(copilot_for(pilot), pilot)
    inputs = {"input_ids": torch.full((2, 40), 5), "labels": torch.full((2, 4), 6)}
    for _ in range(4):
        with torch.no_grad(), learner.observe(inputs):
            pilot(**inputs)
    assert learner.max_positions == 2 * 44
    assert [
        len(batch.inputs["is_start"]) for batch in learner.forced.batches(learner.round, learner.max_positions)
    ] == [2] * 4


def test_gradients_that_grow_with_accumulation_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="transformers"):
        make(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path, gradient_accumulation_steps=2)
    assert "trainer.model_accepts_loss_kwargs = False" in caplog.text


def test_the_callback_on_a_plain_trainer(tmp_path):
    callback = CopilotCallback()
    trainer = make(
        Trainer, TrainingArguments, tmp_path / "a", callbacks=[callback], save_strategy="steps", save_steps=3
    )
    trainer.train()
    plain = make(Trainer, TrainingArguments, tmp_path / "b")
    plain.train()
    assert_same(trainer.model, plain.model)
    assert all(entry["copilot_loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert_same(CopilotModel.from_pretrained(tmp_path / "a" / "copilot"), callback.copilot)


def test_save_and_load_give_the_same_text(family, tmp_path):
    pilot = tiny_seq2seq(family).eval()
    copilot = trained_like(pilot, config_of(family))
    copilot.save_pretrained(tmp_path)
    texts = []
    for each in (copilot, CopilotModel.from_pretrained(tmp_path)):
        with CopilotLogitsProcessor(each, pilot) as processor:
            texts.append(generate(pilot, processor, IDS, MASK, num_beams=2))
    assert torch.equal(*texts)

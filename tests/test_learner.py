"""The learner in a plain loop: documents, runs, the log, and what happens to bad batches."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from peft import (
    BeftConfig,
    DeloraConfig,
    LilyConfig,
    LNTuningConfig,
    LoraConfig,
    OSFConfig,
    PolyConfig,
    PromptTuningConfig,
    RandLoraConfig,
    ShiraConfig,
    VBLoRAConfig,
    WaveFTConfig,
)
from tiny import MEMORIES, OBJECTIVES, VOCAB_SIZE, assert_same, tiny_pilot, tiny_seq2seq, trained_like

from hf_copilot import CopilotArguments, CopilotConfig, CopilotLearner, MistakeLog, copilot_for
from hf_copilot.training.batch import MIN_LENGTH_RATIO, full_positions, group_by_length
from hf_copilot.training.checkpoint import load_state
from hf_copilot.training.metrics import measure
from hf_copilot.training.mistake_log import MistakeRecord
from hf_copilot.training.records import find_documents, random_start

FLOAT = {"log_dtype": torch.float32}

FULL = full_positions(torch.device("cpu"))


def padded_batch():
    """A prompt with one run, a document of two runs, a whole document, and one without labels."""
    ids = torch.randint(5, VOCAB_SIZE, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7 + [0] * 2, [1] * 9, [0] * 3 + [1] * 6, [1] * 9])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    labels[1, [0, 1, 4, 5]] = -100
    labels[3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def observe(learner, pilot, inputs):
    with learner.observe(inputs):
        pilot(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
    return learner.round


def test_defaults_are_those_of_the_trainers_arguments():
    of_learner, of_log = (inspect.signature(made).parameters for made in (CopilotLearner, MistakeLog))
    same = {name: of_learner[name] for name in ("learning_rate", "weight_decay", "max_grad_norm", "steps_per_round")}
    same |= {"log_rounds": of_log["max_rounds"], "log_max_bytes": of_log["max_bytes"]}
    for name, parameter in same.items():
        assert parameter.default == getattr(CopilotArguments(), f"copilot_{name}"), name
    assert of_learner["log_dtype"].default == getattr(torch, CopilotArguments().copilot_log_dtype)


def test_documents_targets_and_runs(pilot):
    learner = CopilotLearner(copilot_for(pilot), pilot)
    records = observe(learner, pilot, padded_batch())
    assert [record.positions.tolist() for record in records] == [[3, 4, 5], [1, 2, 5, 6, 7], [0, 1, 2, 3, 4]]
    assert [len(record.input_ids) for record in records] == [6, 8, 5]
    assert records[1].is_start.tolist() == [True, False, True, False, False]
    inputs = padded_batch()
    assert records[0].labels.tolist() == inputs["input_ids"][0, 4:7].tolist()
    assert records[2].input_ids.tolist() == inputs["input_ids"][2, 3:8].tolist()


def test_padding_free_documents():
    packed = {"input_ids": torch.zeros(1, 8), "labels": torch.zeros(1, 8)}
    packed["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    assert [tuple(d) for d in find_documents(packed)] == [(0, 0, 3), (0, 3, 5), (0, 5, 8)]
    bare = {"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 3)}
    assert [tuple(d) for d in find_documents(bare)] == [(0, 0, 3), (1, 0, 3)]
    bare["position_ids"] = torch.tensor([[0, 1, 0]])  # of all rows
    assert [tuple(d) for d in find_documents(bare)] == [(0, 0, 2), (0, 2, 3), (1, 0, 2), (1, 2, 3)]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 4)}, "`input_ids`"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}, r"holes in rows \[1\]"),
        ({"position_ids": torch.tensor([[0, 1, 2], [1, 2, 3]])}, "row 1 begin at 1"),
        ({"position_ids": torch.tensor([[3, 0, 1], [0, 1, 2]])}, "row 0 begin at 3"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 3])}, "position_ids too"),
    ],
)
def test_a_batch_whose_documents_are_unclear_raises(more, match):
    with pytest.raises(ValueError, match=match):
        find_documents({"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 3)} | more)


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_copilot_of_another_pilot_raises(pilot, memory):
    copilot = copilot_for(pilot, CopilotConfig(memory=memory))
    with pytest.raises(ValueError, match="encoder-decoder"):
        CopilotLearner(copilot, tiny_seq2seq())
    with pytest.raises(ValueError, match="decoder-only"):
        CopilotLearner(copilot_for(tiny_seq2seq()), pilot)
    if memory == "pilot":
        with pytest.raises(ValueError, match="hidden states of size 32"):
            CopilotLearner(copilot, tiny_pilot(hidden_size=64, head_dim=8))


def test_adapters_of_a_copilot(pilot):
    with pytest.raises(ValueError, match="virtual tokens"):
        CopilotLearner(copilot_for(pilot), pilot, peft_config=PromptTuningConfig(num_virtual_tokens=2))
    for init, trains_all in (("pilot", False), ("random", True)):
        learner = CopilotLearner(copilot_for(pilot, CopilotConfig(init=init)), pilot, peft_config=LoraConfig(r=2))
        before = learner.exported().embed_tokens.weight.clone()
        learner.start(1)
        learner.update(observe(learner, pilot, padded_batch()))
        learner.update(learner.round)  # at first the last map is zero, and nothing before it learns
        assert torch.equal(learner.exported().embed_tokens.weight, before) is not trains_all
    with pytest.raises(ValueError, match="modules_to_save"):
        targets = LoraConfig(target_modules=["q_proj", "embed_tokens"])
        CopilotLearner(copilot_for(pilot, CopilotConfig(init="random")), pilot, peft_config=targets)
    without = LoraConfig(target_modules=r"^(?!.*embed_tokens).*q_proj$")  # names it, and leaves it out
    assert CopilotLearner(copilot_for(pilot), pilot, peft_config=without).peft_model is not None


def test_frozen_weights_are_held_in_the_type_of_autocast(pilot):
    """What autocast makes of them at every use anyway: what is learnt, and saved, is the same."""

    def trained(hold):
        copilot = trained_like(pilot, CopilotConfig(dropout=0.0, init="random", attention_bias=True))
        adapter = LoraConfig(r=2, bias="lora_only")
        learner = CopilotLearner(copilot, pilot, 2, autocast_dtype=torch.bfloat16, peft_config=adapter)
        frozen = [p for name, p in copilot.named_parameters() if "base_layer.weight" in name]
        assert frozen and all(p.dtype == torch.bfloat16 for p in frozen)
        assert all(p.dtype == torch.float32 for p in copilot.parameters() if p.requires_grad)
        if not hold:
            for p in frozen:
                p.data = p.data.float()
        learner.update(observe(learner, pilot, padded_batch()))
        learner.update(learner.round)
        return learner.exported().state_dict()

    held, cast = trained(True), trained(False)
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    for name, tensor in held.items():
        torch.testing.assert_close(tensor, cast[name], rtol=0, atol=1e-6)


OTHERS = {VBLoRAConfig: {"vector_length": 8, "num_vectors": 8}, WaveFTConfig: {"n_frequency": 16}}
OTHERS |= {ShiraConfig: {"r": 2}} | dict.fromkeys((RandLoraConfig, OSFConfig, DeloraConfig), {})


@pytest.mark.parametrize(("make_config", "settings"), OTHERS.items(), ids=lambda given: getattr(given, "__name__", ""))
def test_an_adapter_that_needs_values_to_be_merged_is_taken(pilot, make_config, settings):
    config = make_config(target_modules=["q_proj", "v_proj"], **settings)
    learner = CopilotLearner(copilot_for(pilot), pilot, peft_config=config)
    assert learner.exported().state_dict().keys() == copilot_for(pilot).state_dict().keys()


@pytest.mark.parametrize("make_config", [PolyConfig, LilyConfig, BeftConfig, LNTuningConfig])
def test_an_adapter_that_cant_be_merged_raises_before_training(pilot, make_config):
    config = make_config(target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="can't be merged into the Copilot's weights"):
        CopilotLearner(copilot_for(pilot), pilot, peft_config=config)


def forward(learner, records):
    batch = learner.forced.collate(records)
    with torch.no_grad():
        return learner.copilot(**batch.inputs, return_logits=True, lent=learner.forced.lent).logits[batch.queries]


@pytest.mark.parametrize("config", [CopilotConfig(), CopilotConfig(memory="pilot", pattern=2, hidden_state_lag=0)])
def test_a_batch_of_documents_equals_each_alone(pilot, config):
    learner = CopilotLearner(trained_like(pilot, config), pilot, **FLOAT)
    records = observe(learner, pilot, padded_batch())
    alone = torch.cat([forward(learner, [record]) for record in records])
    assert torch.allclose(forward(learner, records), alone, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_log_holds_embeddings_only_where_ids_do_not_give_them(family, frozen):
    """Same f either way. Gemma scales its embeddings and GPT-2 adds positions, so there X̃ is always held."""
    pilot = tiny_pilot(family).eval()
    learner = CopilotLearner(trained_like(pilot, CopilotConfig(init="random", memory="pilot")), pilot, **FLOAT)
    expected = forward(learner, observe(learner, pilot, padded_batch()))
    learner.pending = []
    pilot.get_input_embeddings().requires_grad_(not frozen)
    records = observe(learner, pilot, padded_batch())
    assert all(len(r.embeddings) == (0 if frozen and family == "llama" else len(r.input_ids)) for r in records)
    assert torch.equal(forward(learner, records), expected)


def test_what_a_query_may_read(pilot):
    """Changing X̃ after j, h after j − 1, or another run changes nothing at j; changing what is before does."""
    learner = CopilotLearner(trained_like(pilot, CopilotConfig(memory="pilot")), pilot, **FLOAT)
    record = observe(learner, pilot, padded_batch())[1]  # runs at 1, 2 and 5, 6, 7
    base = forward(learner, [record])

    def changed(**shifts):
        tensors = {name: getattr(record, name).clone() for name in shifts}
        for name, rows in shifts.items():
            tensors[name][rows] += 1.0
        fields = {name: getattr(record, name) for name in MistakeRecord.__dataclass_fields__} | tensors
        return (forward(learner, [MistakeRecord(**fields)]) - base).abs().amax(-1) > 1e-6

    assert changed(embeddings=slice(6, 8)).tolist() == [False, False, False, True, True]
    assert changed(hidden_states=slice(5, 8)).tolist() == [False, False, False, True, True]
    assert changed(hidden_states=slice(6, 8)).tolist() == [False, False, False, False, True]
    assert changed(values=slice(0, 1)).tolist() == [False, True, False, False, False]
    assert changed(values=slice(2, 3)).tolist() == [False, False, False, True, True]
    assert changed(embeddings=slice(0, 1)).all()


def test_whole_documents_start_anywhere_and_prompts_do_not(pilot):
    learner = CopilotLearner(copilot_for(pilot), pilot)
    records = observe(learner, pilot, padded_batch())
    starts = {int(random_start(records[2], learner.generator, False).positions[0]) for _ in range(60)}
    assert starts == {0, 1, 2, 3, 4}
    assert random_start(records[0], learner.generator, False) is records[0]


def test_groups_stay_within_the_bound(pilot):
    learner = CopilotLearner(copilot_for(pilot), pilot)
    records = observe(learner, pilot, padded_batch())
    groups = group_by_length(records, 14, FULL)
    assert [[len(r.input_ids) for r in group] for group in groups] == [[8], [6, 5]]
    assert [[len(r.input_ids) for r in group] for group in group_by_length(records, 1, FULL)] == [[8], [6], [5]]


def test_groups_hold_little_padding(pilot):
    """Beyond `full_positions` a group takes records of like length alone; within, any."""
    learner = CopilotLearner(copilot_for(pilot), pilot)
    (record, *_) = observe(learner, pilot, padded_batch())
    lengths = list(range(300, 20, -7))
    records = [dataclasses.replace(record, input_ids=torch.zeros(length, dtype=torch.long)) for length in lengths]
    groups = [[len(r.input_ids) for r in group] for group in group_by_length(records, 10**6, FULL)]
    assert sum(groups, []) == lengths and 2 < len(groups) < len(lengths) / 4
    for group in groups:
        beyond = group[1 + FULL // group[0] :]
        assert all(length >= MIN_LENGTH_RATIO * group[0] for length in beyond)
    assert len(group_by_length(records[-10:], 10**6, FULL)) == 1


@pytest.mark.parametrize("config", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_groups_of_a_step_do_not_matter(pilot, config):
    """The loss is a mean over positions or sequences of the whole draw, however it is split."""
    weights = []
    for largest in (1, 1000):
        learner = CopilotLearner(trained_like(pilot, config), pilot, num_training_steps=3, **FLOAT)
        records = observe(learner, pilot, padded_batch())
        learner.optimizer.limit = largest
        learner.update(records)
        weights.append(torch.cat([p.detach().flatten() for p in learner.copilot.parameters()]))
    assert torch.allclose(*weights, atol=1e-5)


def test_several_steps_in_a_round_are_drawn_anew(pilot):
    learner = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=4, steps_per_round=3, **FLOAT)
    observe(learner, pilot, padded_batch())
    learner.step()  # the log holds what the round has: every draw is the same three documents
    observe(learner, pilot, padded_batch())
    draws, update = [], learner.update
    learner.update = lambda records: draws.append({id(record) for record in records}) or update(records)
    learner.step()
    assert learner.steps == 2 and learner.optimizer.scheduler.last_epoch == 2
    assert {int(state["step"]) for state in learner.optimizer.adamw.state.values()} == {6}
    assert len(draws) == 3 and any(draw != draws[0] for draw in draws)
    with pytest.raises(ValueError, match="at least one step"):
        CopilotLearner(copilot_for(pilot), pilot, steps_per_round=0)


def test_no_labelled_token_is_no_step(pilot):
    learner = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=2)
    inputs = padded_batch()
    inputs["labels"][:] = -100
    assert observe(learner, pilot, inputs) == []
    before = [p.clone() for p in learner.copilot.parameters()]
    learner.step(measure=True)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.copilot.parameters(), strict=True))
    assert learner.steps == 1 and learner.pop_metrics() == {}


def test_a_non_finite_document_is_not_logged(pilot):
    learner = CopilotLearner(copilot_for(pilot), pilot)
    with torch.no_grad():
        pilot.get_input_embeddings().weight[5] = torch.nan
    inputs = padded_batch()
    inputs["input_ids"][inputs["input_ids"] == 5] = 6
    inputs["input_ids"][0, 0] = 5
    assert len(observe(learner, pilot, inputs)) == 2


def test_a_non_finite_step_is_left_out(pilot):
    copilot = copilot_for(pilot, CopilotConfig(copilot_input="both"))
    learner = CopilotLearner(copilot, pilot, num_training_steps=2, steps_per_round=1)
    records = observe(learner, pilot, padded_batch())
    records[0].values[:] = torch.inf
    before = [p.clone() for p in learner.copilot.parameters()]
    learner.step()
    assert learner.skipped_steps == 1 and learner.pop_metrics()["copilot_skipped_steps"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, learner.copilot.parameters(), strict=True))


def test_a_run_begins_without_the_gradients_of_an_interrupted_one(pilot):
    learner = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=2)
    for parameter in learner.copilot.parameters():
        parameter.grad = torch.ones_like(parameter)
    learner.start(2)
    assert all(parameter.grad is None for parameter in learner.copilot.parameters())


def test_a_norm_of_zero_does_not_clip(pilot):
    def trained(max_grad_norm):
        learner = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=2, max_grad_norm=max_grad_norm)
        observe(learner, pilot, padded_batch())
        learner.step()
        return learner.copilot

    assert_same(trained(0.0), trained(1e9))
    assert trained(0.0).lm_head.weight.abs().sum() > 0
    with pytest.raises(ValueError, match="at least 0"):
        trained(-1.0)
    for wrong in ({"steps_per_round": 2.5}, {"learning_rate": float("inf")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*at least"):
            CopilotLearner(copilot_for(pilot), pilot, **wrong)


def test_missing_labels_another_pilot_and_another_vocabulary_raise(pilot):
    learner = CopilotLearner(copilot_for(pilot), pilot)
    inputs = padded_batch()
    with pytest.raises(ValueError, match="labels"), learner.observe({"input_ids": inputs["input_ids"]}):
        pass
    with pytest.raises(ValueError, match="did not run"), learner.observe(inputs):
        tiny_pilot(seed=1)(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="output rows"):
        CopilotLearner(copilot_for(pilot), tiny_pilot(vocab_size=VOCAB_SIZE + 1))


def test_an_evaluation_leaves_the_bound_of_training_alone(pilot):
    learner = CopilotLearner(trained_like(pilot), pilot, num_training_steps=1)
    inputs = padded_batch()
    part = {name: tensor[:1] for name, tensor in inputs.items()}
    with learner.observe(part):
        pilot(**part)
    bound = learner.max_positions
    assert bound == part["input_ids"].numel()
    with learner.evaluate(inputs):
        pilot(**inputs)
    learner.forced.read(inputs, lambda: pilot(**inputs))
    assert learner.max_positions == bound


def test_a_step_before_the_start_raises(pilot):
    with pytest.raises(ValueError, match="call start"):
        CopilotLearner(trained_like(pilot), pilot).step()


def test_a_log_without_embeddings_holds_none_of_their_storage(pilot):
    pilot.bfloat16().requires_grad_(False)
    learner = CopilotLearner(copilot_for(pilot, CopilotConfig(memory="pilot")), pilot)
    for record in observe(learner, pilot, padded_batch()):
        assert len(record.hidden_states)
        assert record.embeddings.untyped_storage().nbytes() == 0


def test_a_4d_mask_raises(pilot):
    inputs = padded_batch()
    inputs["attention_mask"] = torch.ones(4, 1, 9, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="2D"):
        observe(CopilotLearner(copilot_for(pilot), pilot), pilot, inputs)


def test_a_schedule_with_settings(pilot):
    learner = CopilotLearner(
        copilot_for(pilot),
        pilot,
        num_training_steps=2,
        learning_rate=1.0,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 0.25},
    )
    for _ in range(2):
        observe(learner, pilot, padded_batch())
        learner.step()
    assert learner.optimizer.scheduler.get_last_lr() == pytest.approx([0.25, 0.25])


def test_a_pilot_that_changed_before_the_start_raises(pilot):
    learner = CopilotLearner(copilot_for(pilot), pilot)
    pilot.resize_token_embeddings(VOCAB_SIZE + 5)
    with pytest.raises(ValueError, match=f"{VOCAB_SIZE} output rows and the Pilot {VOCAB_SIZE + 5}"):
        learner.start(1)


def test_the_next_start_begins_clean_after_an_interruption(pilot):
    """Ctrl-C inside a forward, or inside the calibration."""
    fresh = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=2, **FLOAT)
    broken = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=2, **FLOAT)
    observe(broken, pilot, padded_batch())
    with pytest.raises(KeyboardInterrupt), broken.observe(padded_batch()):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), broken.calibrate():
        raise KeyboardInterrupt
    broken.start(2)
    for learner in (fresh, broken):
        observe(learner, pilot, padded_batch())
        learner.step(measure=True)
    assert_same(fresh.copilot, broken.copilot)
    assert fresh.pop_metrics() == broken.pop_metrics() and len(fresh.log) == len(broken.log)


def test_a_round_without_a_forward_raises(pilot):
    learner = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=2)
    with pytest.raises(ValueError, match="No forward of the Pilot was observed"):
        learner.step()
    observe(learner, pilot, padded_batch())
    learner.step()
    with pytest.raises(ValueError, match="No forward of the Pilot was observed"):
        learner.step()


def round_of(documents, positions=4):
    def record():
        ints = torch.arange(positions)
        return MistakeRecord(
            ints, torch.zeros(positions, 8), torch.zeros(positions, 8), ints[:2], ints[:2], torch.zeros(2, 8),
            torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3), torch.zeros(2),
        )  # fmt: skip

    return [record() for _ in range(documents)]


def test_the_log_keeps_the_last_rounds_within_its_bytes():
    log = MistakeLog(max_rounds=3)
    for documents in (1, 2, 3, 4):
        log.append(round_of(documents))
    assert [len(r) for r in log.rounds] == [2, 3, 4] and not log.capped
    size = round_of(1)[0].nbytes
    assert log.nbytes == 9 * size
    log = MistakeLog(max_rounds=3, max_bytes=5 * size)
    for documents in (2, 2, 2, 9):
        log.append(round_of(documents))
        assert log.nbytes <= 5 * size
    assert [len(r) for r in log.rounds] == [5] and log.capped
    for bound in (0, 2.5):
        with pytest.raises(ValueError, match="at least 1"):
            MistakeLog(max_rounds=bound)


@pytest.mark.parametrize("stored_embeddings, megabytes, rounds", [(0, 560, 128), (255, 1094, 125)])
def test_the_size_of_a_log(stored_embeddings, megabytes, rounds):
    ints, floats, labelled, width = torch.arange(255), torch.zeros(255, 2048, dtype=torch.bfloat16), 10, 65
    record = MistakeRecord(
        ints, floats[:stored_embeddings], floats, ints[:labelled], ints[:labelled], floats[:labelled],
        torch.zeros(labelled, width, dtype=torch.int32), torch.zeros(labelled, width), torch.zeros(labelled),
    )  # fmt: skip
    assert round(128 * 4 * record.nbytes / 1e6) == megabytes
    log = MistakeLog()
    for _ in range(128):
        log.append([record] * 4)
    assert len(log.rounds) == rounds


def test_the_cap_is_said_once_and_logged(pilot, caplog):
    learner = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=9, log=MistakeLog(max_bytes=1))
    for _ in range(3):
        observe(learner, pilot, padded_batch())
        learner.step()
    assert caplog.text.count("copilot_log_max_bytes") == 1
    assert learner.pop_metrics()["copilot_log_rounds"] == 1


def test_draws_are_uniform_without_replacement():
    log = MistakeLog()
    log.append(round_of(3))
    log.append(round_of(3))
    counts = torch.zeros(6)
    everything = [id(record) for round_ in log.rounds for record in round_]
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        drawn = [everything.index(id(record)) for record in log.sample(2, generator)]
        assert len(set(drawn)) == 2
        counts[drawn] += 1
    assert (counts / 200 - 1).abs().max() < 0.25
    assert len(log.sample(99, generator)) == 6


def test_the_log_survives_saving(pilot, tmp_path):
    learner = CopilotLearner(copilot_for(pilot), pilot)
    log, loaded = MistakeLog(), MistakeLog()
    for _ in range(2):
        log.append(observe(learner, pilot, padded_batch()))
        learner.pending = []
    log.save(tmp_path / "log.safetensors")
    loaded.load(tmp_path / "log.safetensors")
    assert loaded.nbytes == log.nbytes and [len(r) for r in loaded.rounds] == [3, 3]
    for mine, theirs in zip(log.rounds[1], loaded.rounds[1], strict=True):
        for name in MistakeRecord.__dataclass_fields__:
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    MistakeLog().save(tmp_path / "empty.safetensors")
    loaded.load(tmp_path / "empty.safetensors")
    assert len(loaded) == 0


def test_state_of_another_kind_raises(pilot, tmp_path):
    learner = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=1)
    with pytest.raises(ValueError, match="missing"):
        load_state(learner, tmp_path)


def test_teacher_forcing_a_generated_text_equals_generation_probability(pilot):
    """`score` sums what the fused distribution says of the labels."""
    learner = CopilotLearner(trained_like(pilot), pilot, **FLOAT)
    inputs = padded_batch()
    records = observe(learner, pilot, inputs)
    f = forward(learner, records)
    z = learner.head(torch.cat([record.final_states for record in records]))
    labels = torch.cat([record.labels for record in records])[:, None]
    pilot_nll, pilot_hits, rectified_nll, hits, _, count = (
        measure(learner.forced, records, learner.strengths).flatten().tolist()
    )
    assert count == len(labels)
    assert pilot_nll == pytest.approx(-z.log_softmax(-1).gather(1, labels).sum().item(), rel=1e-5)
    assert rectified_nll == pytest.approx(-(z + f).log_softmax(-1).gather(1, labels).sum().item(), rel=1e-5)
    assert hits == ((z + f).argmax(-1) == labels[:, 0]).sum()
    assert pilot_hits == (z.argmax(-1) == labels[:, 0]).sum()

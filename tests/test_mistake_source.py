"""`copilot_mistake_source`: whose errors the log holds, and what that leaves of the Pilot's training."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import QUIET, addition, assert_same, tiny_pilot, tiny_tokenizer
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer, TrlParser

from hf_copilot import CopilotArguments, CopilotCallback, CopilotSeq2SeqConfig, CopilotSFTConfig, CopilotTrainer
from hf_copilot.pilot.inspect import without_logits
from hf_copilot.training.mistake_source import Holdout, split_holdout


def make_trainer(tmp_path, source, data=None, trainer_class=CopilotTrainer, **changes):
    config_class = CopilotSFTConfig if trainer_class is CopilotTrainer else SFTConfig
    own = {"copilot_mistake_source": source} if trainer_class is CopilotTrainer else {}
    settings = QUIET | {"output_dir": str(tmp_path), "max_steps": 6, "per_device_train_batch_size": 4} | own | changes
    return trainer_class(
        model=tiny_pilot(attention_dropout=0.1),
        args=config_class(logging_steps=2, learning_rate=1e-2, **settings),
        train_dataset=data if data is not None else addition(16),
        processing_class=tiny_tokenizer(),
    )


def logged_rows(trainer):
    return {tuple(record.input_ids.tolist()) for round_ in trainer.learner.log.rounds for record in round_}


def test_the_first_visits_alone_are_logged(tmp_path):
    trainer = make_trainer(tmp_path, "first_visit")  # 6 steps of 4: 1.5 epochs of 16 rows
    trainer.train()
    assert len(trainer.learner.log.rounds) == 4
    assert len(logged_rows(trainer)) == 16
    assert trainer.learner.steps == 6
    assert all("pilot_nll" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_the_copilot_learns_on_after_the_first_visits(tmp_path):
    before, after = (make_trainer(tmp_path, "first_visit", max_steps=steps) for steps in (4, 6))
    for trainer in (before, after):
        trainer.args.lr_scheduler_type = "constant"
        trainer.train()
    with pytest.raises(AssertionError):
        assert_same(before.copilot, after.copilot)


@pytest.mark.parametrize("source", ["train", "first_visit"])
def test_the_pilot_is_the_parents(tmp_path, source):
    ours = make_trainer(tmp_path, source)
    ours.train()
    theirs = make_trainer(tmp_path, source, trainer_class=SFTTrainer)
    theirs.train()
    assert_same(ours.model, theirs.model)


def test_a_holdout_is_logged_and_never_trained_on(tmp_path):
    trainer = make_trainer(tmp_path, "holdout", copilot_holdout=0.25)
    assert (len(trainer.train_dataset), len(trainer.lifecycle.source.rows)) == (12, 4)
    trained = {tuple(row["input_ids"]) for row in trainer.train_dataset}
    trainer.train()
    assert len(trainer.learner.log.rounds) == 6
    held_out = logged_rows(trainer)
    assert held_out and not any(ids == row[: len(ids)] for ids in held_out for row in trained)


def test_with_a_holdout_the_pilot_is_the_parents_on_the_rest(tmp_path):
    ours = make_trainer(tmp_path, "holdout", copilot_holdout=0.25)
    rest = ours.train_dataset
    ours.train()
    theirs = make_trainer(tmp_path, "holdout", data=rest, trainer_class=SFTTrainer)
    theirs.train()
    assert_same(ours.model, theirs.model)
    assert ours.model.training


def test_a_holdout_is_seen_by_a_pilot_in_eval_mode(tmp_path):
    """Its records are the same whatever the random state is, which they leave alone: no dropout."""
    trainer = make_trainer(tmp_path, "holdout", copilot_holdout=0.25)
    trainer.learner.start(1)
    looks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        looks.append(trainer.lifecycle.source.records(trainer.learner, trainer.state))
        assert torch.equal(state, torch.get_rng_state())
    assert len(looks[0]) == len(looks[1]) == 4
    assert all(torch.equal(a.hidden_states, b.hidden_states) for a, b in zip(*looks, strict=True))


@pytest.mark.parametrize("source", ["first_visit", "holdout"])
@pytest.mark.parametrize("step", [2, 5])
def test_resumed_equals_uninterrupted(tmp_path, source, step):
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path / "a", source, **saving)
    whole.train()
    resumed = make_trainer(tmp_path / "b", source, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert_same(whole.model, resumed.model)
    assert_same(whole.copilot, resumed.copilot)
    assert logged_rows(whole) == logged_rows(resumed)


@pytest.mark.parametrize("form", [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}])
def test_a_holdout_of_packed_rows(tmp_path, form):
    trainer = make_trainer(tmp_path, "holdout", addition(64), copilot_holdout=0.25, **form)
    trainer.train()
    assert len(trainer.learner.log.rounds) == 6
    inputs = without_logits(trainer.model, {"input_ids": None, "labels": None})
    assert inputs == {"input_ids": None, "logits_to_keep": 1, "use_cache": False}  # no cache tells documents apart


def test_a_holdout_is_not_what_is_evaluated(tmp_path):
    settings = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    trainer = make_trainer(tmp_path, "holdout", **settings)
    trainer.eval_dataset = trainer.train_dataset
    assert (
        len(trainer.get_eval_dataloader().dataset) == len(trainer.train_dataset) != len(trainer.lifecycle.source.rows)
    )


def test_first_visits_that_are_lost_raise(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "copilot_save_mistake_log": False}
    make_trainer(tmp_path, "first_visit", **saving).train()
    with pytest.raises(ValueError, match="nothing to learn from"):
        make_trainer(tmp_path, "first_visit").train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_first_visits_beside_a_trained_head_are_warned_of(tmp_path, caplog):
    for freeze, warned in ((True, False), (False, True)):
        caplog.clear()
        trainer = make_trainer(tmp_path, "first_visit", max_steps=1)
        trainer.model.lm_head.requires_grad_(not freeze)
        trainer.train()
        assert ("old states and the new head" in caplog.text) == warned


@pytest.mark.parametrize("option", ["copilot_mistake_source", "copilot_strength", "copilot_log_dtype"])
def test_a_choice_that_does_not_exist_raises(tmp_path, option):
    for config_class in (CopilotSFTConfig, CopilotSeq2SeqConfig, CopilotArguments):
        folder = {} if config_class is CopilotArguments else {"output_dir": str(tmp_path), "use_cpu": True}
        with pytest.raises(ValueError, match=f"{option}='hold_out': choose one of"):
            config_class(**folder, **{option: "hold_out"})


@pytest.mark.parametrize("config_class", [CopilotSFTConfig, CopilotSeq2SeqConfig])
def test_the_arguments_are_options_of_a_script(config_class, tmp_path):
    names = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--copilot_steps_per_round", "2"]
    (args,) = TrlParser((config_class,)).parse_args_into_dataclasses(names)
    assert args.copilot_steps_per_round == 2


def test_arguments_that_would_do_nothing_raise():
    with pytest.raises(ValueError, match="set copilot_mistake_source='holdout'"):
        CopilotArguments(copilot_holdout=0.2)
    with pytest.raises(ValueError, match="For a fixed λ set CopilotConfig"):
        CopilotArguments(copilot_strength=0.5)


@given(st.integers(1, 9), st.integers(1, 5))
def test_a_holdout_is_walked_through_in_order(rows, size):
    holdout = Holdout(list(range(rows)), list, size)
    walked = [row for index in range(rows) for row in holdout.batch(index)]
    assert walked == list(range(rows)) * size


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0, 1.5, -0.2])
def test_a_share_that_leaves_nothing_raises(share):
    with pytest.raises(ValueError, match="copilot_holdout"):
        split_holdout(Dataset.from_dict({"a": list(range(10))}), share, 0)


def test_a_stream_has_no_holdout(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(addition(16)))
    with pytest.raises(ValueError, match="copilot_mistake_source='holdout' splits"):
        make_trainer(tmp_path, "holdout", data=stream)


def test_the_callback(tmp_path):
    with pytest.raises(ValueError, match="CopilotCallback can't hold rows out"):
        CopilotCallback(copilot_args=CopilotArguments(copilot_mistake_source="holdout"))
    callback = CopilotCallback(copilot_args=CopilotArguments(copilot_mistake_source="first_visit"))
    data = make_trainer(tmp_path, "train").train_dataset
    rows = [{"input_ids": list(row["input_ids"])[:8], "labels": list(row["input_ids"])[:8]} for row in data]
    Trainer(
        model=tiny_pilot(),
        args=TrainingArguments(
            **(QUIET | {"output_dir": str(tmp_path), "max_steps": 6, "per_device_train_batch_size": 4})
        ),
        train_dataset=rows,
        callbacks=[callback],
    ).train()
    assert len(callback.learner.log.rounds) == 4

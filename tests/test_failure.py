"""What goes wrong in the Copilot stays in the Copilot: the Pilot's training goes on as if alone."""

from __future__ import annotations

import io
import json
import logging

import pytest
import torch
from datasets import Dataset
from rich.table import Table
from test_data import train
from tiny import QUIET, addition, assert_same, tiny_pilot, tiny_tokenizer
from trl import SFTConfig, SFTTrainer

from hf_copilot import CopilotLearner, CopilotSFTConfig, CopilotTrainer
from hf_copilot.training import optimizer
from hf_copilot.training.report import show
from hf_copilot.training.teacher_forced import TeacherForced


def no_memory(self, batch):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def not_finite(self, batch):
    return next(self.copilot.parameters()).sum() * torch.nan


@pytest.mark.parametrize("failure", [no_memory, not_finite])
def test_a_failing_copilot_step_is_left_out(tmp_path, monkeypatch, caplog, failure):
    monkeypatch.setattr(TeacherForced, "loss", failure)
    data = addition(32)
    ours = train(CopilotTrainer, CopilotSFTConfig, tmp_path / "ours", data, max_steps=6, copilot_steps_per_round=1)
    theirs = train(SFTTrainer, SFTConfig, tmp_path / "theirs", data, max_steps=6)
    assert_same(ours.model, theirs.model)
    assert ours.learner.skipped_steps == 6
    assert [entry["copilot_skipped_steps"] for entry in ours.state.log_history if "loss" in entry] == [2, 4, 6]
    assert caplog.text.count("times in a row") == 1 and "copilot_peft_config" in caplog.text


def test_batches_get_smaller_than_the_pilots_where_memory_ran_out(tmp_path, monkeypatch):
    """Also beside a micro-batch that is larger than what usually fits; and a resumed run knows."""
    original, tried = TeacherForced.loss, []

    def has_little_memory(self, batch):
        tried.append(batch.inputs["memory"].shape[:2].numel())
        return original(self, batch) if tried[-1] <= 40 else no_memory(self, batch)

    monkeypatch.setattr(optimizer, "ROOM", 32)
    monkeypatch.setattr(TeacherForced, "loss", has_little_memory)
    settings = {"max_steps": 4, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    ours = train(CopilotTrainer, CopilotSFTConfig, tmp_path, addition(64), **settings)
    learner = ours.learner
    assert max(tried) > 40 >= learner.room == learner.optimizer.limit
    assert 0 < learner.skipped_steps < 8 and max(tried[-4:]) <= learner.room
    state = json.loads((tmp_path / "checkpoint-2" / "copilot_state" / "learner.json").read_text())
    assert state["limit"] == learner.room


def test_a_document_that_never_fits_does_not_make_the_batches_of_others_small(tmp_path, monkeypatch):
    original = TeacherForced.loss

    def has_little_memory(self, batch):
        longest = batch.inputs["memory"].shape[1]
        return original(self, batch) if longest < 20 else no_memory(self, batch)

    monkeypatch.setattr(optimizer, "ROOM", 256)
    monkeypatch.setattr(TeacherForced, "loss", has_little_memory)
    rows = [
        {"input_ids": [5, 6, 7, 8] * (8 if i == 0 else 2), "completion_mask": [1, 1, 1, 1] * (8 if i == 0 else 2)}
        for i in range(8)
    ]
    settings = {"max_steps": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    learner = train(CopilotTrainer, CopilotSFTConfig, tmp_path, Dataset.from_list(rows), **settings).learner
    assert learner.skipped_steps > 8 and learner.optimizer.limit >= 31  # that document by itself


def test_a_step_that_works_ends_the_streak(tmp_path, monkeypatch, caplog):
    original, update, updates = TeacherForced.loss, CopilotLearner.update, []

    def every_second(self, batch):
        return no_memory(self, batch) if len(updates) % 2 else original(self, batch)

    monkeypatch.setattr(CopilotLearner, "update", lambda self, records: updates.append(1) or update(self, records))

    monkeypatch.setattr(TeacherForced, "loss", every_second)
    with caplog.at_level(logging.WARNING):
        ours = train(CopilotTrainer, CopilotSFTConfig, tmp_path, addition(32), max_steps=6, copilot_steps_per_round=1)
    assert ours.learner.skipped_steps == 3 and "in a row" not in caplog.text


def test_an_unusual_error_of_the_copilot_is_not_hidden(tmp_path, monkeypatch):
    def broken(self, batch):
        raise RuntimeError("a bug")

    monkeypatch.setattr(TeacherForced, "loss", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train(CopilotTrainer, CopilotSFTConfig, tmp_path, addition(32))


def test_a_smaller_batch_is_found_and_the_run_begins_anew(tmp_path, monkeypatch):
    """auto_find_batch_size: the first try fails in the Pilot's third step."""
    original, calls = SFTTrainer.compute_loss, []

    def fails_once(self, model, inputs, *args, **kwargs):
        calls.append(len(inputs["labels"]))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", fails_once)
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = train(CopilotTrainer, CopilotSFTConfig, tmp_path, addition(32), **settings)
    assert calls[0] == 4 and calls[-1] < 4
    assert trainer.learner.steps == 4 and len(trainer.learner.log.rounds) == 4


class OwnLoss(CopilotTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As subclasses of SFTTrainer have it, without super()."""
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())


def test_a_run_in_which_nothing_is_observed_raises_at_its_first_round(tmp_path):
    with pytest.raises(ValueError, match="super\\(\\).compute_loss"):
        train(OwnLoss, CopilotSFTConfig, tmp_path, addition(32))


class ObservesItself(OwnLoss):
    def compute_loss(self, model, inputs, *args, **kwargs):
        with (self.learner.observe if self.model.training else self.learner.evaluate)(inputs):  # as the error says
            return super().compute_loss(model, inputs, *args, **kwargs)


def test_what_that_error_says_logs_no_evaluation(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "remove_unused_columns": False}
    args = CopilotSFTConfig(output_dir=str(tmp_path), **(QUIET | {"max_steps": 4} | settings))
    data = {"train_dataset": addition(32), "eval_dataset": addition(8, seed=1)}
    trainer = ObservesItself(tiny_pilot(), args, processing_class=tiny_tokenizer(), **data)
    trainer.train()
    assert len(trainer.learner.log) == 4 * args.per_device_train_batch_size
    assert trainer.copilot.config.calibration is not None


class Unwritable(io.TextIOWrapper):
    def write(self, text):
        raise BrokenPipeError("closed")


class LacksCharactersThenCloses(Unwritable):
    def write(self, text):
        text.encode("ascii")
        return super().write(text)


@pytest.mark.parametrize(
    "stream",
    [
        LacksCharactersThenCloses(io.BytesIO(), encoding="ascii"),
        io.TextIOWrapper(io.BytesIO(), encoding="cp1252"),
        Unwritable(io.BytesIO()),
    ],
)
def test_no_run_ends_for_a_failure_to_print(monkeypatch, stream):
    monkeypatch.setattr("sys.stdout", stream)
    table = Table(title="λ = 0.5")
    table.add_row("Mistake Log")
    show(table)
    if isinstance(stream, Unwritable):
        return
    stream.flush()
    assert b"= 0.5" in stream.buffer.getvalue() and b"Mistake Log" in stream.buffer.getvalue()

"""Resumed equals uninterrupted, wherever a run was interrupted; torn checkpoints are found and passed over."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from tiny import QUIET, addition, assert_same, tiny_pilot, tiny_tokenizer
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import SFTConfig, SFTTrainer

from hf_copilot import CopilotConfig, CopilotModel, CopilotSFTConfig, CopilotTrainer
from hf_copilot.training import checkpoint
from hf_copilot.training.checkpoint import find_fault, load_best, newest_whole_checkpoint, save_state
from hf_copilot.training.metrics import UNCHOSEN_STRENGTH, choose_strength

PACKED = {"packing": True, "packing_strategy": "bfd", "max_length": 16}
VARIANTS = {
    "full": {},
    "lora_copilot": {"copilot_peft_config": LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])},
    "lora_pilot": {"peft_config": LoraConfig(r=2, lora_dropout=0.1)},
    "bf16": {"bf16": True},
    "packing": PACKED,
    "two_epochs": {"max_steps": -1, "num_train_epochs": 2, "rows": 12},
    "paper": {"copilot": CopilotConfig.paper(num_hidden_layers=2, dropout=0.1)},
    "small_log": {"copilot_log_rounds": 2},
    "pilot_vocabulary": {"copilot": CopilotConfig(dropout=0.1, vocab_projection="pilot")},
    "states": {"copilot": CopilotConfig(dropout=0.1, memory="pilot")},
    "three_steps": {"copilot_steps_per_round": 3},
}


def make_trainer(folder, rows=64, copilot=None, pilot=None, callbacks=None, **changes):
    """Six steps, a checkpoint every second, dropout in Pilot and Copilot."""
    more = {name: changes.pop(name, None) for name in ("peft_config", "copilot_peft_config", "eval_dataset")}
    args = {"max_steps": 6, "logging_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    args |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return CopilotTrainer(
        model=tiny_pilot(attention_dropout=0.1, **(pilot or {})),
        args=CopilotSFTConfig(output_dir=str(folder), **(QUIET | args | changes)),
        train_dataset=addition(rows),
        processing_class=tiny_tokenizer(),
        copilot=copilot if copilot is not None else CopilotConfig(dropout=0.1),
        callbacks=callbacks,
        **more,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run; copy its folder before changing it."""
    trainer = make_trainer(tmp_path_factory.mktemp("straight"))
    trainer.train()
    return trainer


def copy_of(straight, folder):
    shutil.copytree(straight.args.output_dir, folder)
    return Path(folder)


def assert_same_run(a, b):
    assert_same(a.model, b.model)
    assert_same(a.copilot, b.copilot)
    assert a.learner.steps == b.learner.steps and len(a.learner.log) == len(b.learner.log)


@pytest.fixture(scope="module", params=VARIANTS)
def uninterrupted(request, tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp(request.param), **VARIANTS[request.param])
    trainer.train()
    return request.param, trainer


@pytest.mark.parametrize("step", [2, 4])
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, step):
    variant, uninterrupted = uninterrupted
    resumed = make_trainer(tmp_path, **VARIANTS[variant])
    resumed.train(resume_from_checkpoint=str(Path(uninterrupted.args.output_dir, f"checkpoint-{step}")))
    assert uninterrupted.state.global_step == 6
    assert_same_run(uninterrupted, resumed)


def test_the_copilot_depends_on_what_a_checkpoint_holds(tmp_path, straight):
    """The test above would prove nothing if the log did not matter."""
    make_trainer(tmp_path, copilot_save_mistake_log=False).train()
    assert not list(tmp_path.rglob("mistake_log*"))
    again = make_trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(again.model, straight.model)
    with pytest.raises(AssertionError):
        assert_same(again.copilot, straight.copilot)


def test_a_log_that_was_left_out_is_said(tmp_path, caplog):
    make_trainer(tmp_path, copilot_save_mistake_log=False).train()
    make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "the Copilot without the Mistake Log" in caplog.text


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


TEARS = {
    "no_state": lambda folder: (folder / "trainer_state.json").unlink(),
    "cut_state": lambda folder: cut(folder / "trainer_state.json"),
    "no_copilot": lambda folder: (folder / "copilot" / "model.safetensors").unlink(),
    "cut_log": lambda folder: cut(folder / "copilot_state" / "mistake_log-0.safetensors"),
    "cut_pilot": lambda folder: cut(folder / "model.safetensors"),
    "cut_optimizer": lambda folder: cut(folder / "optimizer.pt"),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_named_and_passed_over(tmp_path, straight, caplog, tear):
    folder = copy_of(straight, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-6")
    TEARS[tear](folder / "checkpoint-4")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        make_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    started = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            started.append(state.global_step)

    resumed = make_trainer(folder, callbacks=[Watch()])
    resumed.train(resume_from_checkpoint=True)
    assert started == [2] and "checkpoint-4 is not a whole checkpoint" in caplog.text
    assert (folder / "_torn-checkpoint-4").is_dir() and find_fault(folder / "checkpoint-4") is None
    assert_same_run(straight, resumed)


def test_what_trainer_resumes_without_is_said(tmp_path, straight, caplog):
    """A file that was removed to save disk, and one that was edited: no torn checkpoint."""
    folder = copy_of(straight, tmp_path / "run") / "checkpoint-6"
    for name in ("optimizer.pt", "training_args.bin", "copilot_state/mistake_log-0.safetensors"):
        (folder / name).unlink()
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"note": "moved", ', 1))
    make_trainer(folder.parent).train(resume_from_checkpoint=True)
    assert "has lost ['copilot_state/mistake_log-0.safetensors', 'optimizer.pt'" in caplog.text
    assert "Copilot without the Mistake Log" in caplog.text and "_torn" not in caplog.text


def test_rates_that_a_resumed_run_does_not_take_are_said(tmp_path, straight, caplog):
    folder = copy_of(straight, tmp_path / "run") / "checkpoint-6"
    resumed = make_trainer(folder.parent, copilot_learning_rate=1e-2, copilot_weight_decay=0.1)
    resumed.train(resume_from_checkpoint=str(folder))
    assert "copilot_learning_rate stays 0.0003" in caplog.text and "copilot_weight_decay" not in caplog.text


def test_no_whole_checkpoint_raises(tmp_path, straight):
    folder = copy_of(straight, tmp_path / "run")
    for whole in folder.glob("checkpoint-*"):
        (whole / "trainer_state.json").unlink()
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="no whole checkpoint.*checkpoint-4: trainer_state.json"):
        make_trainer(folder).train(resume_from_checkpoint=True)
    assert sorted(folder.iterdir()) == before  # nothing is renamed for nothing


def test_copies_under_other_names_are_no_checkpoints(tmp_path, straight):
    """As Trainer has it: a number and nothing else behind the dash."""
    for name in ("checkpoint-4", "checkpoint-4-v2", "checkpoint-2-copy-9", "checkpoint-best1"):
        shutil.copytree(Path(straight.args.output_dir) / "checkpoint-4", tmp_path / name)
    assert newest_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_torn_checkpoint_does_not_push_out_a_whole_one(tmp_path, straight):
    """Rotation keeps the newest folder: here a torn one, were it still counted."""
    folder = copy_of(straight, tmp_path / "run")
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    shutil.rmtree(folder / "checkpoint-4")

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    make_trainer(folder, save_total_limit=1, callbacks=[Stop()]).train(resume_from_checkpoint=True)
    (kept,) = folder.glob("checkpoint-*")
    assert kept.name == "checkpoint-4" and find_fault(kept) is None


@pytest.mark.parametrize(
    "at", ["hf_copilot.training.checkpoint.save_file", "hf_copilot.training.checkpoint.json.dumps"]
)
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, straight, monkeypatch, at):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    class FillDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                monkeypatch.setattr(at, full)

    with pytest.raises(OSError, match="No space"):
        make_trainer(tmp_path, save_total_limit=1, callbacks=[FillDisk()]).train()
    monkeypatch.undo()
    assert find_fault(tmp_path / "checkpoint-2") is None and find_fault(tmp_path / "checkpoint-4") is not None
    assert not list((tmp_path / "checkpoint-4").glob("_copilot_state.*"))
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(straight, resumed)


def test_a_checkpoint_written_anew_is_torn_until_it_is_whole(tmp_path, straight, monkeypatch):
    """A kill while an old checkpoint is overwritten must not leave its old mark."""
    folder = copy_of(straight, tmp_path / "run")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    trainer = make_trainer(folder)
    monkeypatch.setattr(trainer, "_save_scaler", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert find_fault(folder / "checkpoint-2") is not None and find_fault(folder / "checkpoint-4") is None


def test_ctrl_c_leaves_the_last_checkpoint_loadable(tmp_path, straight):
    class CtrlC(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=[CtrlC()]).train()
    assert CopilotModel.from_pretrained(tmp_path / "checkpoint-4" / "copilot").config.vocab_size
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(straight, resumed)


def test_a_second_run_of_one_trainer_begins_anew(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.train()
    assert trainer.learner.steps == 6 and len(trainer.learner.log.rounds) == 6


def test_resuming_from_plain_sft_names_the_flag(tmp_path):
    plain = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    SFTTrainer(
        model=tiny_pilot(attention_dropout=0.1),
        args=SFTConfig(output_dir=str(tmp_path), gradient_accumulation_steps=2, **(QUIET | plain)),
        train_dataset=addition(64),
        processing_class=tiny_tokenizer(),
    ).train()
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="copilot_start_fresh=True"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.lifecycle.checkpoint is None  # so that the next run begins anew
    fresh = make_trainer(tmp_path, copilot_start_fresh=True)
    fresh.train(resume_from_checkpoint=True)
    assert fresh.learner.steps == 2 and fresh.learner.optimizer.scheduler.get_last_lr()[0] == 0  # of a linear schedule


def test_a_best_checkpoint_of_before_there_was_a_copilot(tmp_path, caplog, monkeypatch):
    """Its Pilot is loaded at the end, the Copilot stays."""
    both = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    plain = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2} | both
    SFTTrainer(
        model=tiny_pilot(attention_dropout=0.1),
        args=SFTConfig(output_dir=str(tmp_path), gradient_accumulation_steps=2, **(QUIET | plain)),
        train_dataset=addition(64),
        eval_dataset=addition(8, seed=1),
        processing_class=tiny_tokenizer(),
    ).train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best_metric": 0.0}))
    fresh = make_trainer(tmp_path, copilot_start_fresh=True, eval_dataset=addition(8, seed=1), **both)
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "is best, and holds no Copilot" in caplog.text
    assert fresh.learner.steps == 4 and fresh.copilot.config.calibration is not None
    monkeypatch.setattr(checkpoint, "sum_count", lambda count, device: 1)
    monkeypatch.setattr(checkpoint, "num_processes", lambda: 2)
    with pytest.raises(ValueError, match="save_on_each_node"):
        load_best(fresh.learner, tmp_path / "checkpoint-2")


class AsksToEnd(TrainerCallback):
    """As a signal would, that a process is to end, inside the third step."""

    def __init__(self):
        self.managers = []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.managers[0].is_checkpoint_requested = state.global_step == 2


def test_what_is_saved_at_once_has_the_copilots_step(tmp_path, straight):
    """Also where it is the Pilot's callback that saves (`enable_jit_checkpoint`)."""
    asks = AsksToEnd()
    ended = make_trainer(tmp_path, enable_jit_checkpoint=True, callbacks=[asks])
    *_, lifecycle, saves = ended.callback_handler.callbacks
    assert lifecycle is ended.lifecycle and isinstance(saves, JITCheckpointCallback)
    asks.managers.append(saves.jit_manager)
    ended.train()
    assert ended.state.global_step == ended.learner.steps == 3
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_run(resumed, straight)


def test_each_machine_writes_what_all_have_in_common(tmp_path, straight, monkeypatch):
    """`save_on_each_node`, without a disk that all machines see: there the first process is not this one."""
    monkeypatch.setattr(checkpoint, "process_index", lambda: 1)
    save_state(straight.learner, tmp_path / "ours", shared=True)
    save_state(straight.learner, tmp_path / "others")
    assert (tmp_path / "ours" / "learner.json").is_file() and not (tmp_path / "others" / "learner.json").exists()


def test_the_manifest_lists_every_file(straight):
    checkpoint = Path(straight.args.output_dir) / "checkpoint-6"
    listed = set(json.loads((checkpoint / "copilot_state" / "files.json").read_text()))
    there = {str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.is_file() and f.suffix != ".md"}
    assert there - listed == {"trainer_state.json", "copilot_state/files.json"} and listed <= there


def test_the_calibrated_strength_is_resumed(tmp_path, straight):
    folder = copy_of(straight, tmp_path / "run")
    config = folder / "checkpoint-4" / "copilot" / "config.json"
    chosen = choose_strength(torch.tensor([[2.0, 0], [1, 0], [0, 1]]), (0.0, 0.75), "rows")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"strength": 0.75, "calibration": chosen}))
    (folder / "checkpoint-4" / "copilot_state" / "files.json").unlink()  # the file was changed by hand
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert resumed.copilot.config.strength == 0.75


def test_a_run_that_began_at_the_old_default_goes_on_at_the_careful_one(tmp_path, straight):
    folder = copy_of(straight, tmp_path / "run")
    config = folder / "checkpoint-4" / "copilot" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"strength": 1.0}))
    (folder / "checkpoint-4" / "copilot_state" / "files.json").unlink()  # the file was changed by hand
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert resumed.copilot.config.strength == UNCHOSEN_STRENGTH
    assert_same(resumed.copilot, straight.copilot)


@pytest.mark.parametrize("now", [{"copilot_strength": "config"}, {"eval_dataset": addition(8, seed=1)}])
def test_a_run_at_the_careful_strength_goes_on_where_it_can_be_chosen(tmp_path, straight, now):
    folder = copy_of(straight, tmp_path / "run")
    resumed = make_trainer(folder, **now)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert (resumed.copilot.config.calibration is None) is ("copilot_strength" in now)
    assert resumed.copilot.config.calibration or resumed.copilot.config.strength == 1.0


def test_resuming_with_another_adapter_raises(tmp_path):
    make_trainer(tmp_path, copilot_peft_config=LoraConfig(r=4)).train()
    for other in (None, LoraConfig(r=2), LoraConfig(r=4, lora_alpha=3)):
        with pytest.raises(ValueError, match="copilot_peft_config that it was started with"):
            make_trainer(tmp_path, copilot_peft_config=other).train(
                resume_from_checkpoint=str(tmp_path / "checkpoint-2")
            )


def test_random_state_of_the_copilot_is_its_own(tmp_path):
    """No step of the Copilot draws from the global generator."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    before = torch.get_rng_state()
    trainer.learner.update(trainer.learner.log.sample(2, trainer.learner.generator))
    assert not torch.equal(before, torch.get_rng_state())  # dropout does draw
    torch.set_rng_state(before)
    observed = SimpleNamespace(records=[next(iter(trainer.learner.log.rounds[0]))])
    trainer.learner.pending, trainer.learner.has_observed = [observed], True
    trainer.learner.step(measure=True)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path):
    from kills import final_weights, survive

    survive(tmp_path / "whole", kills=0)
    killed, _ = survive(tmp_path / "killed", kills=8)
    assert killed >= 1
    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "whole")


@pytest.mark.parametrize(
    "name, saved, now",
    [
        ("hidden_state_lag", 1, 0),
        ("strength", UNCHOSEN_STRENGTH, 0.3),
        ("position_embedding", "rotary", "none"),
        ("dropout", 0.1, 0.2),
    ],
)
def test_resuming_with_other_settings_raises(tmp_path, straight, name, saved, now):
    settings = {"memory": "pilot", name: now} if name == "hidden_state_lag" else {name: now}
    other = CopilotConfig(**({"dropout": 0.1} | settings))
    with pytest.raises(ValueError, match=rf"{name}.*\({saved!r}, {now!r}\)"):
        make_trainer(tmp_path, copilot=other).train(
            resume_from_checkpoint=str(Path(straight.args.output_dir) / "checkpoint-2")
        )

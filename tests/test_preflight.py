"""What is said of memory and disk is what a run takes, and what will not fit is said before it is needed."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import QUIET, addition, tiny_pilot, tiny_tokenizer

from hf_copilot import CopilotConfig, CopilotSFTConfig, CopilotTrainer
from hf_copilot.training import lifecycle, preflight

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
KINDS = {
    "tokens": {},
    "states": {"copilot": CopilotConfig(memory="pilot")},
    "narrow": {"copilot": CopilotConfig(init="random", hidden_size=16, num_attention_heads=2, num_hidden_layers=3)},
    "lent": {"copilot": CopilotConfig(vocab_projection="pilot")},
    "adapter": {"copilot_peft_config": LORA},
}


def run(folder, kind="tokens", **changes):
    args = {"max_steps": 12, "copilot_log_rounds": 12, "save_strategy": "steps", "save_steps": 12}
    trainer = CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(str(folder), per_device_train_batch_size=4, **(QUIET | args | changes)),
        train_dataset=addition(96),
        processing_class=tiny_tokenizer(),
        **KINDS[kind],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_memory_and_disk_are_what_was_said(kind, tmp_path, monkeypatch):
    foreseen = {}

    def note(when, describe):
        def noted(learner, *more):
            foreseen[when] = preflight.checkpoint_bytes(learner), preflight.log_bytes(learner)
            foreseen["memory"] = preflight.memory_bytes(learner.copilot)
            return describe(learner, *more)

        return noted

    for name in ("describe_start", "describe_rounds"):
        monkeypatch.setattr(lifecycle, name, note(name, getattr(lifecycle, name)))
    learner = run(tmp_path, kind).learner
    moments = learner.optimizer.adamw.state_dict()["state"]
    held = sum(p.nbytes * (2 if p.requires_grad else 1) for p in learner.copilot.parameters())
    held += sum(t.nbytes for entry in moments.values() for name, t in entry.items() if name != "step")
    assert held == foreseen["memory"]
    assert foreseen["describe_start"] == (foreseen["describe_rounds"][0], learner.log.max_bytes)
    assert foreseen["describe_rounds"][1] == pytest.approx(learner.log.nbytes, rel=0.25)
    files = list(Path(tmp_path).rglob("checkpoint-12/copilot*/*.safetensors"))
    logs = sum(file.stat().st_size for file in files if file.name.startswith("mistake_log"))
    others = sum(file.stat().st_size for file in files) - logs
    assert others == pytest.approx(foreseen["describe_start"][0], rel=0.25)
    assert logs == pytest.approx(foreseen["describe_rounds"][1], rel=0.25)


@pytest.mark.parametrize(
    ("short", "way_out"),
    [
        ("free_memory", "gradients and AdamW's moments on cpu.*copilot_peft_config"),
        ("free_memory", "Mistake Log in CPU memory.*copilot_log_rounds"),
        ("free_disk", "checkpoints in .*save_total_limit"),
    ],
)
def test_what_will_not_fit_is_said(short, way_out, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(lifecycle.logger, "warning", said.append)
    settings = {"copilot_log_rounds": 24, "copilot_strength": "config"}
    run(tmp_path / "fits", **settings)
    assert not said
    monkeypatch.setattr(preflight, short, lambda where: 1000)
    run(tmp_path, **settings)
    assert [line for line in said if re.search(way_out, line)], said


def test_only_what_is_kept_on_disk_counts():
    args, state = CopilotSFTConfig("unused", save_steps=5, use_cpu=True, bf16=False), lifecycle.TrainerState()
    state.max_steps, state.save_steps, state.num_train_epochs = 18, 5, 3
    kept, left = {}, {}
    for strategy in ("no", "steps", "epoch"):
        args.save_strategy = strategy
        kept[strategy] = preflight.checkpoints_to_come(args, state)
        left[strategy] = preflight.checkpoints_to_come(args, replace(state, global_step=9))
    assert kept == {"no": 0, "steps": 4, "epoch": 3} and left == {"no": 0, "steps": 2, "epoch": 2}
    assert preflight.checkpoints_to_come(args, replace(state, max_steps=0)) == 0
    state.num_train_epochs = sys.maxsize  # of a stream
    assert preflight.checkpoints_to_come(args, state) == 1
    args.save_strategy, args.save_total_limit = "steps", 2
    assert preflight.checkpoints_to_come(args, state) == 2


def test_time_is_measured_after_a_warm_up(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(preflight, "perf_counter", lambda: next(now))
    watch = preflight.Stopwatch(torch.device("cpu"))
    ended = []
    for _ in range(preflight.WARM_UP + preflight.MEASURED + 3):
        watch.begin_round()
        with watch.of_copilot():
            pass
        ended.append(watch.end_round())
    assert ended.index(True) == preflight.WARM_UP + preflight.MEASURED - 1 and sum(ended) == 1
    assert (watch.total, watch.own) == (3 * preflight.MEASURED, preflight.MEASURED) and watch.share == 0.5


@pytest.mark.parametrize("pauses", [False, True])
def test_data_counts_and_pauses_do_not(monkeypatch, pauses):
    """A round takes 10, loading its data 5, and an evaluation would be in that time."""
    now = [0.0]
    monkeypatch.setattr(preflight, "perf_counter", lambda: now[0])
    watch = preflight.Stopwatch(torch.device("cpu"))
    for _ in range(preflight.WARM_UP + preflight.MEASURED):
        now[0] += 5
        watch.begin_round()
        now[0] += 10
        watch.end_round(pauses)
    assert watch.total == preflight.MEASURED * (10 if pauses else 15)


def test_the_line_after_the_first_rounds(tmp_path, capsys):
    run(tmp_path, disable_tqdm=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Memory of the Copilot: " in shown and re.search(r"takes \d+% of the Pilot's time on top", shown)

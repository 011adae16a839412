"""What the user sees: lines at the start and after the first rounds, a table at the end, metrics in integrations."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from pathlib import Path

import trackio
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_data import train
from tiny import SHAPE, addition
from transformers import MixtralConfig, MixtralForCausalLM

from hf_copilot import CopilotSFTConfig, CopilotTrainer, MistakeLog
from hf_copilot.model.fields import FIGURES
from hf_copilot.training.metrics import METRICS
from hf_copilot.training.report import count_parameters, describe_start, multiplied_parameters, show, table_of_training

EXPECTED = {f"train/{name}" for name in (*METRICS, "copilot_loss")} | {f"eval/{name}" for name in METRICS}


def run(folder, integration, **changes):
    trainer = train(CopilotTrainer, CopilotSFTConfig, folder, addition(32), report_to=[integration], **changes)
    trainer.evaluate(addition(4))


def test_tensorboard_shows_every_metric(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert set(events.Tags()["scalars"]) >= EXPECTED
    assert [event.step for event in events.Scalars("train/rectified_nll")] == [2, 4]


def test_trackio_shows_every_metric(tmp_path):
    run(tmp_path, "trackio", project="reports")
    trackio.finish()
    database = Path(os.environ["TRACKIO_DIR"]) / "reports.db"
    rows = [json.loads(row) for (row,) in sqlite3.connect(database).execute("SELECT metrics FROM metrics")]
    assert set().union(*rows) >= EXPECTED


def test_the_lines_at_the_start(tmp_path):
    trainer = train(CopilotTrainer, CopilotSFTConfig, tmp_path, addition(32), copilot_log_rounds=7)
    learner = trainer.learner
    (pilot_all, _), (own_all, own_trained) = count_parameters(trainer.model), count_parameters(learner.copilot)
    lines = describe_start(learner)
    assert "7 rounds" in lines and "first weights: the Pilot's own layers" in lines
    assert re.findall(r"([\d.]+)M parameters", lines) == [f"{pilot_all / 1e6:.1f}", f"{own_all / 1e6:.1f}"]
    assert own_trained == own_all and "per generated token" in lines


def test_experts_that_a_token_is_not_sent_to_are_no_cost():
    sizes = {}
    for experts in (2, 8):
        config = MixtralConfig(**SHAPE, num_local_experts=experts, num_experts_per_tok=2)
        pilot = MixtralForCausalLM(config)
        routers = sum(p.numel() for name, p in pilot.named_parameters() if ".gate." in name)
        sizes[experts] = multiplied_parameters(pilot) - routers
    assert sizes[2] == sizes[8]


def test_line_and_table_are_printed_when_bars_are_on(tmp_path, capsys):
    trainer = train(CopilotTrainer, CopilotSFTConfig, tmp_path / "quiet", addition(32))
    assert "Mistake Log" not in capsys.readouterr().out
    trainer = train(CopilotTrainer, CopilotSFTConfig, tmp_path / "loud", addition(32), disable_tqdm=False)
    shown = capsys.readouterr().out
    assert "Expected extra time" in shown and "Pilot + Copilot" in shown
    last = [entry for entry in trainer.state.log_history if "rectified_nll" in entry][-1]
    assert f"{last['pilot_nll']:.4f}" in shown and f"{last['rectified_nll']:.4f}" in shown


def test_no_figures_no_table():
    assert table_of_training([{"loss": 1.0}], MistakeLog().nbytes) is None


def test_each_of_several_evaluation_sets_has_its_figures():
    figures = dict.fromkeys(FIGURES, 0.5)
    history = [{prefix + name: value for name, value in figures.items()} for prefix in ("", "eval_b_", "eval_a_")]
    table = table_of_training([*history, {"calibration_rectified_nll": 1.0}], 0.0)
    where = ["training, before learning", "evaluation, a", "evaluation, b"]
    assert [*table.columns[0].cells][::2] == [f"NLL per token ({name})" for name in where]


def test_what_is_shown_is_no_markup(capsys):
    show("written into runs/m[a] and m[/x]")
    assert capsys.readouterr().out == "written into runs/m[a] and m[/x]\n"

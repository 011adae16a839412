"""The benchmarks run, on shapes that take no time."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from tiny import SHAPE

from benchmarks import check_device, checkpoint, cost, expected, parameters, theorem
from benchmarks.common import RESULTS, Stopwatch, table
from benchmarks.equations import solves
from hf_copilot import CopilotConfig
from hf_copilot.generation.follower import Follower


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    shape = {name: SHAPE[name] for name in cost.SHAPES["cpu"]} | {"num_hidden_layers": 3}
    monkeypatch.setitem(cost.SHAPES, "cpu", shape)


def test_cost_of_training():
    copilots = [cost.Copilot(2, "tokens"), cost.Copilot(1, "pilot")]
    work = cost.Work(labelled=26, rows=2, accumulate=2)
    rows = cost.measure_training("cpu", "cpu", work, 2, copilots)
    assert [row["memory"] for row in rows] == ["tokens", "pilot"] and rows[0]["pilot_s"] == rows[1]["pilot_s"]
    for row in rows:
        assert row["pilot_and_copilot_s"] > row["share_optimizer"] > 0
        assert row["share_forward_backward"] > 0 and row["share_log"] > 0 and row["log_mb"] > 0
        assert row["ratio_least"] <= row["ratio"] <= row["ratio_largest"]


def test_cost_of_generation():
    tokens, states = cost.measure_generation("cpu", "cpu", rows=2, prompt=6, tokens=4, reps=2)
    assert tokens["pilot_ms_per_token"] == states["pilot_ms_per_token"] > 0
    assert tokens["rectified_ms_per_token"] > 0 and 0 < tokens["share_of_weights"] < 1
    assert table([tokens, states]).count("|") == 4 * (len(tokens) + 1)


@pytest.mark.parametrize("check", [check_device.check_training, check_device.check_generation])
def test_what_is_checked_on_a_device_holds_here(check, monkeypatch):
    monkeypatch.setattr(Follower, "waits", False)
    found = list(check("cpu", "pilot"))
    assert len(found) >= 2 and all(difference <= bound for _, difference, bound in found)


def test_arms_take_turns():
    """Every second time from the last one on; the warm-up's times are forgotten."""
    watch, order = Stopwatch("cpu"), []

    def arm(name):
        order.append(name)
        with watch.time(name):
            pass

    watch.repeat(2, 1, lambda: [partial(arm, "a"), partial(arm, "b")])
    assert "".join(order) == "ba" + "ab" + "ba"
    assert len(watch.seconds["a"]) == 2 and len(watch.ratios("a", "b")) == 2


@pytest.mark.parametrize("training", ["lora", "full"])
def test_cost_of_a_checkpoint(monkeypatch, training):
    shape = {name: SHAPE[name] for name in checkpoint.SMALL_DECODER} | {"hidden_size": 64}
    monkeypatch.setattr(checkpoint, "SMALL_DECODER", shape)
    monkeypatch.setattr(checkpoint, "LLAMA_3", {"vocab_size": 50, "head_dim": 8})
    monkeypatch.setattr(
        checkpoint, "CONFIG", CopilotConfig(init="random", **(shape | {"num_hidden_layers": 2, "head_dim": 8}))
    )
    monkeypatch.setattr(checkpoint, "full_log", partial(checkpoint.full_log, 8, 2, 64, 5))
    row = checkpoint.measure(training)
    parts = row["weights_mb"] + row["optimizer_mb"] + row["log_mb"]
    assert row["total_mb"] == pytest.approx(parts) and parts > 0
    assert row["total_s"] > 0


@pytest.mark.parametrize(
    "equation, value, right",
    [
        ("x=3-1.5", 1.5, True),
        ("X = ((2.0*3)+1)", 7, True),
        ("x+1=3", 2, True),
        ("2x=6", 3, True),
        ("2(x+1)=8", 3, True),
        ("(6.0+x)*(x-6.0)=189.0", -15, True),
        ("x=4", 3, False),
        ("x*0.01=2.98", 300, False),
        ("x=x", 3, False),  # every number solves it
        ("3=3", 3, False),
        ("x=1/0", 3, False),
        ("x=", 3, False),
        ("x=3=3", 3, False),
        ("x=__import__('os')", 3, False),
        ("((((", 3, False),
    ],
)
def test_equations(equation, value, right):
    assert solves(equation, value) is right


def test_parameters_are_counted_without_weights(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(parameters, "RESULTS", tmp_path)
    parameters.main()
    assert (tmp_path / "parameters.md").read_text() == (RESULTS / "parameters.md").read_text()


def test_the_theorem_of_a_perfect_copilot():
    """f = p − p̂ plus noise: the error is least near λ = 1, and what the theorem promises is kept."""
    torch.manual_seed(0)
    truth = torch.rand(200, theorem.SYMBOLS).softmax(-1)
    pilots = (truth.log() + torch.randn(8, 200, theorem.SYMBOLS)).softmax(-1)
    corrections = truth - pilots + 0.002 * torch.randn(pilots.shape)
    found = theorem.quantities(truth, pilots, corrections)
    assert found["condition"].all() and (found["promised"] <= found["measured"]).all()
    assert torch.allclose(found["measured"], torch.tensor(2.0), atol=0.1)
    least = theorem.STRENGTHS[found["error"].argmin(0)]
    assert ((least - 1).abs() < 0.1).all()
    s_squared = found["pilot_bias"] ** 2 + found["pilot_spread"] ** 2
    assert torch.allclose(s_squared, (truth - pilots).square().mean((0, 1)))  # λ = 0 is the Pilot
    useless = theorem.quantities(truth, pilots, -corrections)
    assert not useless["condition"].any() and (useless["measured"] < 0).all()


def test_theorem_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["theorem.py", "--seeds", "2", "--steps", "2", "--rows", "2", "--results"] + [str(tmp_path)]
    )
    theorem.main()
    assert (tmp_path / "theorem.png").is_file() and (tmp_path / "theorem.md").read_text().count("\n") == 3


PRINTED = """ 4%|4| 11/264 [00:15<05:21]Measured in 10 rounds: the Copilot takes 31% of the Pilot's
time on top.   [A{'eval_loss': '1.7', 'eval_pilot_nll': '1.677', 'eval_rectified_nll': '1.216', 'epoch': '1'}
 17%|1| 50/264 [00:51]   {'loss': '3.4', 'pilot_nll': '1.614', 'rectified_nll': '1.132', 'copilot_loss': '2.6', 'epoch': '1.136'}
{'eval_pilot_right_answers': '0', 'epoch': '2'}
{'train_runtime': '159.3', 'epoch': '2'}
│ NLL per token (λ = 0.5, chosen on 9 tokens of │ 0.9 │ 0.6 │
│ right answers    │   0.6% │           13.2% │     +12.6% │
2 min 42 s, at most 0.9 GB
of memory
user\t1m48.974s
sys\t0m18.415s
"""  # noqa: E501
BY_A_LOOP = """0 {'pilot_nll': 5.9, 'rectified_nll': 5.9, 'copilot_loss': 5.8}
20 {'pilot_nll': 3.7, 'rectified_nll': 1.8}
"""


def test_curves_are_read_from_what_a_run_printed(tmp_path):
    found = expected.read_run(PRINTED)
    assert found["evaluation"] == [{"epoch": 1.0, "pilot_nll": 1.677, "rectified_nll": 1.216}]
    assert found["training"] == [{"epoch": 1.136, "pilot_nll": 1.614, "rectified_nll": 1.132, "copilot_loss": 2.6}]
    assert (found["share"], found["strength"], found["right"]) == (31, 0.5, [0.006, 0.132])
    assert (found["seconds"], found["gigabytes"]) == (162, 0.9)
    assert found["processor_seconds"] == pytest.approx(127.389)
    loop = expected.read_run(BY_A_LOOP)
    assert [entry["step"] for entry in loop["training"]] == [0, 20] and not loop["evaluation"]
    with pytest.raises(ValueError, match="no output of a run"):
        expected.read_run("{'loss': '1.0'}")
    expected.draw({"sft": found, "loop": loop}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000

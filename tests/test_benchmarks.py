"""The benchmarks run, on shapes that take no time."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch
from tiny import SHAPE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import check_device, checkpoint, cost, expected, parameters, scaling, theorem, vocabulary
from benchmarks.common import RESULTS, Stopwatch, table
from benchmarks.equations import solves
from benchmarks.streams import pretended_streams
from hf_copilot import CopilotConfig
from hf_copilot.generation.follower import Follower


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    shape = {name: SHAPE[name] for name in cost.SHAPES["cpu"]} | {"num_hidden_layers": 3}
    monkeypatch.setitem(cost.SHAPES, "cpu", shape)


def test_cost_of_training():
    copilots = [cost.Copilot(2, "tokens"), cost.Copilot(1, "pilot")]
    (eager, generating), (compiled, _) = (cost.arms_of("llama-3.2-1b", quick) for quick in cost.QUICK)
    assert {*eager} < {*compiled} < {*cost.COPILOTS} and generating == [*eager]
    assert sum(copilot.compiled for copilot in compiled) == 3 and not any(copilot.compiled for copilot in eager)
    work = cost.Work(labelled=26, rows=2, accumulate=2)
    rows = cost.measure_training("cpu", "cpu", work, 2, copilots)
    assert [row["memory"] for row in rows] == ["tokens", "pilot"] and rows[0]["pilot_s"] == rows[1]["pilot_s"]
    for row in rows:
        assert row["pilot_and_copilot_s"] > row["share_optimizer"] > 0
        assert row["share_forward_backward"] > 0 and row["share_log"] > 0 and row["log_mb"] > 0
        assert row["ratio_least"] <= row["ratio"] <= row["ratio_largest"] and row["first_s"] > 0 < row["operators"]


def test_cost_beside_a_stream_is_of_the_same_work():
    copilot = cost.Copilot(2, "tokens", own_stream=True)
    with pretended_streams() as streams:
        arms = cost.TrainingArms("cpu", "cpu", [copilot])
        work, steps = cost.Work(labelled=26, rows=2, accumulate=2), []
        for _ in range(3):
            batches = work.batches(cost.SHAPES["cpu"]["vocab_size"], "cpu")
            arms.alone(batches)
            arms.beside(copilot, batches)
            steps.append(arms.learners[copilot].steps)
        arms.count(copilot, batches)
    assert steps == [0, 1, 2] and not streams.races
    assert arms.row(copilot, work)["share_log"] is None


def test_cost_of_generation():
    tokens, states = cost.measure_generation("cpu", "cpu", rows=2, prompt=6, tokens=4, reps=2)
    assert tokens["pilot_ms_per_token"] == states["pilot_ms_per_token"] > 0
    assert tokens["rectified_ms_per_token"] > 0 and 0 < tokens["share_of_weights"] < 1
    assert table([tokens, states]).count("|") == 4 * (len(tokens) + 1)


@pytest.fixture
def small_checks(monkeypatch):
    """bf16 is slow on many CPUs."""
    for name, size in {"STEPS": 2, "NEW": 6, "ROWS": 4, "LENGTH": 16}.items():
        monkeypatch.setattr(check_device, name, size)


@pytest.mark.slow
def test_what_is_checked_on_a_device_holds_here(small_checks, monkeypatch):
    monkeypatch.setattr(Follower, "waits", False)
    losses = {}
    for found in (
        check_device.check_generation("cpu", "pilot"),
        check_device.check_training("cpu", "pilot", losses),
        check_device.check_training("cpu", "pilot", losses, backend="eager"),
    ):
        found = list(found)
        assert len(found) >= 3 and all(difference <= bound for _, difference, bound in found)


def test_a_device_with_streams_is_asked_for_one(small_checks):
    with pretended_streams() as streams:
        found = list(check_device.check_training("cpu", "tokens", {}))
    assert len(found) == 5 and all(difference <= bound for _, difference, bound in found)
    assert not streams.races


def test_on_paper_a_stream_hides_the_gpus_time_and_no_launch():
    for row in json.loads((RESULTS / "scaling.json").read_text())["overheads"]:
        assert 1 < row["training_beside"] <= row["training_compiled"]
    kind, shape = scaling.KINDS[0], scaling.SHAPES["llama-3.2-1b"]
    launched, log = scaling.launches_and_work(shape)[0], scaling.copilot_step(kind, shape, True)["log"]
    outside = scaling.lines(kind)["step"].base * scaling.launch_s()["step"]
    assert scaling.step_beside(kind, shape) == pytest.approx(launched + log + outside)


def test_cost_of_the_vocabulary():
    rows = vocabulary.measure(rank=4, repetitions=1, work=cost.Work(4, 2, 1, 16))
    full, low, frozen, lent = rows
    assert full["ratio"] == 1 and all(row["step_s"] > 0 for row in rows)
    assert full["trained_m"] > max(row["trained_m"] for row in (low, frozen, lent))
    assert frozen["file_mb"] > full["file_mb"] > lent["file_mb"] and full["memory_mb"] > frozen["memory_mb"]


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


def test_operators_are_a_line_in_the_layers():
    """Counted at two and four layers, right at six; they are the same in the file that the page is written from."""
    kind = scaling.KINDS[1]
    counted = scaling.lines(kind)["step"]
    assert counted.slope > 50 and counted.at(6) == scaling.of_copilot(kind, 2, 6)[1]
    kept = json.loads((RESULTS / "scaling.json").read_text())["operators"][kind.title]["step"]
    assert kept["slope"] == pytest.approx(counted.slope, rel=0.2)


@pytest.mark.parametrize("memory", ["tokens", "pilot"])
def test_flops_of_a_step(memory, monkeypatch):
    """By hand and as PyTorch counts them, but for a product in place that it does not know."""
    shape = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 4, "head_dim": 16, "num_hidden_layers": 2}
    pilot = scaling.LlamaForCausalLM(scaling.LlamaConfig(**shape, pad_token_id=0))
    copilot = scaling.copilot_for(pilot, CopilotConfig(memory=memory, init="random"))
    learner = scaling.CopilotLearner(copilot, pilot, 4, steps_per_round=1)
    batch = cost.make_batch(500, rows=8, length=32, labelled=8, device="cpu")
    with learner.observe(batch):
        pilot(**batch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        learner.step()
    counted = counter.get_total_flops() + 2 * (8 * 8) * 500 * 64  # dL/dW of the head
    assert scaling.copilot_flops(scaling.Kind("", False, memory, 1), shape, 8, 32, 8) == pytest.approx(
        counted, rel=0.05
    )


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

"""The Copilot's rounds on a stream of their own: same results, no race, and every wait is needed.

No GPU is asked for: streams are pretended, and whoever touches what another one may not be done with is found.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from test_compiled import varied_batch
from test_data import train
from test_learner import observe
from tiny import addition, assert_same, tiny_pilot, trained_like
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks as global_hooks
from trl import SFTConfig, SFTTrainer

from benchmarks.counting import waits_of_a_round
from benchmarks.streams import Stream, pretended_streams
from hf_copilot import (
    CopilotConfig,
    CopilotLearner,
    CopilotSFTConfig,
    CopilotTrainer,
)
from hf_copilot.training.beside import BesideThePilot, OwnStream
from hf_copilot.training.checkpoint import save_state, save_weights
from hf_copilot.training.metrics import RunningMetrics
from hf_copilot.training.optimizer import CopilotOptimizer
from hf_copilot.training.refusals import check_own_stream
from hf_copilot.training.teacher_forced import TeacherForced

# one look at what a round writes after each round but the first two
LOOKS = {
    "metrics": lambda learner, pilot: learner.pop_metrics(),
    "optimizer": lambda learner, pilot: learner.skipped_steps,
    "peft_model": lambda learner, pilot: weights(learner.exported()),
    "copilot": lambda learner, pilot: weights(learner.copilot),
    "forced": lambda learner, pilot: calibrate(learner, pilot),
}
KINDS = {
    "tokens": (CopilotConfig(), None),
    "states, the Pilot's vocabulary": (CopilotConfig(memory="pilot", vocab_projection="pilot"), None),
    "an adapter": (CopilotConfig(memory="pilot"), LoraConfig(r=2)),
}


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])  # [parameters]


def calibrate(learner, pilot):
    with torch.no_grad(), learner.calibrate((0.5, 1.0)), learner.evaluate(varied_batch(0)):
        pilot(**varied_batch(0))
    return learner.copilot.config.calibration["nll"]


def run(own_stream, kind="tokens"):
    """A plain loop: both models, what was looked at, and whether the optimizer's step came beside a round."""
    pilot, (config, adapter) = tiny_pilot(), KINDS[kind]
    learner = CopilotLearner(trained_like(pilot, config), pilot, 7, own_stream=own_stream, peft_config=adapter)
    optimizer, beside, found = torch.optim.AdamW(pilot.parameters(), 1e-2), [], []
    for i, look in enumerate([None, None, *LOOKS.values()]):
        with learner.observe(varied_batch(i)):
            loss = pilot(**varied_batch(i)).loss
        loss.backward()
        beside.append(learner.stream.is_pending)
        optimizer.step()
        optimizer.zero_grad()
        learner.step(measure=i == 1)
        found += [look(learner, pilot)] if look else []
    learner.close()
    return learner.exported(), pilot, found, beside


@pytest.mark.parametrize("kind", KINDS)
def test_the_results_are_those_of_one_stream(kind):
    """And there is no race, though a round is still under way when the Pilot's optimizer comes."""
    copilot, pilot, found, beside = run(False, kind)
    with pretended_streams() as streams:
        own_copilot, own_pilot, own_found, own_beside = run(True, kind)
    assert not streams.races and not any(beside) and own_beside == [False, True, True, *[False] * 4]
    (own,) = (stream for stream in streams.main.clock if not stream.is_main)  # the only other one
    assert own.clock[own] > 7 * 4 * 100  # operators of the Copilot's steps
    assert_same(copilot, own_copilot)
    assert_same(pilot, own_pilot)
    torch.testing.assert_close(own_found, found, rtol=0, atol=0)


def without_start(monkeypatch):
    """A round does not wait for what comes before it."""
    wait = Stream.wait_stream
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: self.is_main and wait(self, other))


def without_step(monkeypatch):
    """An optimizer does not wait for a round."""
    monkeypatch.setattr(OwnStream, "_before_step", lambda *_: None)


def without_look(name):
    def without(monkeypatch):
        raw = property(lambda learner: vars(learner)[f"_{name}"], BesideThePilot.__dict__[name].__set__)
        monkeypatch.setattr(BesideThePilot, name, raw)

    return without


@pytest.mark.slow
@pytest.mark.parametrize("without", [without_start, without_step, *map(without_look, LOOKS)], ids=lambda w: w.__name__)
def test_every_wait_is_needed(without, monkeypatch):
    without(monkeypatch)
    with pretended_streams() as streams:
        run(True, "an adapter")
    assert streams.races


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_memory_that_goes_back_too_early_is_seen(monkeypatch):
    """As it would, were the count of skipped steps, made before the first round, a new tensor after each."""
    start = CopilotLearner.start

    def with_more(self, steps):
        start(self, steps)
        self.more = torch.zeros(2)

    def drop(self, records):
        self.more = self.more + 1

    monkeypatch.setattr(CopilotLearner, "start", with_more)
    monkeypatch.setattr(CopilotLearner, "update", drop)
    with pretended_streams() as streams:
        run(True)
    assert streams.races == ["free"]


def test_all_that_a_round_writes_joins_by_itself(tmp_path):
    """Every attribute of a learner that holds weights, moments or sums; and both ways to save."""
    pilot = tiny_pilot()
    with pretended_streams():
        learner = CopilotLearner(trained_like(pilot), pilot, 4, own_stream=True, peft_config=LoraConfig(r=2))
        holders = nn.Module, CopilotOptimizer, RunningMetrics, TeacherForced
        names = {name for name, value in vars(learner).items() if isinstance(value, holders)}
        assert names == {f"_{name}" for name in LOOKS}
        for save in (save_weights, save_state):
            with learner.observe(varied_batch(0)):
                pilot(**varied_batch(0))
            learner.step()
            assert learner.stream.is_pending
            save(learner, tmp_path / "saved")
            assert not learner.stream.is_pending
        learner.close()


def test_a_learner_that_is_closed_leaves_optimizers_alone():
    before = list(global_hooks.values())
    with pretended_streams():
        run(True)
    assert list(global_hooks.values()) == before


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_cpu_waits_no_more_than_without(is_frozen):
    look, step, weights = waits_of_a_round("pilot", 4, is_frozen, own_stream=True)
    assert dict(look) == dict(step) == {"event": 1}
    assert torch.equal(weights, waits_of_a_round("pilot", 4, is_frozen)[2])


# ---- trainers -------------------------------------------------------------------------------------------------------


class WithEvaluation(CopilotTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, eval_dataset=addition(8, seed=1), **kwargs)


SETTINGS = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
SETTINGS |= {"load_best_model_at_end": True, "logging_steps": 3}


def test_in_a_trainer(tmp_path):
    """Logging, evaluation, saving, the best model: no race; the Pilot is the parent's; a resumed run goes on."""
    plain = train(WithEvaluation, CopilotSFTConfig, tmp_path / "plain", addition(32), **SETTINGS)
    with pretended_streams() as streams:
        settings = SETTINGS | {"copilot_own_stream": True}
        own = train(WithEvaluation, CopilotSFTConfig, tmp_path / "own", addition(32), **settings)
        checkpoint = tmp_path / "own" / "checkpoint-2"
        resumed = train(
            WithEvaluation, CopilotSFTConfig, tmp_path / "own", addition(32), resume_from=checkpoint, **settings
        )
    assert not streams.races
    for other in (own, resumed):
        assert_same(plain.copilot, other.copilot)
        assert_same(plain.model, other.model)


def test_a_trainer_does_not_join_before_it_must(tmp_path, monkeypatch):
    """Of the four steps after the first, the one after a log has no round beside it. The Pilot is the parent's."""
    joins, join = [], OwnStream._before_step

    def counted(self, *of_step):
        joins.append(self.is_pending)
        join(self, *of_step)

    monkeypatch.setattr(OwnStream, "_before_step", counted)
    settings = {"max_steps": 5, "logging_steps": 3}
    with pretended_streams() as streams:
        ours = train(CopilotTrainer, CopilotSFTConfig, tmp_path, addition(32), copilot_own_stream=True, **settings)
    assert not streams.races and sum(joins) == 3
    assert_same(ours.model, train(SFTTrainer, SFTConfig, tmp_path, addition(32), **settings).model)


@pytest.mark.parametrize("joins", [True, False])
def test_a_best_model_is_loaded_behind_the_last_round(tmp_path, joins, monkeypatch):
    settings = SETTINGS | {"max_steps": 2, "metric_for_best_model": "loss", "copilot_own_stream": True}
    with pretended_streams() as streams:
        trainer = train(WithEvaluation, CopilotSFTConfig, tmp_path, addition(32), **settings)
        observe(trainer.learner, trainer.model, varied_batch(0))
        trainer.learner.step()
        if not joins:
            monkeypatch.setattr(BesideThePilot, "join", lambda self: None)
        trainer._load_best_model()
        trainer.learner.stream.close()
    assert bool(streams.races) is not joins


# ---- where there can't be one ---------------------------------------------------------------------------------------


def test_without_cuda_it_would_do_nothing_and_raises(tmp_path):
    pilot = tiny_pilot()
    with pytest.raises(ValueError, match="not on CUDA: set copilot_own_stream=False"):
        CopilotLearner(trained_like(pilot), pilot, 4, own_stream=True)
    with pytest.raises(ValueError, match="not on CUDA"):
        train(CopilotTrainer, CopilotSFTConfig, tmp_path, addition(8), copilot_own_stream=True)


def test_several_processes_or_devices_raise(monkeypatch):
    pilot, in_parts = tiny_pilot(), tiny_pilot()
    in_parts.model.layers[0].to("meta")
    check_own_stream(pilot, has_streams=True, processes=1)
    for wrong, processes in ((pilot, 2), (in_parts, 1)):
        with pytest.raises(NotImplementedError, match="for one process and a Pilot that is whole, on one device"):
            check_own_stream(wrong, has_streams=True, processes=processes)
    learner = CopilotLearner(trained_like(pilot), pilot, own_stream=True)
    with pytest.raises(ValueError, match="not on CUDA"):
        learner.start(1)
    assert not learner.forced.tap.handles
    monkeypatch.setattr("hf_copilot.training.refusals.is_sharded", lambda _: True)
    with pytest.raises(NotImplementedError, match="a Pilot that is whole"):
        check_own_stream(pilot, has_streams=True, processes=1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optim": "lomo"}, "optim='lomo' changes the Pilot's weights outside of its step"),
        ({"optim": "schedule_free_adamw"}, "outside of its step"),
        ({"torch_compile_mode": "reduce-overhead", "copilot_torch_compile": True}, "share memory"),
    ],
)
def test_what_it_can_not_run_beside_raises(tmp_path, changes, match):
    with pytest.raises(NotImplementedError, match=match):
        train(CopilotTrainer, CopilotSFTConfig, tmp_path, addition(8), copilot_own_stream=True, **changes)

"""λ by teacher-forced NLL on held-out data: never worse there than the Pilot."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_learner import padded_batch
from test_seq2seq import make
from tiny import QUIET, addition, assert_same, tiny_pilot, tiny_seq2seq, tiny_tokenizer, trained_like
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_copilot import (
    CopilotConfig,
    CopilotLearner,
    CopilotLogitsProcessor,
    CopilotModel,
    CopilotSeq2SeqConfig,
    CopilotSeq2SeqTrainer,
    CopilotSFTConfig,
    CopilotTrainer,
)
from hf_copilot.model.discrepancy import fuse
from hf_copilot.model.fields import QUANTITIES
from hf_copilot.training.metrics import (
    STRENGTHS,
    UNCHOSEN_STRENGTH,
    calibrate_on_rows,
    choose_strength,
    empty_sums,
    say_if_little,
    sum_metrics,
)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(2, 9), st.sampled_from(["logit", "probability"]), st.integers(0, 99))
def test_sums_equal_the_fused_distribution(targets, vocabulary, fusion, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, correction = (torch.randn(targets, vocabulary, generator=generator) for _ in range(2))
    labels = torch.randint(vocabulary, (targets,), generator=generator)
    dropped = torch.rand(targets, generator=generator)
    sums = sum_metrics(logits, correction, labels, dropped, STRENGTHS, fusion)
    for strength, (nll, hits) in zip(STRENGTHS, sums[:-1].tolist(), strict=True):
        fused = fuse(logits.log_softmax(-1), correction, strength, fusion)
        expected = torch.nn.functional.cross_entropy(fused, labels, reduction="sum").item()
        assert nll == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert hits == (fused.argmax(-1) == labels).sum().item()
    assert sums[-1].tolist() == pytest.approx([dropped.sum().item(), targets])


@pytest.mark.parametrize("config", [CopilotConfig(), CopilotConfig.paper(num_hidden_layers=2)], ids=["ours", "paper"])
def test_the_best_strength_is_kept(pilot, config):
    copilot, batch = trained_like(pilot, config), padded_batch()
    learner = CopilotLearner(copilot, pilot)
    with learner.calibrate((0.5, 1.0), data="a batch"), torch.no_grad():
        for _ in range(2):
            with learner.evaluate(batch):
                pilot(**batch)
    found = copilot.config.calibration
    assert found["strengths"] == [0.0, 0.5, 1.0] and found["data"] == "a batch"
    assert copilot.config.strength == found["strength"] == found["strengths"][found["nll"].index(min(found["nll"]))]
    with torch.no_grad(), learner.evaluate(batch):
        pilot(**batch)
    metrics = learner.pop_metrics("eval")
    assert metrics["pilot_nll"] == pytest.approx(found["nll"][0])
    assert metrics["rectified_nll"] == pytest.approx(min(found["nll"])) and metrics["rectified_nll"] <= found["nll"][0]


def test_the_most_right_tokens_are_another_choice():
    """λ = 2 has the most hits, λ = 1 the least NLL; of equals in hits the one with less NLL is taken."""
    strengths, sums = (0.0, 1.0, 2.0, 3.0), torch.tensor([[9.0, 4], [7, 5], [8, 6], [9, 6], [0, 10]])
    by = {metric: choose_strength(sums, strengths, "", metric) for metric in QUANTITIES}
    assert [by["nll"]["strength"], by["token_accuracy"]["strength"]] == [1.0, 2.0]
    assert by["token_accuracy"] == by["nll"] | {"strength": 2.0, "metric": "token_accuracy"}


@pytest.mark.parametrize(
    ("nll", "metric", "said"),
    [
        ((9.0, 9.1), "nll", "No λ beats the Pilot alone on these 10 tokens"),
        ((9.0, 8.95), "nll", "The best λ, 0.5, takes the NLL of these 10 tokens from 0.9000 to 0.8950"),
        ((9.0, 8.5), "nll", ""),
        ((9.0, 9.5), "token_accuracy", ""),  # what is chosen is more hits, and there are
    ],
)
def test_a_gain_that_may_be_chance_is_said(nll, metric, said, caplog):
    with caplog.at_level(logging.WARNING):
        say_if_little(choose_strength(torch.tensor([[nll[0], 4], [nll[1], 5], [0, 10]]), (0.0, 0.5), "rows", metric))
    assert bool(caplog.text) == bool(said) and said in caplog.text


def test_a_reporter_that_has_closed_its_run_is_not_told(tmp_path):
    class Reporter(TrainerCallback):
        is_closed = False

        def on_train_end(self, args, state, control, **kwargs):
            self.is_closed = True

        def on_log(self, args, state, control, **kwargs):
            assert not self.is_closed

    trainer = make_trainer(tmp_path, addition(8, seed=1), copilot_strength="auto")
    trainer.add_callback(Reporter())
    trainer.train()
    assert trainer.copilot.config.calibration is not None
    assert "calibration_loss" in trainer.state.log_history[-1]


@pytest.mark.parametrize("strength, best", [(None, "nll"), ("auto", "nll"), ("auto_accuracy", "token_accuracy")])
def test_the_argument_names_the_metric(tmp_path, strength, best):
    trainer = make_trainer(tmp_path, addition(8, seed=1), copilot_strength=strength)
    trainer.train()
    found = trainer.copilot.config.calibration
    wanted = {"nll": min(found["nll"]), "token_accuracy": max(found["token_accuracy"])}[best]
    assert found["metric"] == best and found[best][found["strengths"].index(found["strength"])] == wanted
    trainer.save_model()
    assert {"nll": "least NLL", "token_accuracy": "highest token accuracy"}[best] in (
        tmp_path / "copilot" / "README.md"
    ).read_text()


def test_training_on_forgets_the_chosen_strength(pilot):
    """A Copilot that was switched off would else be measured, and saved, as the Pilot."""
    copilot = trained_like(pilot)
    copilot.config.strength, copilot.config.calibration = 0.0, {"strength": 0.0}
    CopilotLearner(copilot, pilot, num_training_steps=1)
    assert copilot.config.strength == 1.0 and copilot.config.calibration is None
    copilot.config.strength = 0.3  # of the user
    CopilotLearner(copilot, pilot, num_training_steps=1)
    assert copilot.config.strength == 0.3


def test_a_harmful_copilot_is_switched_off(pilot):
    copilot, batch = trained_like(pilot), padded_batch()
    learner = CopilotLearner(copilot, pilot)
    with learner.calibrate(), torch.no_grad(), learner.evaluate(batch):
        pilot(**batch)
    assert copilot.config.strength == 0.0  # random corrections
    assert CopilotLogitsProcessor(copilot, pilot).rectifier is None


def test_nothing_measured_raises(pilot):
    learner = CopilotLearner(trained_like(pilot), pilot)
    with pytest.raises(ValueError, match="No labelled token"), learner.calibrate():
        pass
    assert learner.copilot.config.strength == 1.0 and learner.calibrating is None
    with pytest.raises(ValueError, match="chosen by one of"), learner.calibrate(metric="loss"):
        pass
    with pytest.raises(ValueError, match="finite"), learner.calibrate((-1.0,)):
        pass
    with pytest.raises(ValueError, match="No labelled token"):
        choose_strength(empty_sums((0.0,)), (0.0,), "")


def make_trainer(folder, eval_dataset, copilot=None, **changes):
    args = {"max_steps": 4, "learning_rate": 1e-4, "copilot_learning_rate": 1e-2} | QUIET | changes
    return CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(output_dir=str(folder), **args),
        train_dataset=addition(64),
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        copilot=copilot,
    )


def test_auto_at_the_end_of_training(tmp_path, capsys):
    sets = {"a": addition(8, seed=1), "b": addition(4, seed=2)}
    trainer = make_trainer(tmp_path, sets, copilot_strength="auto", disable_tqdm=False)
    trainer.train()
    found = trainer.copilot.config.calibration
    assert found["data"] == "8 rows and 4 rows" and found["strengths"] == list(STRENGTHS)
    shown = capsys.readouterr().out
    assert f"NLL per token (λ = {found['strength']:g}" in shown and f"{min(found['nll']):.4f}" in shown
    assert f"token accuracy (λ = {found['strength']:g}" in shown and f"{found['token_accuracy'][0]:.1%}" in shown
    trainer.save_model()
    loaded = CopilotModel.from_pretrained(tmp_path / "copilot")
    assert loaded.config.strength == found["strength"] and loaded.config.calibration == found
    assert "had the least NLL" in (tmp_path / "copilot" / "README.md").read_text()
    if loaded.config.strength:
        with CopilotLogitsProcessor(loaded, trainer.model) as processor:
            assert processor.strength == found["strength"]
    again = make_trainer(tmp_path / "again", sets, copilot=loaded, copilot_strength="config")
    assert (loaded.config.strength, loaded.config.calibration) == (found["strength"], found)  # nothing trained yet
    again.train()
    assert (loaded.config.strength, loaded.config.calibration, loaded.config.results) == (1.0, None, None)


@pytest.mark.parametrize(("copilot", "strength"), [(None, UNCHOSEN_STRENGTH), (CopilotConfig(strength=0.3), 0.3)])
def test_without_a_labelled_token_no_strength_is_chosen(tmp_path, copilot, strength, caplog):
    """Nobody asked for a choice, so the end of a training is no place to raise."""
    unlabelled = Dataset.from_list([{"input_ids": [5, 6, 7], "completion_mask": [0, 0, 0]}] * 2)
    trainer = make_trainer(tmp_path, unlabelled, copilot)
    trainer.train()
    assert trainer.copilot.config.strength == strength and trainer.copilot.config.calibration is None
    assert f"λ is {strength}. It could not be chosen: No labelled token" in caplog.text


def test_choosing_leaves_the_pilot_in_its_type(tmp_path):
    """Full evaluation in half precision casts a Pilot that is not being trained, and leaves it so."""
    settings = {"bf16_full_eval": True, "max_steps": 2, "learning_rate": 1e-2}
    ours = make_trainer(tmp_path / "ours", addition(8, seed=1), **settings)
    theirs = SFTTrainer(
        model=tiny_pilot(),
        args=SFTConfig(output_dir=str(tmp_path / "theirs"), **(QUIET | settings)),
        train_dataset=addition(64),
        eval_dataset=addition(8, seed=1),
        processing_class=tiny_tokenizer(),
    )
    ours.train()
    theirs.train()
    assert ours.copilot.config.calibration is not None and ours.model.dtype == torch.float32
    assert_same(ours.model, theirs.model)
    assert ours.model.training == theirs.model.training and not ours.is_in_train
    ours.evaluate()
    assert ours.model.dtype == torch.bfloat16  # asked for


class ScheduleFree(torch.optim.SGD):
    """Has other weights while it is evaluated, and no schedule."""

    def train(self):
        self.set_mode(True)

    def eval(self):
        self.set_mode(False)

    def set_mode(self, trains: bool):
        for group in self.param_groups:
            if group.get("train_mode", False) != trains:
                group["train_mode"] = trains
                for parameter in group["params"]:
                    parameter.data += 1.0 if trains else -1.0


def test_choosing_leaves_a_schedule_free_optimizer_in_its_mode(tmp_path):
    trainer = make_trainer(tmp_path, addition(8, seed=1))
    trainer.optimizer = ScheduleFree(trainer.model.parameters(), lr=1e-4)
    trainer.train()
    assert trainer.copilot.config.calibration is not None
    assert all(group["train_mode"] for group in trainer.optimizer.param_groups)


class NeedsEvalLoss(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        assert metrics["eval_loss"] > 0


def test_callbacks_are_told_of_no_evaluation_that_nobody_asked_for(tmp_path):
    """Its metrics begin with `calibration_`, and most callbacks read `eval_loss`. They are logged."""
    trainer = make_trainer(tmp_path, addition(8, seed=1))
    trainer.add_callback(NeedsEvalLoss())
    trainer.train()
    assert trainer.copilot.config.calibration is not None
    assert any("calibration_loss" in entry for entry in trainer.state.log_history)
    trainer.evaluate()  # told of again


class Interrupts(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("asked", "strength"), [(None, UNCHOSEN_STRENGTH), ("config", 1.0)])
def test_what_is_saved_after_an_interruption_has_a_careful_strength(tmp_path, caplog, asked, strength):
    trainer = make_trainer(tmp_path, addition(8, seed=1), copilot_strength=asked)
    trainer.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.copilot.config.strength == strength
    assert ("ended before it was chosen" in caplog.text) == (asked is None)


def test_a_strength_that_was_chosen_outlives_a_call_that_trains_nothing(tmp_path):
    trainer = make_trainer(tmp_path, addition(8, seed=1))
    trainer.train()
    trainer.copilot.config.strength = 1.0  # as if it had been chosen
    with pytest.raises(ValueError, match="valid checkpoint"):
        trainer.train(resume_from_checkpoint="mistyped")
    assert trainer.copilot.config.strength == 1.0


def test_workers_that_go_on_do_not_keep_the_evaluation_set(tmp_path):
    """Trainer gives their loader out again, for any data set."""
    expected = make_trainer(tmp_path, addition(8, seed=1)).calibrate(addition(4, seed=2))["targets"]
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer(tmp_path, addition(8, seed=1), **workers)
    trainer.evaluate()
    assert trainer.calibrate(addition(4, seed=2))["targets"] == expected
    assert trainer.args.dataloader_persistent_workers


class FailsAtTheEnd(TrainerCallback):
    def on_prediction_step(self, args, state, control, **kwargs):
        raise KeyError("eval_loss")


def test_a_callback_that_fails_at_the_end_does_not_lose_the_training(tmp_path, caplog, monkeypatch):
    """Nobody asked for this evaluation; who asks is told."""
    trainer = make_trainer(tmp_path, addition(8, seed=1))
    trainer.add_callback(FailsAtTheEnd())
    trainer.train()
    assert trainer.copilot.config.strength == UNCHOSEN_STRENGTH
    assert "could not be chosen: 'eval_loss'" in caplog.text and "Traceback" in caplog.text
    with pytest.raises(KeyError, match="eval_loss"):
        trainer.calibrate()
    monkeypatch.setattr("hf_copilot.training.trainer.num_processes", lambda: 2)
    with pytest.raises(KeyError, match="eval_loss"):
        trainer.train()  # of several processes one may fail alone, and others wait for it
    assert trainer.learner.calibrating is None


@pytest.mark.parametrize(
    ("copilot", "changes", "strength"),
    [
        (None, {}, UNCHOSEN_STRENGTH),
        (None, {"copilot_strength": "config"}, 1.0),
        (CopilotConfig(strength=0.3), {}, 0.3),
        (CopilotConfig.paper(num_hidden_layers=2), {}, 1.0),
    ],
    ids=["nobody", "left as it is", "given", "the paper's"],
)
def test_a_strength_that_nobody_can_choose(tmp_path, copilot, changes, strength, caplog):
    """It is said, what is resumed from has it, and one that was chosen before is forgotten."""
    settings = changes | {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, None, copilot, **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.copilot.config.strength == strength and trainer.copilot.config.calibration is None
    assert (f"λ is {UNCHOSEN_STRENGTH}" in caplog.text) is (strength == UNCHOSEN_STRENGTH)
    resumed = make_trainer(tmp_path, None, copilot, **settings)
    for _ in range(2):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed.copilot.config.strength == strength
    resumed.calibrate(addition(6, seed=4), strengths=(2.0,))
    resumed.train()
    assert resumed.copilot.config.strength == (UNCHOSEN_STRENGTH if strength == 0.3 else strength)


def test_calibrating_on_another_set_when_asked(tmp_path):
    trainer = make_trainer(tmp_path, None)
    with pytest.raises(ValueError, match="needs a data set"):
        trainer.calibrate()
    assert trainer.calibrate(addition(6, seed=4), strengths=(1.0,))["targets"] > 6
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer(tmp_path, None, copilot_strength="auto")
    named = make_trainer(tmp_path, {"a": addition(8, seed=1), "b": addition(4, seed=2)})
    assert named.calibrate("b")["data"] == "4 rows"


def test_on_rows_without_a_trainer_it_is_the_same(tmp_path):
    trainer = make_trainer(tmp_path, addition(8, seed=1))
    trainer.train()
    expected = trainer.calibrate(metric="token_accuracy")
    results, copilot = trainer.copilot.config.results, trainer.copilot
    copilot.config.forget_results()
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in trainer.eval_dataset]
    found = calibrate_on_rows(trainer.model, copilot, rows, data="8 rows", metric="token_accuracy")
    assert {k: v for k, v in found.items() if k != "nll"} == {k: v for k, v in expected.items() if k != "nll"}
    assert found["nll"] == pytest.approx(expected["nll"], abs=1e-5)
    assert copilot.config.strength == found["strength"] and copilot.config.results == pytest.approx(results, abs=1e-5)


def test_calibrating_generates_nothing(tmp_path, monkeypatch):
    pilot = tiny_seq2seq()
    monkeypatch.setattr(type(pilot), "generate", lambda *args, **kwargs: pytest.fail("generated"))
    settings = {"predict_with_generate": True, "copilot": trained_like(pilot)}
    trainer = make(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path, pilot, **settings)
    assert trainer.calibrate()["nll"][0] > 0

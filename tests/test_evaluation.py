"""Side by side: labelled rows, answers, paired intervals, answers during training."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import QUIET, addition, assert_same, sums, tiny_pilot, tiny_seq2seq, tiny_tokenizer, trained_like
from tokenizers.decoders import Fuse
from tokenizers.processors import TemplateProcessing
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.utils import logging

from hf_copilot import (
    CopilotLogitsProcessor,
    CopilotSeq2SeqConfig,
    CopilotSeq2SeqTrainer,
    CopilotSFTConfig,
    CopilotTrainer,
    RectifiedGeneration,
)
from hf_copilot.evaluation.comparison import compare, compare_answers, compare_likelihoods, matches, table_of
from hf_copilot.evaluation.rectified_generation import markdown
from hf_copilot.evaluation.rows import as_ids, expected_answer, generate_answers, label_row
from hf_copilot.training.trainer import logger

# ---- rows -----------------------------------------------------------------------------------------------------------


def sft(folder, pilot=None, trainer_class=CopilotTrainer, **changes) -> CopilotTrainer:
    settings = QUIET | {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2}
    return trainer_class(
        model=pilot or tiny_pilot(attention_dropout=0.1),
        args=CopilotSFTConfig(output_dir=str(folder), **(settings | changes)),
        train_dataset=addition(32),
        eval_dataset=addition(8, seed=1),
        processing_class=tiny_tokenizer(),
    )


def test_rows_are_labelled_as_the_trainer_labels_them(tmp_path):
    made = sft(tmp_path).eval_dataset
    for row, own in zip(addition(8, seed=1), made, strict=True):
        found = label_row(tiny_tokenizer(), row, has_encoder=False)
        assert found["input_ids"] == own["input_ids"]
        assert found["labels"] == own["labels"]
    assert label_row(tiny_tokenizer(), addition(1)[0], has_encoder=True)["labels"][-1] == 2


def test_figures_are_those_of_the_trainers_evaluation(tmp_path):
    trainer = sft(tmp_path)
    trainer.train()
    metrics, pilot = trainer.evaluate(), trainer.model.eval()
    strength, rows = trainer.copilot.config.strength, list(addition(8, seed=1))
    nll, accuracy = compare_likelihoods(pilot, trainer.copilot, tiny_tokenizer(), rows, strength)
    for found, name in ((nll, "nll"), (accuracy, "token_accuracy")):
        assert found.pilot == pytest.approx(metrics[f"eval_pilot_{name}"], abs=1e-4)
        assert found.rectified == pytest.approx(metrics[f"eval_rectified_{name}"], abs=1e-4)


def test_an_evaluation_past_the_copilot_says_so(tmp_path, caplog):
    class Own(CopilotTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            with torch.no_grad():
                return model(**inputs).loss, None, None

    trainer = sft(tmp_path, trainer_class=Own)
    logger.warning_once.cache_clear()  # another test may have been told
    logging.enable_propagation()
    metrics = trainer.evaluate()
    logging.disable_propagation()
    assert "eval_rectified_nll" not in metrics and "prediction_step of your own" in caplog.text


# ---- comparison -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_the_interval_is_the_bootstraps(weighted):
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(300, generator=generator)
    weights = torch.randint(1, 6, (300,), generator=generator).float() if weighted else None
    after = before + 0.2 * torch.rand(300, generator=generator) + 0.1  # far less spread than either
    if weighted:
        after += weights  # longer rows gain more
    low, high = compare("", before, after, weights).interval
    drawn = torch.randint(300, (4000, 300), generator=generator)
    total = (torch.ones(300) if weights is None else weights)[drawn].sum(1)
    differences = (after - before)[drawn].sum(1) / total
    for end, share in ((low, 0.025), (high, 0.975)):
        assert end == pytest.approx(differences.quantile(share).item(), abs=0.15 * (high - low))


def test_without_anything_to_measure_it_raises():
    with pytest.raises(ValueError, match="no row has a labelled token"):
        compare("NLL", torch.zeros(2), torch.zeros(2), torch.zeros(2))


def test_without_a_spread_there_is_no_interval():
    same = torch.tensor([1.0, 0.0, 1.0])
    assert compare("right", same, same).interval is None
    assert compare("right", same[:1], 1 - same[:1]).interval is None
    assert table_of("title", [compare("right", same, same, form=".1%")]).row_count == 1


def test_answers_are_compared_by_their_last_match():
    answers, expected = ["1 #### 2 #### 3", "#### 4", "5"], ["#### 3", "#### 5", "#### 5"]
    assert matches(answers, expected, "#### (.*?)(?= ####|$)").tolist() == [1.0, 0.0, 0.0]
    assert matches(["none", "a 5"], ["5", "5"], "none|([0-9])").tolist() == [0.0, 1.0]  # a match without its group


def test_an_end_token_is_no_part_of_an_answer():
    """Be it of the completion's text, or one that the tokenizer adds behind a prompt."""
    tokenizer, row = tiny_tokenizer(), {"prompt": "1+1=", "completion": "42<eos>"}
    assert expected_answer(tokenizer, row) == tokenizer.decode(tokenizer("42")["input_ids"])
    plain = as_ids(tokenizer, "1+1=", has_encoder=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 2)])
    assert tokenizer("1+1=")["input_ids"] == [*plain, 2]
    assert as_ids(tokenizer, "1+1=", has_encoder=False) == plain
    assert as_ids(tokenizer, "1+1=<eos>", has_encoder=False) == [*plain, 2]
    assert as_ids(tokenizer, "", has_encoder=False) == [2]  # which may be the token that texts begin with
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        label_row(tokenizer, row, has_encoder=True)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_prompt_without_a_token_raises_in_any_batch(pilot, batch_size):
    with pytest.raises(ValueError, match="without a token"):
        generate_answers(pilot, tiny_tokenizer(), ["1+1=", ""], None, batch_size=batch_size, max_new_tokens=2)


def test_texts_of_an_encoder_decoder_are_cut_where_its_tokenizer_says(caplog):
    """What is read ends with the end token anyway; what is written does not end where it is cut."""
    tokenizer, row = tiny_tokenizer(), {"prompt": "1" * 600, "completion": "2" * 600}
    whole, end = label_row(tokenizer, row, has_encoder=True), tokenizer.eos_token_id
    assert [len(ids) for ids in whole.values()] == [601, 601] and not caplog.text
    tokenizer.model_max_length = 8
    prompt, labels = label_row(tokenizer, row, has_encoder=True).values()
    assert prompt == [*whole["input_ids"][:7], end] and labels == whole["labels"][:8]
    assert "more than 8 tokens are cut" in caplog.text
    short = label_row(tokenizer, {"prompt": "1234567", "completion": "7"}, has_encoder=True)
    assert [len(ids) for ids in short.values()] == [8, 2] and {ids[-1] for ids in short.values()} == {end}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_answers_of_both_are_counted(family):
    pilot = (tiny_seq2seq() if family == "t5" else tiny_pilot()).eval()
    copilot, tokenizer, rows = trained_like(pilot), tiny_tokenizer(), list(addition(4))
    tokenizer.backend_tokenizer.decoder = Fuse()  # a text's tokens give the text
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        prompts = [row["prompt"] for row in rows]
        said = generate_answers(pilot, tokenizer, prompts, processor, max_new_tokens=4, do_sample=False)
    rows = [row | {"completion": answer} for row, answer in zip(rows, said, strict=True)]
    found = compare_answers(pilot, copilot, tokenizer, rows, 1.0, "(?s)(.*)", max_new_tokens=4)
    assert found.rectified == sum(bool(answer.strip()) for answer in said) / 4 > found.pilot


# ---- answers during training ----------------------------------------------------------------------------------------


def draws(answer: str, expected: str) -> bool:
    """A user's function that draws from the global random state."""
    return bool(torch.rand(()) < 0.5)


def run(folder, callback: bool, **changes) -> CopilotTrainer:
    trainer = sft(folder, **changes)
    if callback:
        trainer.add_callback(RectifiedGeneration(trainer, addition(3, seed=1), draws, max_new_tokens=4))
    trainer.train()
    return trainer


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": False, "bf16": True}], ids=["float32", "bf16"])
def test_training_is_what_it_is_without_bit_for_bit(tmp_path, changes):
    without, watched = (run(tmp_path, callback, **changes) for callback in (False, True))
    assert_same(without.model, watched.model)
    assert_same(without.copilot, watched.copilot)
    shares = [entry for entry in watched.state.log_history if "eval_rectified_right_answers" in entry]
    assert [entry["step"] for entry in shares] == [2, 4] and watched.learner.log.nbytes == without.learner.log.nbytes


def test_the_shares_are_those_of_the_answers(tmp_path):
    """By a function of the user's, once in a step; metrics that the best model may be kept by."""
    trainer = sft(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rectified_right_answers",
        greater_is_better=True,
    )
    seen = []
    rows = list(addition(3, seed=1))
    trainer.processing_class.backend_tokenizer.decoder = Fuse()  # a text's tokens give the text
    callback = RectifiedGeneration(trainer, rows, lambda said, expected: seen.append((said, expected)) or True)
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.best_metric == 1.0
    assert len(seen) == 2 * 2 * 3 and {expected for _, expected in seen} == {row["completion"] for row in rows}
    before = len(seen)
    trainer.calibrate()
    assert len(seen) == before
    metrics = trainer.evaluate()  # the best model, at the λ that was chosen
    assert metrics["eval_rectified_right_answers"] == 1.0 and len(seen) == before + 2 * 3
    trainer.model.train()
    alone, both = callback.generate()
    assert trainer.model.training and len(alone) == len(both) == 3
    with CopilotLogitsProcessor(trainer.copilot, trainer.model.eval()) as processor:
        prompts = [row["prompt"] for row in rows]
        tokenizer = trainer.processing_class
        expected = generate_answers(trainer.model, tokenizer, prompts, processor, max_new_tokens=64, do_sample=False)
    assert both == expected


def test_the_table_is_everywhere_that_the_run_reports_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run(tmp_path, True, report_to=["tensorboard", "trackio"], project="answers", disable_tqdm=False)
    assert "Answers at step 2" in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in events.Tensors("eval/answers/text_summary")] == [2, 4]
    assert b"Pilot + Copilot" in events.Tensors("eval/answers/text_summary")[0].tensor_proto.string_val[0]
    assert "eval/rectified_right_answers" in events.Tags()["scalars"]
    database = Path(os.environ["TRACKIO_DIR"]) / "answers.db"
    rows = [json.loads(row) for (row,) in sqlite3.connect(database).execute("SELECT metrics FROM metrics")]
    assert "eval/answers" in set().union(*rows)


def test_it_is_bounded_in_time(tmp_path, caplog):
    trainer = sft(tmp_path)
    callback = RectifiedGeneration(trainer, addition(3), max_new_tokens=200, max_seconds=1e-3)
    logging.enable_propagation()
    with caplog.at_level("WARNING"):
        answers = callback.generate()
    logging.disable_propagation()
    assert max(len(text) for said in answers for text in said) < 50
    assert "Some answers may be cut short" in caplog.text


def test_beside_an_encoder_decoder(tmp_path):
    trainer = CopilotSeq2SeqTrainer(
        model=tiny_seq2seq(),
        args=CopilotSeq2SeqConfig(output_dir=str(tmp_path), max_steps=2, **QUIET),
        train_dataset=sums(16),
        eval_dataset=sums(4),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        processing_class=tiny_tokenizer(),
    )
    trainer.add_callback(RectifiedGeneration(trainer, addition(3), max_new_tokens=4))
    trainer.train()
    assert "eval_rectified_right_answers" in trainer.evaluate()


def test_what_it_can_not_answer_raises(tmp_path, monkeypatch):
    trainer = sft(tmp_path)
    with pytest.raises(ValueError, match="needs rows, each with a text"):
        RectifiedGeneration(trainer, [])
    with pytest.raises(ValueError, match="needs rows, each with a text"):
        RectifiedGeneration(trainer, [{"prompt": [{"role": "user", "content": "?"}], "completion": "!"}])
    trainer.processing_class, tokenizer = None, trainer.processing_class
    with pytest.raises(ValueError, match="processing_class="):
        RectifiedGeneration(trainer, addition(1))
    trainer.processing_class = tokenizer
    plain = Trainer(model=tiny_pilot(), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    with pytest.raises(TypeError, match="not a Trainer"):
        RectifiedGeneration(plain, addition(1))
    trainer.add_callback(RectifiedGeneration(trainer, addition(1)))
    monkeypatch.setattr("hf_copilot.evaluation.rectified_generation.is_sharded", lambda pilot: True)
    with pytest.raises(NotImplementedError, match="hf-copilot eval"):
        trainer.train()


def test_markdown_in_an_answer_is_not_read_as_such():
    text = markdown([("a | b", "`c`", "*d*\n| e", "")])
    assert text.splitlines()[-1] == "| `a / b` | `'c'` | `*d* / e` | `` |"

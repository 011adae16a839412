"""The table of docs/compatibility.md is true: every row names a test that exists, and what raises does raise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from peft import PromptTuningConfig, get_peft_model
from tiny import QUIET, addition, tiny_pilot, tiny_seq2seq, tiny_tokenizer, trained_like
from transformers import TrainingArguments

from hf_copilot import CopilotCallback, CopilotLogitsProcessor, CopilotSFTConfig, CopilotTrainer
from hf_copilot.pilot.compatibility import check_trainer

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "compatibility.md").read_text(encoding="utf-8")
ROWS = [line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| what")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_row_names_a_test(row):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
    assert len(named) == 1
    tree = ast.parse((TESTS / named[0][0]).read_text(encoding="utf-8"))
    assert named[0][1] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def make_trainer(folder) -> CopilotTrainer:
    return CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(output_dir=str(folder), **QUIET),
        train_dataset=addition(8),
        processing_class=tiny_tokenizer(),
    )


class Sharded:
    """Stands for a ParallelismConfig over two processes."""

    non_data_parallel_size = 2


@pytest.mark.parametrize(
    ("owner", "attribute", "value", "message"),
    [
        ("trainer", "is_fsdp_enabled", True, "use FSDP2"),
        ("trainer", "is_deepspeed_enabled", True, "DeepSpeed"),
        ("trainer", "_is_vlm", True, "vision-language"),
        ("trainer", "model_init", tiny_pilot, "model_init"),
        ("state", "parallelism_config", Sharded, "context, sequence or tensor parallelism"),
    ],
)
def test_unsupported_training_raises(tmp_path, monkeypatch, owner, attribute, value, message):
    """The set-ups themselves need several GPUs: only what the constructor looks at is set."""
    trainer = make_trainer(tmp_path)
    owners = {"trainer": trainer, "state": trainer.accelerator.state}
    monkeypatch.setattr(owners[owner], attribute, value, raising=False)
    with pytest.raises(NotImplementedError, match=message):
        check_trainer(trainer, None)


def test_an_encoder_decoder_in_the_trainer_of_decoders_raises(tmp_path):
    with pytest.raises(NotImplementedError, match="use CopilotSeq2SeqTrainer for T5"):
        CopilotTrainer(
            model=tiny_seq2seq(),
            args=CopilotSFTConfig(output_dir=str(tmp_path), **QUIET),
            train_dataset=addition(8),
            processing_class=tiny_tokenizer(),
        )


def test_data_parallel_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="DataParallel"):
        make_trainer(tmp_path)


def test_the_callback_in_several_processes_raises(tmp_path, monkeypatch):
    args = TrainingArguments(output_dir=str(tmp_path), **QUIET)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(NotImplementedError, match="plain `python`"):
        CopilotCallback().on_train_begin(args, None, None, model=tiny_pilot())


def test_virtual_tokens_raise_in_generation(pilot):
    copilot = trained_like(pilot)
    tuned = get_peft_model(pilot, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        CopilotLogitsProcessor(copilot, tuned)

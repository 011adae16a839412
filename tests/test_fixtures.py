"""What earlier releases wrote still loads, generates and resumes (CONTRIBUTING.md, "What users rely on").

python tests/test_fixtures.py VERSION     # before a change of what is on disk: writes fixtures/VERSION
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import QUIET, T5_SHAPE, addition, sums, tiny_pilot, tiny_tokenizer
from transformers import DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration

from hf_copilot import (
    CopilotConfig,
    CopilotLogitsProcessor,
    CopilotModel,
    CopilotSeq2SeqConfig,
    CopilotSeq2SeqTrainer,
    CopilotSFTConfig,
    CopilotTrainer,
)

FOLDER = Path(__file__).with_name("fixtures")
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "initializer_range": 0.02}
KEPT = 2  # the step whose checkpoint is a fixture
STEPS = 4


def small_t5() -> T5ForConditionalGeneration:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return T5ForConditionalGeneration(T5Config(**(T5_SHAPE | {"d_model": 16, "d_ff": 16, "num_layers": 2})))


def small_llama():
    return tiny_pilot(**SMALL)


RUNS = {
    "tokens": (small_llama, {}),
    "states_with_adapters": (
        small_llama,
        {
            "copilot": CopilotConfig(memory="pilot"),
            "peft_config": LoraConfig(r=2),
            "copilot_peft_config": LoraConfig(r=2),
        },
    ),
    "paper": (small_llama, {"copilot": CopilotConfig.paper()}),
    "t5": (small_t5, {}),
}


def make_trainer(name: str, folder: Path):
    make_pilot, more = RUNS[name]
    trainer_class, config_class, rows = CopilotTrainer, CopilotSFTConfig, addition(32)
    if name == "t5":
        trainer_class, config_class, rows = CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, sums(32)
        more = {"data_collator": DataCollatorForSeq2Seq(tiny_tokenizer())}
    args = config_class(
        output_dir=str(folder),
        max_steps=STEPS,
        logging_steps=1,
        save_steps=KEPT,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        copilot_learning_rate=1e-2,
        copilot_strength="config",
        **(QUIET | {"save_strategy": "steps"}),
    )
    return trainer_class(model=make_pilot(), args=args, train_dataset=rows, processing_class=tiny_tokenizer(), **more)


def losses(trainer) -> list[dict[str, float]]:
    """Of the steps after the checkpoint."""
    names = ("loss", "copilot_loss", "pilot_nll", "rectified_nll")
    logs = [entry for entry in trainer.state.log_history if "rectified_nll" in entry and entry["step"] > KEPT]
    return [{name: entry[name] for name in names} for entry in logs]


@torch.no_grad()
def correction(copilot: CopilotModel, name: str) -> list[float]:
    """f of the fourth token after a prompt, beside a Pilot with its first weights."""
    pilot, ids = RUNS[name][0]().eval(), torch.arange(5, 11)[None]
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        pilot.generate(ids, logits_processor=[processor], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        return processor.rectifier.last_correction[0].tolist()


VERSIONS = sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_copilot_of_an_earlier_release_loads(version, name):
    expected = json.loads((FOLDER / version / name / "expected.json").read_text())
    copilot = CopilotModel.from_pretrained(FOLDER / version / name / f"checkpoint-{KEPT}" / "copilot")
    assert max(map(abs, expected["correction"])) > 1e-3  # else this says nothing
    assert correction(copilot, name) == pytest.approx(expected["correction"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_checkpoint_of_an_earlier_release_resumes(version, name, tmp_path, caplog):
    expected = json.loads((FOLDER / version / name / "expected.json").read_text())
    shutil.copytree(FOLDER / version / name / f"checkpoint-{KEPT}", tmp_path / f"checkpoint-{KEPT}")
    trainer = make_trainer(name, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    for found, then in zip(losses(trainer), expected["losses"], strict=True):
        assert found == pytest.approx(then, rel=2e-3)


def write(version: str) -> None:
    for name in RUNS:
        folder = FOLDER / version / name
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as run:
            trainer = make_trainer(name, Path(run))
            trainer.train()
            kept = Path(run) / f"checkpoint-{KEPT}"
            shutil.copytree(kept, folder / kept.name)
        copilot = CopilotModel.from_pretrained(folder / kept.name / "copilot")
        expected = {"losses": losses(trainer), "correction": correction(copilot, name)}
        (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    write(sys.argv[1])

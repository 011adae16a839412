"""The versions that are named in one place are those that are tested in another, and no recipe uses an old name."""

from __future__ import annotations

import re
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from tiny import QUIET, addition, sums, tiny_pilot, tiny_seq2seq, tiny_tokenizer
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_copilot import (
    CopilotCallback,
    CopilotSeq2SeqConfig,
    CopilotSeq2SeqTrainer,
    CopilotSFTConfig,
    CopilotTrainer,
)
from hf_copilot.version import TESTED_TRANSFORMERS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
OPTIONAL = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
TELL_OF_THEM = {ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "common.py"}  # the latter takes the installed name


def pins(name: str) -> dict[str, Version]:
    """The versions of a constraints file, by library."""
    lines = (ROOT / ".ci" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(library): Version(number) for library, number in pairs}


def floor(requirement: Requirement) -> Version:
    (lowest,) = [limit.version for limit in requirement.specifier if limit.operator == ">="]
    return Version(lowest)


def test_the_lowest_versions_are_the_floors_of_the_project():
    assert pins("lowest") == {canonicalize_name(library.name): floor(library) for library in NEEDED}


def test_everything_that_can_be_installed_is_pinned_and_allowed():
    tested = pins("tested")
    assert all(library.specifier.contains(tested[canonicalize_name(library.name)]) for library in NEEDED + OPTIONAL)


def test_errors_name_the_tested_versions():
    assert tuple(str(pins(name)["transformers"]) for name in ("lowest", "tested")) == TESTED_TRANSFORMERS


def test_the_commands_of_the_readme_install_the_tested_versions():
    commands = re.findall(r"```bash\n(pip install .*)\n```", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(commands) == 2 and all("-c .ci/tested.txt" in command for command in commands)


@pytest.mark.parametrize("folder", ["recipes", "docs", "benchmarks", "model_cards", "."])
def test_no_page_shows_a_name_that_transformers_changed(folder):
    found = (ROOT / folder).glob("*" if folder == "." else "**/*")
    pages = [path for path in found if path.suffix in (".py", ".yaml", ".md") and path not in TELL_OF_THEM]
    assert pages
    old = re.compile(r"\b(gradient_checkpointing|past_key_values)\b")
    assert not [path.name for path in pages if old.search(path.read_text(encoding="utf-8"))]


def trained_by_callback(*args, **kwargs) -> Trainer:
    return Trainer(*args, **kwargs, callbacks=[CopilotCallback()])


SFT, SEQ2SEQ = (SFTTrainer, SFTConfig), (Seq2SeqTrainer, Seq2SeqTrainingArguments)


def future_warnings(trainer_class, config_class, folder, pilot, rows) -> set[str]:
    """What a short run says will go."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = config_class(str(folder), max_steps=2, eval_strategy="steps", eval_steps=1, **QUIET)
        data = {"train_dataset": rows, "eval_dataset": rows.select(range(2)), "processing_class": tiny_tokenizer()}
        trainer = trainer_class(pilot, args, **data)
        trainer.train()
        trainer.save_model()
    return {str(warning.message) for warning in caught if issubclass(warning.category, FutureWarning)}


@pytest.mark.parametrize(
    ("ours", "parents", "pilot", "rows"),
    [
        ((CopilotTrainer, CopilotSFTConfig), SFT, tiny_pilot, addition),
        ((CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig), SEQ2SEQ, tiny_seq2seq, sums),
        ((trained_by_callback, TrainingArguments), (Trainer, TrainingArguments), tiny_seq2seq, sums),
    ],
    ids=["sft", "seq2seq", "callback"],
)
def test_nothing_warns_of_what_the_parent_does_not(tmp_path, ours, parents, pilot, rows):
    said = [future_warnings(*classes, tmp_path, pilot(), rows(8)) for classes in (ours, parents)]
    assert said[0] == said[1]

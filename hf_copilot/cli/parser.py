"""Arguments as in TRL's scripts: dataclasses, a YAML file by `--config`, and help that fits on a screen."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments
from trl import TrlParser
from yaml import YAMLError

from ..training.training_args import FIXED_STRENGTH as IN_PYTHON

WIDTH = 100
# of transformers' own arguments, what `--help` shows of every training
TRAINING = ("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate")
TRAINING += ("gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "bf16", "use_cpu", "seed")
# of arguments of the libraries, whose own help is not true here
HELP = {
    "dataset_name": "The rows: a JSON Lines file, a folder with one for each split, or a Hub id.",
    "dataset_config": "Configuration of a data set on the Hub.",
    "dataset_train_split": "Split to train on; rows for evaluation are taken from it.",
    "dataset_test_split": "Split that is answered after training; of a single file it is the last tenth.",
    "resume_from_checkpoint": "A checkpoint's folder to go on from; true takes the newest in output_dir.",
}
FIXED_STRENGTH = " (a fixed λ: --copilot_strength config --copilot_config '{strength: 0.5}')"


class Parser(TrlParser):
    """[`trl.TrlParser`] that shows chosen arguments, takes the first ones by position, and says errors in a sentence.

    Args:
        prog: The command, `hf-copilot eval`.
        description: What it does.
        dataclasses: Of its arguments.
        shown: The arguments that `--help` shows, by title; the others are shown by `--help_all`.
        positions: Names of arguments that may be given by position, in order.
        examples: Command lines.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        dataclasses: Sequence[type],
        shown: Mapping[str, Iterable[str]],
        positions: Sequence[str] = (),
        examples: Sequence[str] = (),
    ):
        super().__init__(dataclasses, prog=prog, description=description)
        self.fields = {field.name: field for dataclass in dataclasses for field in fields(dataclass)}
        self.shown, self.positions, self.examples = shown, positions, examples

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses. Ends the process with 2 and a sentence where that can't be, with 0 after help."""
        argv = [part for argument in argv for part in in_words(argument)]
        if "--help_all" in argv:
            sys.stdout.write(super().format_help())
            self.exit()
        if argv[-1:] == ["--config"]:
            self.error("--config needs a file")
        named = next((i for i, argument in enumerate(argv) if argument.startswith("-")), len(argv))
        if named > len(self.positions):
            self.error(f"{argv[len(self.positions)]!r} is one argument too many")
        given = [
            part for name, value in zip(self.positions, argv[:named], strict=False) for part in (f"--{name}", value)
        ]
        try:
            return self.parse_args_and_config(given + argv[named:], fail_with_unknown_args=True)
        except (ValueError, OSError, YAMLError) as error:
            self.error(in_a_line(error))

    def error(self, message: str) -> None:
        is_about_it = "copilot_strength" in message and "copilot_strength" in self.fields
        hint = FIXED_STRENGTH if is_about_it else ""
        self.exit(
            2, f"{self.prog}: {message.removesuffix(IN_PYTHON)}{hint} ({self.prog} --help lists the arguments)\n"
        )

    def format_help(self) -> str:
        places = "".join(f" {name.upper()}" for name in self.positions)
        parts = [f"usage: {self.prog}{places} [--config FILE] [--argument VALUE ...]", self.description]
        parts += ["\n".join(f"    {example}" for example in self.examples)] if self.examples else []
        for title, names in self.shown.items():
            parts.append("\n".join([f"{title}:", *(describe(self.fields[name]) for name in names)]))
        hidden = len(self.fields) - len({name for names in self.shown.values() for name in names})
        if hidden:
            parts.append(f"{hidden} more, those of the libraries, are shown by --help_all.")
        return "\n\n".join(textwrap.fill(part, WIDTH) if "\n" not in part else part for part in parts) + "\n"


def in_words(argument: str) -> list[str]:
    """`--config=FILE` is two for TrlParser."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def describe(field: Field) -> str:
    """An argument's name, default and help."""
    text = HELP.get(field.name) or field.metadata.get("help", "")
    text = text[0] if isinstance(text, list | tuple) else text
    text = text.split(". ")[0].rstrip(".") + "." if len(text) > 160 else text
    default = field.default if field.default is not MISSING else None
    if default not in (None, "", False):
        text += f" [{default}]"
    first = f"  --{field.name}  "
    return textwrap.fill(text, WIDTH, initial_indent=first.ljust(26), subsequent_indent=" " * 26)


def check_least(arguments: Any, **least: int) -> None:
    """Raise a `ValueError` for an argument that is below its least value."""
    for name, lowest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise ValueError(f"--{name} {value}: it is at least {lowest}.")


def check_choices(arguments: Any) -> None:
    """Raise a `ValueError` for a value that is none of its field's choices, as one of a YAML file may be."""
    for option in fields(arguments):
        choices, value = option.metadata.get("choices"), getattr(arguments, option.name)
        if choices is not None and value not in choices:
            raise ValueError(f"{option.name}={value!r}: choose one of {choices}.")


def resume_from(args: TrainingArguments) -> str | bool | None:
    """`resume_from_checkpoint`, which on a command line is a text: a folder, or whether to take the newest."""
    asked = args.resume_from_checkpoint
    return True if asked in ("True", "true") else asked


def in_a_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__

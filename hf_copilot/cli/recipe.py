"""What `sft` and `seq2seq` are asked for beside TRL's own arguments: the rows' form, a Pilot from scratch, answers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments
from yaml import YAMLError

from ..evaluation.comparison import matches
from ..evaluation.rows import label_row
from ..model.configuration_copilot import CopilotConfig
from .chats import to_answers
from .data import COMPLETION, PROMPT, load_rows
from .parser import check_choices, check_least, in_a_line

MOST_VALIDATION_ROWS = 200


@dataclass
class RowArguments:
    """How a row becomes a prompt and a completion."""

    prompt: str = field(
        default=PROMPT,
        metadata={
            "help": "Prompt, a format string over a row's fields; \\n is a line break. Rows of `messages`, or whose "
            "`prompt` and `completion` are messages, need none."
        },
    )
    completion: str = field(default=COMPLETION, metadata={"help": "Completion, likewise."})


@dataclass
class AnswerArguments(RowArguments):
    """How answers are generated and compared."""

    answer_pattern: str = field(
        default="(?s)(.*)", metadata={"help": "Regular expression whose last match in an answer is compared."}
    )
    generate_rows: int = field(default=200, metadata={"help": "Test rows answered by generation; 0 for none."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    num_beams: int = field(default=1, metadata={"help": "Beams in generation."})

    def __post_init__(self):
        """What would be found out after the training."""
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"--answer_pattern {self.answer_pattern} is no regular expression: {error}.") from error
        if not groups:
            raise ValueError(f"--answer_pattern {self.answer_pattern} has no group (...): its first one is compared.")
        check_least(self, generate_rows=0, max_new_tokens=1, num_beams=1)

    def is_right(self, answer: str, expected: str) -> bool:
        return bool(matches([answer], [expected], self.answer_pattern))

    @property
    def generation(self) -> dict[str, int]:
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}


@dataclass
class RecipeArguments(AnswerArguments):
    """Rows, a Pilot from scratch, and the Copilot."""

    from_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "A transformers config with its model_type: the Pilot is built from scratch."}
    )
    tokenizer_size: int = field(
        default=1024, metadata={"help": "Vocabulary of the byte-level BPE that from_config trains on the data."}
    )
    copilot_preset: str = field(
        default="default", metadata={"help": "Settings of the Copilot.", "choices": ["default", "paper"]}
    )
    copilot_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "What differs from the preset, fields of CopilotConfig: {memory: pilot}."}
    )
    copilot_lora_r: int | None = field(
        default=None, metadata={"help": "Train the Copilot's layers by LoRA of this rank; by default all of it."}
    )
    validation_rows: int | None = field(
        default=None, metadata={"help": "Rows of the training split for evaluation; by default a tenth, at most 200."}
    )
    watch_rows: int = field(
        default=8, metadata={"help": "Evaluation rows that are answered at every evaluation; 0 for none."}
    )

    def __post_init__(self):
        """On the command line the dictionaries are texts."""
        super().__post_init__()
        check_least(self, tokenizer_size=1, watch_rows=0, copilot_lora_r=1)
        check_choices(self)
        for name in ("from_config", "copilot_config"):
            given = getattr(self, name)
            if given is not None:
                setattr(self, name, to_mapping(name, given))
        unknown = set(self.copilot_config or {}) - {option.name for option in fields(CopilotConfig)}
        if unknown:
            raise ValueError(f"copilot_config has what no CopilotConfig has: {', '.join(sorted(unknown))}.")

    def copilot(self) -> CopilotConfig:
        make_config = CopilotConfig.paper if self.copilot_preset == "paper" else CopilotConfig
        return make_config(**(self.copilot_config or {}))

    def copilot_adapter(self) -> LoraConfig | None:
        rank = self.copilot_lora_r
        return None if rank is None else LoraConfig(r=rank, lora_alpha=rank)


def to_mapping(name: str, given: Any) -> dict[str, Any]:
    """What an argument holds, or its text says, as JSON or YAML."""
    try:
        read = from_text(given) if isinstance(given, str) else given
    except YAMLError as error:
        raise ValueError(f"{name} {given!r} is neither JSON nor YAML: {in_a_line(error)}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{name} is to be a mapping, as YAML or JSON, not {given!r}.")
    return read


def from_text(text: str) -> Any:
    """JSON first: to YAML 1e-5 is no number."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return yaml.safe_load(text)


class TaskRows(NamedTuple):
    """Rows to train on, to validate on (both of the training split) and to answer."""

    train: Dataset
    validation: Dataset
    test: list[dict[str, Any]]


def prepare_rows(script_args: ScriptArguments, recipe: RecipeArguments, seed: int) -> TaskRows:
    forms = (recipe.prompt, recipe.completion)
    splits = (script_args.dataset_train_split, script_args.dataset_test_split)
    train, test = load_rows(script_args.dataset_name, *forms, *splits, script_args.dataset_config).values()
    train, count = train.shuffle(seed=seed), recipe.validation_rows
    if count is None:
        count = min(MOST_VALIDATION_ROWS, len(train) // 10)
    if not 0 <= count < len(train):
        raise ValueError(f"{len(train)} training rows leave none beside validation_rows={count}.")
    validation, train = train.select(range(count)), train.select(range(count, len(train)))
    test = to_answers(test.take(min(recipe.generate_rows, len(test))), "the test rows")
    return TaskRows(train, validation, test)


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Prompts as the encoder's input, completions as labels; both end with the end token."""
    return rows.map(lambda row: label_row(tokenizer, row, has_encoder=True), remove_columns=rows.column_names)

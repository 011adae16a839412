"""`hf-copilot eval`: Pilot and Pilot + Copilot side by side, on rows or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.comparison import Comparison, compare_answers, compare_likelihoods, table_of
from ..evaluation.tasks import compare_on_tasks
from ..model.modeling_copilot import CopilotModel
from ..training.report import show
from ..version import __version__
from .chats import check_template
from .data import read_answers
from .pair import PairArguments, load_pair
from .parser import Parser, check_least
from .processes import is_launched, start_processes
from .recipe import AnswerArguments


@dataclass
class EvalArguments(AnswerArguments, PairArguments):
    """What is measured, and how."""

    data: str | None = field(
        default=None, metadata={"help": "A JSON Lines file: likelihoods and answers of its rows."}
    )
    tasks: str | None = field(default=None, metadata={"help": "Tasks of lm-evaluation-harness, with commas between."})
    include_path: str | None = field(default=None, metadata={"help": "A folder with task files of your own."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples before each question of a task."})
    limit: int | None = field(default=None, metadata={"help": "Rows, or documents of each task, at most."})
    strength: float | None = field(default=None, metadata={"help": "λ; by default the Copilot's own."})
    batch_size: int = field(default=16, metadata={"help": "Rows in one forward, and answered together."})
    output_file: str | None = field(default=None, metadata={"help": "Where the figures go, as JSON."})

    def __post_init__(self):
        AnswerArguments.__post_init__(self)
        PairArguments.__post_init__(self)
        check_least(self, batch_size=1, limit=1, num_fewshot=0)
        if self.output_file is not None and not Path(self.output_file).absolute().parent.is_dir():
            raise ValueError(f"--output_file {self.output_file}: there is no such folder.")


def parser() -> Parser:
    return Parser(
        "hf-copilot eval",
        "Measure a Pilot alone (λ = 0) and with its Copilot on the same items. The interval is that of the "
        "difference, paired, 95 %.",
        (EvalArguments,),
        {
            "Pilot and Copilot": [field.name for field in fields(PairArguments)] + ["strength", "batch_size"],
            "On rows": ["data", *(field.name for field in fields(AnswerArguments))],
            "On tasks": ["tasks", "include_path", "num_fewshot"],
            "Both": ["limit", "output_file"],
        },
        positions=("pilot", "copilot"),
        examples=[
            "hf-copilot eval out --data test.jsonl --prompt '{question}\\n' --completion '{answer}'",
            "hf-copilot eval out out/copilot --tasks gsm8k,piqa",
        ],
    )


def evaluate(argv: Sequence[str]) -> None:
    arguments: EvalArguments
    (arguments,) = parser().parse(argv)
    if arguments.data is None and arguments.tasks is None:
        raise ValueError("There is nothing to measure on: --data names a JSON Lines file, --tasks names tasks.")
    rows = None
    if arguments.data is not None:
        rows = read_answers(arguments.data, arguments.prompt, arguments.completion)[: arguments.limit]
    accelerator = start_processes(arguments.device) if is_launched() else None
    loaded = load_pair(arguments)
    _, copilot, tokenizer = loaded
    strength = copilot.config.strength_or_own(arguments.strength)
    found = {}
    if rows is not None:
        check_template(rows, tokenizer, copilot.config.pilot_is_encoder_decoder)
        title = f"{len(rows)} rows of {Path(arguments.data).name}, λ = {strength:g}"
        found[title] = compare_rows(loaded, rows, strength, arguments)
    if arguments.tasks is not None:
        tasks, limits = arguments.tasks.split(","), {"num_fewshot": arguments.num_fewshot, "limit": arguments.limit}
        settings = limits | {"batch_size": arguments.batch_size, "accelerator": accelerator}
        compared = compare_on_tasks(*loaded, tasks, strength, arguments.include_path, **settings)
        for task, comparisons in compared.items():
            found[f"{task}, λ = {strength:g}"] = comparisons
    if accelerator is not None and not accelerator.is_main_process:
        return
    for title, comparisons in found.items():
        show(table_of(title, comparisons))
    if arguments.output_file is not None:
        write(arguments, strength, found)


def compare_rows(
    loaded: tuple[PreTrainedModel, CopilotModel, PreTrainedTokenizerBase],
    rows: list[dict[str, Any]],
    strength: float,
    arguments: EvalArguments,
) -> list[Comparison]:
    """Likelihoods, and answers to as many rows as are asked for."""
    found = compare_likelihoods(*loaded, rows, strength, arguments.batch_size)
    answered = rows[: arguments.generate_rows]
    if not answered:
        return found
    generation = arguments.generation | {"batch_size": arguments.batch_size}
    answers = compare_answers(*loaded, answered, strength, arguments.answer_pattern, **generation)
    return [*found, answers._replace(metric=f"right answers ({len(answered)} rows)")]


def write(arguments: EvalArguments, strength: float, found: dict[str, list[Comparison]]) -> None:
    """All figures, and what they were measured with, as JSON."""
    figures: dict[str, Any] = {
        "pilot": arguments.pilot,
        "copilot": arguments.copilot_name,
        "strength": strength,
        "hf_copilot": __version__,
        "results": {title: [comparison._asdict() for comparison in group] for title, group in found.items()},
    }
    Path(arguments.output_file).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

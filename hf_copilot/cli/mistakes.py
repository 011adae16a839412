"""`hf-copilot mistakes`: the page of what a run got wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from trl import ScriptArguments

from ..ledger.mistake_ledger import MistakeLedger
from ..ledger.page import Rows, load_from, mistakes
from ..training.ledger import LEDGER_FOLDER
from ..training.report import show
from ..training.trainer import CopilotMixin
from .data import read_file
from .parser import Parser
from .recipe import RecipeArguments, prepare_rows, tokenize

REFERENCE = "rows.json"  # how `sft` and `seq2seq` made the rows, in the ledger's folder


@dataclass
class MistakesArguments:
    """A run, and what its page shows."""

    run: str = field(metadata={"help": "The run's output_dir."})
    data: str | None = field(
        default=None,
        metadata={"help": "JSON Lines file of the rows that the trainer was given. A run of hf-copilot needs none."},
    )
    rows: list[int] = field(
        default_factory=list, metadata={"help": "Rows that are shown in full besides the worst and the forgotten."}
    )
    rectify: bool = field(default=False, metadata={"help": "Show tokens before and after the Copilot."})
    output: str | None = field(default=None, metadata={"help": "The page; by default beside the ledger."})


def parser() -> Parser:
    return Parser(
        "hf-copilot mistakes",
        "Write one HTML page of a run: a map of its rows, those that it never learnt or forgot, what it confused, and "
        "tokens in context. It opens from disk.",
        (MistakesArguments,),
        {"Arguments": [field.name for field in fields(MistakesArguments)]},
        positions=("run",),
        examples=["hf-copilot mistakes out --rectify", "hf-copilot mistakes out --data train.jsonl --rows 17 4"],
    )


def mistakes_page(argv: Sequence[str]) -> None:
    arguments: MistakesArguments
    (arguments,) = parser().parse(argv)
    data = rows_of_run(arguments.run) if arguments.data is None else read_file(arguments.data)
    output = mistakes(arguments.run, arguments.output, data, arguments.rows, arguments.rectify)
    show(f"{output} is written.")


def write_reference(trainer: CopilotMixin, script_args: ScriptArguments, recipe: RecipeArguments) -> None:
    """Leave in a run's ledger, if it has one, how its rows were made. No row is in it."""
    folder, name = Path(trainer.args.output_dir) / LEDGER_FOLDER, script_args.dataset_name
    if not folder.is_dir():
        return
    place = str(Path(name).absolute()) if name and Path(name).exists() else name
    reference: dict[str, Any] = {"script": asdict(script_args) | {"dataset_name": place}}
    reference |= {"recipe": asdict(recipe), "seed": trainer.args.seed}
    (folder / REFERENCE).write_text(json.dumps(reference), encoding="utf-8")


def rows_of_run(run: str) -> Rows | None:
    """The rows that `hf-copilot` trained a run on, made anew; None where another program did."""
    file = Path(run) / LEDGER_FOLDER / REFERENCE
    if not file.is_file():
        return None
    reference = json.loads(file.read_text(encoding="utf-8"))
    recipe = RecipeArguments(**reference["recipe"])
    train = prepare_rows(ScriptArguments(**reference["script"]), recipe, reference["seed"]).train
    return tokenize(train, load_from(run, AutoTokenizer)) if MistakeLedger.load(run).has_encoder else train

"""`hf-copilot calibrate`: choose λ on a file of rows, and write it into the Copilot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from rich.table import Table

from ..evaluation.rows import label_row
from ..model.fields import CURVES, QUANTITIES
from ..training.metrics import STRENGTHS, calibrate_on_rows
from ..training.report import show
from .chats import check_template
from .data import read_answers
from .pair import PairArguments, load_pair
from .parser import Parser, check_choices, check_least
from .recipe import RowArguments


@dataclass
class CalibrateArguments(RowArguments, PairArguments):
    """What λ is chosen on, and by."""

    data: str | None = field(default=None, metadata={"help": "A JSON Lines file of rows that nothing was trained on."})
    metric: str = field(
        default="nll",
        metadata={
            "help": "nll for likelihoods and sampled text, token_accuracy for greedy answers.",
            "choices": list(QUANTITIES),
        },
    )
    strengths: list[float] = field(
        default_factory=lambda: list(STRENGTHS), metadata={"help": "The λ that are tried, with spaces between."}
    )
    batch_size: int = field(default=16, metadata={"help": "Rows in one forward."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the Copilot goes; by default it is changed in its folder."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_least(self, batch_size=1)
        check_choices(self)


def parser() -> Parser:
    pair = [field.name for field in fields(PairArguments)]
    return Parser(
        "hf-copilot calibrate",
        "Choose the strength λ with the least NLL, or the highest token accuracy, on rows; λ = 0 is always tried, so "
        "that there Pilot + Copilot is never worse than the Pilot. λ and all figures go into the Copilot's config and "
        "card.",
        (CalibrateArguments,),
        {
            "Pilot and Copilot": pair,
            "λ": [field.name for field in fields(CalibrateArguments) if field.name not in pair],
        },
        positions=("pilot", "copilot"),
        examples=["hf-copilot calibrate out --data valid.jsonl --prompt '{question}\\n' --completion '{answer}'"],
    )


def calibrate(argv: Sequence[str]) -> None:
    arguments: CalibrateArguments
    (arguments,) = parser().parse(argv)
    if arguments.data is None:
        raise ValueError("There is nothing to choose λ on: --data names a JSON Lines file.")
    folder = Path(arguments.output_dir or arguments.copilot_name)
    if arguments.output_dir is None and not folder.is_dir():
        raise ValueError(f"The Copilot {folder} is on the Hub: --output_dir names a folder for the changed one.")
    rows = read_answers(arguments.data, arguments.prompt, arguments.completion)
    pilot, copilot, tokenizer = load_pair(arguments)
    check_template(rows, tokenizer, copilot.config.pilot_is_encoder_decoder)
    labelled = [label_row(tokenizer, row, copilot.config.pilot_is_encoder_decoder) for row in rows]
    data = f"{len(labelled)} rows of {Path(arguments.data).name}"
    calibrate_on_rows(pilot, copilot, labelled, arguments.strengths, data, arguments.metric, arguments.batch_size)
    copilot.save_pretrained(folder)
    show(table_of_strengths(copilot.config.calibration))
    show(f"λ = {copilot.config.strength:g} is written into {folder}.")


def table_of_strengths(calibration: dict) -> Table:
    """All λ that were tried; the chosen one is marked."""
    table = Table(title=f"{calibration['targets']:,} tokens of {calibration['data']}, by {calibration['metric']}")
    for column in ("λ", "NLL (nats per token)", "token accuracy", ""):
        table.add_column(column, justify="right")
    for strength, nll, accuracy in zip(*(calibration[name] for name in CURVES), strict=True):
        chosen = "chosen" if strength == calibration["strength"] else "the Pilot alone" if strength == 0 else ""
        table.add_row(f"{strength:g}", f"{nll:.4f}", f"{accuracy:.1%}", chosen)
    return table

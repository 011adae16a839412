"""`hf-copilot check`: does this Copilot fit this Pilot?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields

from ..pilot.compatibility import check_pilot, check_rows
from ..pilot.head import PilotHead
from ..training.report import show
from .pair import PairArguments, empty_pilot, load_copilot, load_tokenizer
from .parser import Parser, in_a_line


def parser() -> Parser:
    return Parser(
        "hf-copilot check",
        "Say whether a Copilot fits a Pilot: tokenizer, vocabulary, kind, hidden size. The Pilot's weights are not "
        "loaded. Ends with 0 if it fits, with 1 and the reason if it does not.",
        (PairArguments,),
        {"Pilot and Copilot": [field.name for field in fields(PairArguments)]},
        positions=("pilot", "copilot"),
        examples=["hf-copilot check Qwen/Qwen2.5-1.5B out/copilot"],
    )


def check(argv: Sequence[str]) -> None:
    arguments: PairArguments
    (arguments,) = parser().parse(argv)
    pilot, copilot, tokenizer = empty_pilot(arguments), load_copilot(arguments), load_tokenizer(arguments)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_pilot(copilot, pilot, tokenizer)
    config = copilot.config
    kind = "state" if config.reads_states else "token"
    show(f"{type(pilot).__name__} with {len(tokenizer)} tokens: the {kind} Copilot fits, λ = {config.strength:g}.")
    for warning in said:
        if issubclass(warning.category, UserWarning):
            show(f"But: {in_a_line(warning.message)}")
    try:
        check_rows(config, PilotHead(pilot).vocab_size)
    except ValueError as error:
        show(f"But for generation alone (calibrate, eval and fold raise). {in_a_line(error)}")

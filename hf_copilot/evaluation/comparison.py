"""Pilot and Pilot + Copilot on the same items, with the interval of their difference.

Several processes share the items: then every one must call [`compare_likelihoods`] and [`compare_answers`].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation.logits_processor import CopilotLogitsProcessor
from ..model.modeling_copilot import CopilotModel
from ..training.distributed import process_index, share
from ..training.teacher_forced import score
from .rows import expected_answer, generate_answers, label_row, prompt_of

OF_95_PERCENT = 1.96  # standard errors


class Comparison(NamedTuple):
    """One metric of both."""

    metric: str
    pilot: float
    rectified: float
    interval: tuple[float, float] | None = None  # of rectified - pilot, 95 %, paired; None where there is none
    form: str = ".4f"  # how the figures are shown


def compare(
    metric: str,
    pilot: torch.Tensor,
    rectified: torch.Tensor,
    weights: torch.Tensor | None = None,
    form: str = ".4f",
) -> Comparison:
    """Means over the same n items, and the normal interval of their difference.

    With item sums a_i, b_i and weights w_i (tokens; by default 1) the difference is d = Σ (b_i − a_i) / Σ w_i, and its
    standard error sqrt(n / (n − 1) Σ (b_i − a_i − d w_i)²) / Σ w_i.

    Args:
        pilot, rectified: `[n]`, a and b.
        weights: `[n]`, w.

    Raises:
        ValueError: If the weights sum to nothing.
    """
    pilot, rectified = pilot.double(), rectified.double()  # [n]
    weights = torch.ones_like(pilot) if weights is None else weights.double()  # [n]
    count, total = len(pilot), weights.sum().item()
    if not total:
        raise ValueError(f"There is nothing to measure {metric} on: no row has a labelled token.")
    before, after = pilot.sum().item() / total, rectified.sum().item() / total
    spread = (rectified - pilot - (after - before) * weights).square().sum().item()
    if count < 2 or not spread:  # no item differs from the others
        return Comparison(metric, before, after, None, form)
    error = (count / (count - 1) * spread) ** 0.5 / total
    reach = OF_95_PERCENT * error
    return Comparison(metric, before, after, (after - before - reach, after - before + reach), form)


def table_of(title: str, comparisons: Sequence[Comparison]) -> Table:
    """Both side by side, their difference, and its interval."""
    table = Table(title=title)
    for column in ("", "Pilot", "Pilot + Copilot", "difference", "95 % interval"):
        table.add_column(column, justify="right" if column else "left")
    for found in comparisons:
        signed = f"+{found.form}"
        interval = "" if found.interval is None else " to ".join(format(end, signed) for end in found.interval)
        figures = [format(found.pilot, found.form), format(found.rectified, found.form)]
        table.add_row(found.metric, *figures, format(found.rectified - found.pilot, signed), interval)
    return table


def last_match(pattern: str, text: str) -> str | None:
    """What the pattern's first group holds at its last match with something in it."""
    found = [(match.group(1) or "").strip() for match in re.finditer(pattern, text)]
    return next(filter(None, reversed(found)), None)


def matches(answers: Sequence[str], expected: Sequence[str], pattern: str) -> torch.Tensor:
    """`[items]` float: 1 where the last match of the pattern is the same in both."""
    pairs = [(last_match(pattern, a), last_match(pattern, b)) for a, b in zip(answers, expected, strict=True)]
    return torch.tensor([float(b is not None and a == b) for a, b in pairs])


def compare_likelihoods(
    pilot: PreTrainedModel,
    copilot: CopilotModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    strength: float,
    batch_size: int = 16,
) -> list[Comparison]:
    """NLL and token accuracy, teacher-forced, of rows with a prompt and a completion."""

    def measure(own: Sequence[dict[str, Any]]) -> list[list[float]]:
        labelled = [label_row(tokenizer, row, copilot.config.pilot_is_encoder_decoder) for row in own]
        scores = score(pilot, copilot, labelled, [0.0, strength], batch_size)
        sums = [torch.cat([-f.log_likelihoods.sum(1), f.is_likeliest.sum(1)]).tolist() for f in scores]
        return [[len(found.log_likelihoods[0]), *of_row] for found, of_row in zip(scores, sums, strict=True)]

    tokens, *nll_and_hits = torch.tensor(share(rows, measure)).T  # 1 + 4 times [n]
    return [
        compare("NLL (nats per token)", *nll_and_hits[:2], tokens),
        compare("token accuracy", *nll_and_hits[2:], tokens, ".1%"),
    ]


def compare_answers(
    pilot: PreTrainedModel,
    copilot: CopilotModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    strength: float,
    pattern: str,
    **generation: Any,
) -> Comparison:
    """Right answers, generated greedily or by beams: those whose last match of the pattern is the completion's."""

    def measure(own: Sequence[dict[str, Any]]) -> list[list[float]]:
        prompts, expected = ([form(tokenizer, row) for row in own] for form in (prompt_of, expected_answer))
        answer = partial(generate_answers, pilot, tokenizer, prompts, do_sample=False, **generation)
        titles = ("Pilot", "Pilot + Copilot") if process_index() == 0 else (None, None)
        alone = answer(None, titles[0])
        with CopilotLogitsProcessor(copilot, pilot, strength, tokenizer) as processor:
            both = answer(processor, titles[1])
        return torch.stack([matches(said, expected, pattern) for said in (alone, both)], dim=1).tolist()  # [n, 2]

    return compare("right answers", *torch.tensor(share(rows, measure)).T, form=".1%")

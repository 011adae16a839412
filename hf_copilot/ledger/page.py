"""One HTML page of a run's mistakes: a map of its rows, those that it never learnt, confusions, tokens in context.

`hf-copilot mistakes` writes it.
"""

from __future__ import annotations

import base64
import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from ..model.modeling_copilot import CopilotModel
from ..training.checkpoint import WEIGHTS_FOLDER
from ..training.ledger import LEDGER_FOLDER, SAID_THE_LABEL
from ..training.teacher_forced import RowScore, score
from .mistake_ledger import MistakeLedger, RowStatistics
from .row_tokens import RowTokens

TEMPLATE = Path(__file__).with_name("page.html")
IN_FULL = 500  # rows that a page holds in full
WITHOUT_TEXT = "The page was made without the data set: pass it (--data) for confusions and for tokens in context."
Rows = Sequence[Mapping[str, Any]]


def mistakes(
    run: str | os.PathLike,
    output: str | os.PathLike | None = None,
    data: str | os.PathLike | Rows | None = None,
    rows: Sequence[int] = (),
    rectify: bool = False,
) -> Path:
    """Write the page of a run's mistakes; it needs no server and no other file.

    Args:
        run: The run's `output_dir`, with its ledger; with `data` also the tokenizer, with `rectify` Pilot and Copilot.
        output: The page; by default `mistakes.html` beside the ledger, which Trainer does not push.
        data: The data set that the trainer was given, or a JSON Lines file of it. Without it the page has no text.
        rows: Indices of rows to show in full, besides the worst and the forgotten ones.
        rectify: Show the tokens as the trained Pilot holds them and as Pilot + Copilot do, in place of how the Pilot
            held them when it last read them in training. Both are run on the rows that are shown in full.

    Raises:
        ValueError: Without a ledger, for other data than the run's, an unread row, or `rectify` without data or model.
    """
    ledger = MistakeLedger.load(run)
    statistics = ledger.rows()
    if rectify and data is None:
        raise ValueError("rectify runs Pilot and Copilot on the rows: pass data (--data) with it.")
    tokenizer = load_from(run, AutoTokenizer) if data is not None else None
    text = RowTokens(ledger, read_rows(data), tokenizer) if data is not None else None
    text_of = decoder_of(tokenizer) if tokenizer is not None else None
    chosen = rows_in_full(statistics, rows)
    scores = scored(run, ledger, text, list(chosen)) if rectify else {}
    page = {
        "about": about(ledger, statistics),
        "map": as_map(statistics),
        "cards": [card(ledger, row, why, text, text_of, scores.get(row)) for row, why in chosen.items()],
        "confusions": [(text_of(c.label), text_of(c.said), c.count) for c in text.confusions()] if text else None,
        "rectified": fixed(scores) if rectify else None,
        "without_text": WITHOUT_TEXT,
    }
    output = Path(output or Path(run) / LEDGER_FOLDER / "mistakes.html")
    output.write_text(TEMPLATE.read_text(encoding="utf-8").replace("{{ data }}", as_json(page)), encoding="utf-8")
    return output


def as_json(page: dict[str, Any]) -> str:
    """JSON that can't end the script element that it stands in."""
    return json.dumps(page, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def read_rows(data: str | os.PathLike | Rows) -> Rows:
    """The rows of a JSON Lines file, or the rows that are given.

    Raises:
        ValueError: If there is no such file, or it holds no rows.
    """
    if not isinstance(data, str | os.PathLike):
        return data
    if not Path(data).is_file():
        raise ValueError(f"{data} is not a file: pass the JSON Lines file that the run was trained on.")
    try:
        return load_dataset("json", data_files=glob.escape(str(data)), split="train")
    except Exception as error:  # of several libraries
        raise ValueError(f"{data} can't be read as JSON Lines: {error}") from error


def load_from(run: str | os.PathLike, auto_class: Any) -> Any:
    """What a run has saved in its folder.

    Raises:
        ValueError: If it has not.
    """
    try:
        return auto_class.from_pretrained(run)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{run} holds nothing for {auto_class.__name__}: call trainer.save_model() at the end of the run."
        ) from error


def rows_in_full(statistics: RowStatistics, chosen: Sequence[int]) -> dict[int, str]:
    """Rows that are shown in full, and why: the chosen ones, those that fit worst, those that were forgotten most."""
    unread = sorted({*chosen} - {*statistics.row.tolist()})
    if unread:
        raise ValueError(f"The run did not read the rows {unread}: choose others.")
    reasons = {int(row): "chosen" for row in chosen}
    forgotten = (-statistics.forgotten).argsort(kind="stable")[: IN_FULL // 2]
    forgotten = forgotten[statistics.forgotten[forgotten] > 0]
    for i in statistics.mean_p.argsort(kind="stable")[: max(0, IN_FULL - len(forgotten) - len(reasons))]:
        reasons.setdefault(int(statistics.row[i]), "among the worst" if statistics.learnt[i] else "never learnt")
    for i in forgotten:
        reasons.setdefault(int(statistics.row[i]), f"forgotten {statistics.forgotten[i]} times")
    return dict(list(reasons.items())[:IN_FULL])


def about(ledger: MistakeLedger, statistics: RowStatistics) -> str:
    never = int((~statistics.learnt).sum())
    return (
        f"{len(ledger.tokens):,} labelled tokens of {len(statistics.row):,} rows in {ledger.documents['step'][-1]:,} "
        f"steps, each row read {statistics.visits.mean():.1f} times. At no time was every label of {never:,} rows the "
        f"Pilot's first choice; {int((statistics.forgotten > 0).sum()):,} rows were learnt so and forgotten again."
    )


def as_map(statistics: RowStatistics) -> dict[str, str]:
    """The arrays of the map, as bytes in base64."""
    arrays = {
        "row": statistics.row.astype("<i4"),
        "mean": statistics.mean_p.astype("<f4"),
        "spread": statistics.spread_p.astype("<f4"),
        "forgotten": statistics.forgotten.clip(0, 65535).astype("<u2"),
        "learnt": statistics.learnt.astype("<u1"),
    }
    return {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}


def card(
    ledger: MistakeLedger,
    row: int,
    why: str,
    text: RowTokens | None,
    text_of: Callable[[int], str] | None,
    found: RowScore | None,
) -> dict[str, Any]:
    """A row in full: the mean p of each reading, and its tokens, of which the labelled ones are `[text, p, whether it
    is wrong, what was likelier in training, and with the Copilot p, whether it is wrong]`."""
    documents = ledger.of_row(row)
    visits = sorted({int(number) for (number, _), _ in documents})
    history = [np.concatenate([t["p"] for (n, _), t in documents if n == visit]).mean() for visit in visits]
    made = {"row": row, "why": why, "history": [round(float(p), 4) for p in history], "tokens": []}
    if text is None:
        return made
    last = {int(token["position"]): token for _, tokens in documents for token in tokens}
    order = {position: i for i, position in enumerate(text.labelled(row).tolist())}
    for position, token in enumerate(text.parts[row].tolist()):
        if token < 0:  # padding of an encoder-decoder's labels
            continue
        entry = [text_of(token)]
        if position in last:
            _, p, said = last[position].tolist()
            is_wrong = said != SAID_THE_LABEL
            entry += [round(p, 4), is_wrong, text_of(said) if is_wrong else None]
        if found is not None and position in order:
            p = found.log_likelihoods[:, order[position]].exp().tolist()  # before and after the Copilot
            is_right = found.is_likeliest[:, order[position]].tolist()
            entry[1:3] = round(p[0], 4), not is_right[0]
            entry += [round(p[1], 4), not is_right[1]]
        made["tokens"].append(entry)
    return made


def decoder_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """From a token to its text inside a longer one: decoders of SentencePiece strip the space of a first token."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    border = len(decode(before))
    return lambda token: decode([*before, token])[border:]


def scored(run: str | os.PathLike, ledger: MistakeLedger, text: RowTokens, rows: list[int]) -> dict[int, RowScore]:
    """These rows by the trained Pilot, and by Pilot + Copilot."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pilot = load_from(run, AutoModelForSeq2SeqLM if ledger.has_encoder else AutoModelForCausalLM).to(device)
    copilot = load_from(Path(run) / WEIGHTS_FOLDER, CopilotModel).to(device)
    return dict(zip(rows, score(pilot, copilot, [text.to_score(row) for row in rows]), strict=True))


def fixed(scores: dict[int, RowScore]) -> str:
    """What the Copilot changes in these rows."""
    before, after = torch.cat([found.is_likeliest for found in scores.values()], dim=1)  # [m] each
    return (
        f"Of {len(before):,} labelled tokens in these rows the trained Pilot has {int((~before).sum()):,} wrong. With "
        f"the Copilot {int((after & ~before).sum()):,} of them are right, and {int((before & ~after).sum()):,} others "
        "wrong."
    )

"""`MistakeLedger`: what a run's ledger tells of its rows.

Shapes: D documents that were read, M labelled tokens of theirs, R rows of the data set that were read.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from ..training.ledger import (
    FORMAT_VERSION,
    HEADER,
    LEDGER_FOLDER,
    SAID_THE_LABEL,
    UNKNOWN_ROW,
    processes_in,
    read_written,
)

logger = logging.getLogger(__name__)

LEAST_P = 1e-7  # p is 1 − (1 − p̂) in float32, which knows nothing below


class RowStatistics(NamedTuple):
    """Of every row that was read, in their order. A visit is one reading of the row: there is one in every epoch."""

    row: np.ndarray  # [R] int, its index in the data set
    visits: np.ndarray  # [R] int
    mean_p: np.ndarray  # [R], the mean over visits of the mean p(label) over the row's labelled tokens
    spread_p: np.ndarray  # [R], its standard deviation over visits
    first_p: np.ndarray  # [R], at the first visit
    last_p: np.ndarray  # [R], at the last visit
    mean_loss: np.ndarray  # [R], the mean over visits of the mean −log p(label), in nats
    last_loss: np.ndarray  # [R], at the last visit
    learnt: np.ndarray  # [R] bool, whether at some visit every label was the Pilot's first choice
    forgotten: np.ndarray  # [R] int, how often such a visit was followed by one that was not


class MistakeLedger:
    """Every labelled token of a run: how likely the Pilot held it each time, and what it held likelier.

        ledger = MistakeLedger.load("out")  # the run's output_dir
        rows = ledger.rows()
        print(rows.row[rows.mean_p.argsort()[:20]])  # the indices of the rows that fit worst

    Attributes:
        documents: `[D]`, with fields `step`, `row` (−1 if unknown), `tokens` (how many are labelled) and `check`.
        tokens: `[M]`, with fields `position` (in the row's tokens; beside an encoder in its labels), `p` (of the
            label, as the Pilot had it in training, to 6e-8) and `said` (the likeliest token, −1 where that is the
            label).
        num_rows: Of the data set; None if unknown.
        has_encoder: Whether labels are a column of their own.
        chat_template: With which rows became tokens, where it was not the tokenizer's own.
    """

    def __init__(
        self,
        documents: np.ndarray,
        tokens: np.ndarray,
        num_rows: int | None,
        has_encoder: bool,
        chat_template: str | None = None,
    ):
        self.documents, self.tokens, self.num_rows, self.has_encoder = documents, tokens, num_rows, has_encoder
        self.chat_template = chat_template
        self.ends = documents["tokens"].cumsum(dtype=np.int64)  # [D]
        self.starts = self.ends - documents["tokens"]  # [D]
        self.visit = self._visits()  # [D]

    @classmethod
    def load(cls, run: str | os.PathLike) -> MistakeLedger:
        """The ledger of a run. What a kill has cut off at its end is left out, with a warning.

        Args:
            run: The run's `output_dir`.

        Raises:
            ValueError: If it holds no ledger, one of a newer version, or one without a whole document.
        """
        folder = Path(run) / LEDGER_FOLDER
        if not (folder / HEADER).is_file():
            raise ValueError(
                f"{run} holds no mistake ledger ({LEDGER_FOLDER}/{HEADER} is missing): name the output_dir of a run "
                "of CopilotTrainer or CopilotSeq2SeqTrainer with copilot_mistake_ledger=True."
            )
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if header["format_version"] > FORMAT_VERSION:
            raise ValueError(f"The mistake ledger in {run} is of a newer hf_copilot: update this one to read it.")
        written = [read_written(folder, process) for process in processes_in(folder)]
        if any(part.is_torn for part in written):
            logger.warning(f"The mistake ledger in {run} was cut off while it was written: its last entries are lost.")
        parts = [part for part in written if len(part.documents)]
        if not parts:
            raise ValueError(f"The mistake ledger in {run} is empty: no round of the run was written to the end.")
        documents = np.concatenate([part.documents for part in parts])  # [D]
        tokens = np.concatenate([part.tokens for part in parts])  # [M]
        order = documents["step"].argsort(kind="stable")  # [D]
        return cls(
            documents[order],
            tokens[_in_order(documents["tokens"], order)],
            num_rows=header["rows"],
            has_encoder=header["has_encoder"],
            chat_template=header.get("chat_template"),
        )

    def _parts(self) -> np.ndarray:
        """`[D]`, a number for each document that those of the same row from the same token on have too."""
        first = self.tokens["position"][self.starts].astype(np.int64)  # [D]
        return self.documents["row"].astype(np.int64) << 32 | first

    def _visits(self) -> np.ndarray:
        """`[D]`, how often the document was read before."""
        key = self._parts()
        order = key.argsort(kind="stable")  # [D]
        is_new = np.ones(len(key), bool)
        is_new[1:] = key[order][1:] != key[order][:-1]
        starts = np.flatnonzero(is_new)
        visit = np.empty(len(key), np.int64)
        visit[order] = np.arange(len(key)) - np.repeat(starts, np.diff(starts, append=len(key)))
        return visit

    def to_dataset(self) -> Dataset:
        """A data set with one row for each labelled token: `step`, `row`, `visit`, `position`, `p`, `said`."""
        counts = self.documents["tokens"]
        columns = {name: np.repeat(self.documents[name], counts) for name in ("step", "row")}
        columns["visit"] = np.repeat(self.visit, counts)
        columns |= {name: np.ascontiguousarray(self.tokens[name]) for name in self.tokens.dtype.names}
        return Dataset.from_dict(columns)

    def rows(self) -> RowStatistics:
        """Statistics of every row that was read. Documents without a row id are left out.

        Raises:
            ValueError: If no document has one.
        """
        known = np.flatnonzero(self.documents["row"] != UNKNOWN_ROW)  # of [D]
        if not len(known):
            raise ValueError(
                "No token of this ledger has a row id: these are there for a `datasets.Dataset` in a trainer of "
                "hf_copilot, and for batches with `row_ids`."
            )
        # a visit of a row may be in several documents, where packing has split it
        row, visit = self.documents["row"][known].astype(np.int64), self.visit[known]  # [D], [D]
        key, of_visit = np.unique(row << 32 | visit, return_inverse=True)  # [W], [D]; W visits of all rows
        counts, p, loss, right = (
            np.bincount(of_visit, values[known]) for values in (self.documents["tokens"], *self._sums())
        )  # [W] each
        row, starts, visits = np.unique(key >> 32, return_index=True, return_counts=True)  # [R] each
        last = starts + visits - 1
        p, loss, is_right = p / counts, loss / counts, right == counts  # [W] each
        forgotten = is_right[:-1] & ~is_right[1:]  # [W - 1], also from one row to the next
        forgotten = np.append(forgotten, False)
        forgotten[last] = False
        mean = np.add.reduceat(p, starts) / visits  # [R]
        spread = np.sqrt(np.add.reduceat((p - np.repeat(mean, visits)) ** 2, starts) / visits)  # [R]
        return RowStatistics(
            row,
            visits,
            mean,
            spread,
            p[starts],
            p[last],
            np.add.reduceat(loss, starts) / visits,
            loss[last],
            np.add.reduceat(is_right.astype(int), starts) > 0,
            np.add.reduceat(forgotten.astype(int), starts),
        )

    def _sums(self) -> list[np.ndarray]:
        """Sums over the labelled tokens of each document `[D]`: of p, of −log p, and how many were said right."""
        p = self.tokens["p"].astype(np.float64)  # [M]
        values = p, -np.log(p.clip(LEAST_P, 1.0)), self.tokens["said"] == SAID_THE_LABEL
        return [np.add.reduceat(value.astype(np.float64), self.starts) for value in values]

    def tokens_of(self, document: int) -> np.ndarray:
        """`[m]`, the labelled tokens of one document."""
        return self.tokens[self.starts[document] : self.ends[document]]

    def of_row(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The documents of one row, in order: the visit's number and step `[2]`, and its labelled tokens `[m]`."""
        found = np.flatnonzero(self.documents["row"] == row)
        return [(np.array([self.visit[i], self.documents["step"][i]]), self.tokens_of(i)) for i in found]

    def last_documents(self) -> np.ndarray:
        """Which documents are the last reading of their part of their row, in the order of rows."""
        _, from_the_end = np.unique(self._parts()[::-1], return_index=True)
        found = len(self.documents) - 1 - from_the_end
        return found[self.documents["row"][found] != UNKNOWN_ROW]


def _in_order(counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Indices `[M]` of the tokens of documents that have `counts` `[D]` of them, for these in another order."""
    counts = counts.astype(np.int64)
    starts = counts.cumsum() - counts  # [D], as they are
    moved = counts[order].cumsum() - counts[order]  # [D], in the other order
    return np.repeat(starts[order] - moved, counts[order]) + np.arange(counts.sum())

"""The text that a ledger refers to: the rows of the run's data set as tokens, and whether they are those of the run.

Shapes: R rows of the data set, N tokens of all of them, M labelled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..training.chats import row_tokens
from ..training.ledger import SAID_THE_LABEL, checksum
from ..training.records import IGNORE
from .mistake_ledger import MistakeLedger

OTHER_DATA = (
    "Pass the rows that the trainer was given, in their order, and the run's own tokenizer; or the rows as they were "
    "tokenised, with a column `input_ids` (beside an encoder-decoder `labels` too). Rows that were cut at their "
    "beginning (truncation_mode='keep_end') need that column, and the cut."
)


class Confusion(NamedTuple):
    label: int
    said: int
    count: int


class RowTokens:
    """The tokens of every row of a run's data set.

    Args:
        ledger: Of the run.
        rows: The data set that the trainer was given.
        tokenizer: The Pilot's; needed unless rows have `input_ids`.

    Raises:
        ValueError: If these are not the rows that the ledger was written of.
    """

    def __init__(
        self,
        ledger: MistakeLedger,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        if ledger.num_rows is not None and len(rows) != ledger.num_rows:
            raise ValueError(
                f"The data set has {len(rows)} rows and the run's had {ledger.num_rows}: these are not "
                f"the ledger's rows. {OTHER_DATA}"
            )
        self.ledger, self.rows = ledger, rows
        self.parts = [self._tokens(row, tokenizer) for row in rows]  # R x [n]
        sizes = np.array([len(part) for part in self.parts])  # [R]
        self.starts = sizes.cumsum() - sizes  # [R]
        self.flat = np.concatenate(self.parts)  # [N]
        self._check(sizes)

    def _tokens(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> np.ndarray:
        column = "labels" if self.ledger.has_encoder else "input_ids"
        if column in row:
            return np.asarray(row[column], np.int64)
        if self.ledger.has_encoder or tokenizer is None:
            raise ValueError(f"The rows have no column `{column}`. {OTHER_DATA}")
        return np.asarray(row_tokens(tokenizer, row, self.ledger.chat_template), np.int64)

    def _check(self, sizes: np.ndarray) -> None:
        ledger = self.ledger
        for i in ledger.last_documents():
            row, positions = ledger.documents["row"][i], ledger.tokens_of(i)["position"]  # [m]
            labels = self.parts[row][positions] if positions[-1] < sizes[row] else positions[:0]
            if checksum(labels) != ledger.documents["check"][i]:
                raise ValueError(f"Row {row} holds other tokens than it did in the run. {OTHER_DATA}")

    def confusions(self, most: int = 100) -> list[Confusion]:
        """The most frequent pairs of a label and what the Pilot held likelier, over the whole run."""
        tokens = self.ledger.tokens
        row = np.repeat(self.ledger.documents["row"], self.ledger.documents["tokens"])  # [M]
        wrong = np.flatnonzero((tokens["said"] != SAID_THE_LABEL) & (row >= 0))
        labels = self.flat[self.starts[row[wrong]] + tokens["position"][wrong]]
        pairs, counts = np.unique(labels << 32 | tokens["said"][wrong], return_counts=True)
        order = (-counts).argsort(kind="stable")[:most]
        return [
            Confusion(int(pair >> 32), int(pair & 0xFFFFFFFF), int(count))
            for pair, count in zip(pairs[order], counts[order], strict=True)
        ]

    def labelled(self, row: int) -> np.ndarray:
        """`[m]`, the positions of a row's labelled tokens, in order."""
        positions = [tokens["position"] for _, tokens in self.ledger.of_row(row)]
        return np.unique(np.concatenate(positions))

    def to_score(self, row: int) -> dict[str, list[int]]:
        """A row as [`score`] takes it: what the run read of it, with its labels."""
        positions, tokens = self.labelled(row), self.parts[row]
        labels = np.full(len(tokens), IGNORE)
        labels[positions] = tokens[positions]
        if self.ledger.has_encoder:
            return {"input_ids": list(self.rows[row]["input_ids"]), "labels": labels.tolist()}
        read = positions[-1] + 1
        return {"input_ids": tokens[:read].tolist(), "labels": labels[:read].tolist()}

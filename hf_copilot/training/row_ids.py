"""From the data set that the user gave to the ledger: which row a token is of, through maps, packing and collators.

The data set is given a column before the parent trainer maps and filters it, and the collator of training hands its
values on beside the batch, where neither the Pilot nor its loss sees them. Shapes: B rows of T tokens in a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import TrainingArguments
from transformers.utils import logging

from .ledger import ROW_IDS, ROW_POSITIONS, UNKNOWN_ROW

logger = logging.get_logger(__name__)

ROW = "copilot_row"  # a column: the row's index in the data set that was given
PLACES = "copilot_places"  # where rows are packed, a column: index and position of each token, as one number
COLUMNS = (ROW, PLACES)
NO_ROW_IDS = (
    "%s: the mistake ledger needs rows with an index, and is not written. Pass a `datasets.Dataset`, or set "
    "copilot_mistake_ledger=False."
)


def has_row_ids(rows: Any) -> bool:
    return isinstance(rows, Dataset) and any(name in rows.column_names for name in COLUMNS)


def without_row_ids(rows: Dataset) -> Dataset:
    return rows.remove_columns([name for name in COLUMNS if name in rows.column_names])


def with_row_ids(rows: Any, args: TrainingArguments | None = None) -> Any:
    """The data set with a column that numbers its rows; a stream as it is, with a warning, and so one with a transform
    (`with_transform`): a new column would be written out with all others, transformed. One with indices (`shuffle`,
    `select`) is written in its order first: by the main process, which the others wait for."""
    if not isinstance(rows, Dataset):
        logger.warning(NO_ROW_IDS, f"`train_dataset` is a {type(rows).__name__}, whose rows have no index")
        return rows
    if rows.format["type"] == "custom":
        logger.warning(NO_ROW_IDS, "`train_dataset` has a transform")
        return rows
    with nullcontext() if args is None else args.main_process_first(desc="numbering rows"):
        return without_row_ids(rows).add_column(ROW, np.arange(len(rows)))


def places_of(row: Mapping[str, Any]) -> dict[str, list[int]]:
    """In the place of its tokens and labels, where each of them is: row and position as one number."""
    places = [row[ROW] << 32 | position for position in range(len(row["input_ids"]))]
    return {"input_ids": places, "labels": places}


class RowIdsCollator:
    """Another collator, and beside its batch the row ids."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, examples: list[Any]) -> Any:
        column = next((name for name in COLUMNS if isinstance(examples[0], Mapping) and name in examples[0]), None)
        if column is None:
            return self.collate(examples)
        batch = self.collate([{k: v for k, v in row.items() if k not in COLUMNS} for row in examples])
        if "labels" not in batch:
            return batch
        ids = [torch.as_tensor(row[column]) for row in examples]
        if column == PLACES:
            places = in_layout(ids, batch["labels"].shape)  # [B, T]
            batch[ROW_IDS], batch[ROW_POSITIONS] = places >> 32, places & 0xFFFFFFFF
        elif len(batch["labels"]) == len(examples):
            batch[ROW_IDS] = torch.stack(ids)  # [B]
        elif len(batch["labels"]) == 1:
            lengths, shape = [len(row["input_ids"]) for row in examples], batch["labels"].shape
            batch[ROW_IDS] = in_layout([id.repeat(n) for id, n in zip(ids, lengths, strict=True)], shape)  # [1, T]
            batch[ROW_POSITIONS] = in_layout([torch.arange(n) for n in lengths], shape)  # [1, T]
        return batch


def in_layout(parts: list[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """Numbers of tokens as a batch `[B, T]` has these: one after the other in one row, or each padded on the right."""
    if shape[0] == 1:
        parts = [torch.cat(parts)]
    laid = torch.full(shape, UNKNOWN_ROW)
    for row, part in zip(laid, parts, strict=True):
        row[: len(part)] = part
    return laid


class RowIdsMixin:
    """Carries row ids through a subclass of `transformers.Trainer` whose data set has them."""

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """SFTTrainer drops other columns where it packs: there the places of tokens are packed like the tokens."""
        prepare = super()._prepare_dataset
        if not packing or not has_row_ids(dataset):
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        rows = prepare(dataset, processing_class, whole, False, formatting_func, dataset_name)
        packed, places = (
            prepare(part, processing_class, args, True, None, dataset_name)
            for part in (rows, rows.map(places_of, num_proc=args.dataset_num_proc, desc="Numbering tokens"))
        )
        places = places.select_columns("input_ids").rename_column("input_ids", PLACES)
        return concatenate_datasets([packed, places], axis=1)

    def get_train_dataloader(self):
        if not has_row_ids(self.train_dataset):
            return super().get_train_dataloader()
        self._set_signature_columns_if_needed()
        before = self.data_collator, self._signature_columns
        self.data_collator = RowIdsCollator(self.data_collator)
        self._signature_columns = [*self._signature_columns, *COLUMNS]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, self._signature_columns = before

    def take_row_ids(self, inputs: dict[str, Any]) -> None:
        """Out of a batch, for the learner."""
        self.learner.row_ids |= {name: inputs.pop(name) for name in (ROW_IDS, ROW_POSITIONS) if name in inputs}

    def training_step(self, model, inputs, *args, **kwargs):
        self.learner.row_ids = {}
        self.take_row_ids(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

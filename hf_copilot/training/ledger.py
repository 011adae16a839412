"""The ledger: of every labelled token of a run, how likely the Pilot held it, on disk. No text is in it.

Two files for each process, both flat arrays that are only appended to: 16 bytes for each document of a step, 12 for
each of its labelled tokens. Shapes: M targets of a batch, k kept entries of ℓ, B rows of T tokens.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..model.discrepancy import SparseDiscrepancy
from .distributed import num_processes, process_index
from .records import Targets

logger = logging.getLogger(__name__)

LEDGER_FOLDER = "_mistake_ledger"  # in output_dir; what begins with _ Trainer does not push
HEADER = "ledger.json"
FORMAT_VERSION = 1
UNKNOWN_ROW = -1
ROW_IDS, ROW_POSITIONS = "row_ids", "row_positions"  # in a batch: [B] or [B, T], and [B, T] where rows are packed
ROUNDS_HELD = 32  # rounds that wait on the device for one copy and one write

# a document: the step that it was read in, its row, its labelled tokens, and a checksum of these labels
DOCUMENT = np.dtype([("step", "<u4"), ("row", "<i4"), ("tokens", "<u4"), ("check", "<u4")])
# a token: its place in the row, p(label), and the likeliest token where that is not the label, else SAID_THE_LABEL
TOKEN = np.dtype([("position", "<u4"), ("p", "<f4"), ("said", "<i4")])
SAID_THE_LABEL = -1


def checksum(labels: np.ndarray) -> int:
    """Of a document's labels `[m]`: tells another data set from the run's."""
    return zlib.crc32(labels.astype("<i4").tobytes())


def documents_file(folder: Path, process: int) -> Path:
    return folder / f"documents-{process}.bin"


def tokens_file(folder: Path, process: int) -> Path:
    return folder / f"tokens-{process}.bin"


def processes_in(folder: Path) -> list[int]:
    """Those that wrote into a ledger."""
    return sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob("documents-*.bin"))


class Written(NamedTuple):
    """What is whole of one process's files."""

    documents: np.ndarray  # [D] of DOCUMENT
    tokens: np.ndarray  # [M] of TOKEN
    is_torn: bool  # whether there was more, which a kill cut off


def read_written(folder: Path, process: int) -> Written:
    """Map one process's files into memory; what a kill cut off at their end is left out."""
    files = documents_file(folder, process), tokens_file(folder, process)
    documents, tokens = (_mapped(*pair) for pair in zip(files, (DOCUMENT, TOKEN), strict=True))
    ends = documents["tokens"].cumsum(dtype=np.int64)  # [D]
    whole = int(np.searchsorted(ends, len(tokens), side="right"))
    used = int(ends[whole - 1]) if whole else 0
    sizes = whole * DOCUMENT.itemsize, used * TOKEN.itemsize
    return Written(documents[:whole], tokens[:used], sizes != tuple(path.stat().st_size for path in files))


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    count = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype, "r", shape=count) if count else np.empty(0, dtype)


class LedgerWriter:
    """Appends a run's rounds to its ledger. What is observed stays on the device, and every `ROUNDS_HELD` rounds is
    copied and written at once.

    Args:
        folder: Where the ledger is; it is made.
        step: Rounds of this run that are done: what the ledger holds beyond them is cut off.
        rows: Of the data set, if known.
        has_encoder: Whether the labels are a column of their own, not tokens of the input.
        earlier: A ledger to go on from where `folder` has none.
        chat_template: With which rows became tokens, where it is not the tokenizer's own.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        step: int = 0,
        rows: int | None = None,
        has_encoder: bool = False,
        earlier: Path | None = None,
        chat_template: str | None = None,
    ):
        self.folder, self.step, self.process = Path(folder), step, process_index()
        self.round: list[tuple] = []  # of the batches of this round
        self.rounds: list[tuple] = []  # of the rounds that are done
        self.is_broken = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_up(earlier)
        for process in {self.process, *(p for p in processes_in(self.folder) if p >= num_processes())}:
            self._cut(process)
        if self.process == 0:
            header = {"format_version": FORMAT_VERSION, "rows": rows, "has_encoder": has_encoder}
            header |= {"chat_template": chat_template}
            (self.folder / HEADER).write_text(json.dumps(header), encoding="utf-8")

    def _take_up(self, earlier: Path | None) -> None:
        """Copy this process's files of another folder's ledger, if this folder has none."""
        if earlier is None or documents_file(self.folder, self.process).exists():
            return
        for name in (documents_file, tokens_file):
            if name(earlier, self.process).is_file():
                shutil.copy(name(earlier, self.process), name(self.folder, self.process))

    def _cut(self, process: int) -> None:
        """Leave out what is beyond `step`."""
        files = documents_file(self.folder, process), tokens_file(self.folder, process)
        for path in files:
            path.touch()
        documents = read_written(self.folder, process).documents
        kept = int(np.searchsorted(documents["step"], self.step, side="right"))
        sizes = kept * DOCUMENT.itemsize, int(documents["tokens"][:kept].sum()) * TOKEN.itemsize
        del documents  # the map, before its file is cut
        for path, size in zip(files, sizes, strict=True):
            os.truncate(path, size)

    def collect(self, targets: Targets, mistake: SparseDiscrepancy, inputs: Mapping[str, Any]) -> None:
        """Note the targets of one batch. Nothing is copied from the device.

        Args:
            targets: Of the batch.
            mistake: ℓ at the targets.
            inputs: The batch; its `row_ids`, where it has them, are `[B]`, or `[B, T]` where a row of the batch holds
                several of the data set, and then with `row_positions`. Ids of another shape name no rows.
        """
        kept, label = mistake.indices[:, :-1], mistake.indices[:, -1:]  # [M, k], [M, 1]
        is_label = kept == label  # [M, k]
        # ℓ(y) = 1 − p̂(y), kept in the last column where the label is not among the k
        among, beside = (mistake.values[:, :-1] * is_label).sum(-1), mistake.values[:, -1]  # [M], [M]
        p = 1.0 - torch.where(is_label.any(-1), among, beside)  # [M]
        said = torch.where(is_label[:, 0], SAID_THE_LABEL, kept[:, 0])  # [M]
        shape = tuple(inputs["labels"].shape)
        self.round.append((targets, shape, inputs.get(ROW_IDS), inputs.get(ROW_POSITIONS), p, said))

    def end_round(self) -> None:
        self.step += 1
        self.rounds += [(self.step, *batch) for batch in self.round]
        self.round = []
        if self.step % ROUNDS_HELD == 0:
            self.flush()

    def flush(self) -> None:
        """Write the rounds that are done: tokens first, so that a document on disk has them."""
        rounds, self.rounds = self.rounds, []
        if not rounds or self.is_broken:
            return
        *batches, p, said = zip(*rounds, strict=True)
        documents, positions = zip(*map(_documents, *batches), strict=True)
        documents = np.concatenate(documents)  # [D]
        tokens = np.empty(sum(map(len, positions)), TOKEN)  # [M]
        tokens["position"] = np.concatenate(positions)
        tokens["p"] = torch.cat(p).float().cpu().numpy()
        tokens["said"] = torch.cat(said).cpu().numpy()
        of = np.repeat(np.arange(len(documents)), documents["tokens"])  # [M]
        is_finite = np.bincount(of, ~np.isfinite(tokens["p"]), len(documents)) == 0  # [D]
        try:
            for path, entries in (
                (tokens_file(self.folder, self.process), tokens[is_finite[of]]),
                (documents_file(self.folder, self.process), documents[is_finite]),
            ):
                with open(path, "ab") as file:
                    entries.tofile(file)
        except OSError as error:
            self.is_broken = True
            logger.warning(
                "From before step %d on nothing goes into the ledger, it can't be written (%s). Training goes on.",
                self.step,
                error,
            )


def _documents(
    step: int, targets: Targets, shape: tuple[int, int], ids: Any, places: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The documents of a batch `[D]`, cut where another row of the data set begins, and the positions `[M]` of their
    labelled tokens."""
    at = (targets.where + targets.shift).numpy()  # [M], of the labels in the flattened batch
    document = np.repeat(np.arange(len(targets.counts)), targets.counts)  # [M]
    positions = targets.positions.numpy() + targets.shift  # [M]
    rows = np.full(len(at), UNKNOWN_ROW, np.int64)  # [M]
    ids = None if ids is None else torch.as_tensor(ids).cpu().numpy()
    if ids is not None and ids.shape == shape[:1]:
        rows = ids[at // shape[1]]
    elif ids is not None and ids.shape == shape:
        rows = ids.reshape(-1)[at]
        positions = positions if places is None else torch.as_tensor(places).cpu().numpy().reshape(-1)[at]
    begins = np.ones(len(at), bool)  # [M]
    begins[1:] = (np.diff(document) != 0) | (np.diff(rows) != 0)
    starts = np.flatnonzero(begins)  # [D]
    found = np.empty(len(starts), DOCUMENT)
    found["step"], found["row"] = step, rows[starts]
    found["tokens"] = np.diff(starts, append=len(at))
    found["check"] = [checksum(part) for part in np.split(targets.labels.numpy(), starts[1:])]
    return found, positions

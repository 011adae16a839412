"""Rows from a file, a folder or the Hub, as prompts and completions."""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, logging

from .chats import are_chats, check_chats, to_answers
from .parser import in_a_line

TEST_SHARE = 0.1  # of a single file
# what is no Hub id, which may end in ".5"
FILES = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".yaml", ".zst", ".zip")
PROMPT, COMPLETION = "{prompt}", "{completion}"  # format strings, where nothing else is asked for


def load_rows(
    name: str | None,
    convert: Callable[[Dataset], Dataset],
    train: str = "train",
    test: str = "test",
    config: str | None = None,
) -> DatasetDict:
    """The training and the test split, of a folder, of a JSON Lines file (its last tenth is the test split) or of the
    Hub; rows as `convert` makes them.

    Raises:
        ValueError: In a sentence, for what holds no rows.
    """
    if not name:
        raise ValueError("There is no data: --dataset_name is a JSON Lines file, a folder of these, or a Hub id.")
    path = Path(name)
    if path.is_dir():
        files = {split: sorted(path.glob(f"{split}.jsonl*")) for split in (train, test)}
        missing = [split for split in files if not files[split]]
        if missing:
            raise ValueError(f"{path} has no file {' or '.join(f'{split}.jsonl[.gz]' for split in missing)}.")
        return DatasetDict({split: convert(read_file(files[split][0])) for split in files})
    if path.is_file():
        rows = convert(read_file(path))
        if len(rows) < 2:
            raise ValueError(f"{path} has one row; with a test row it needs two at least.")
        return rows.train_test_split(max(1, round(TEST_SHARE * len(rows))), shuffle=False)
    rows = load_from_hub(name, config)
    missing = [split for split in (train, test) if split not in rows]
    if missing:
        raise ValueError(f"{name} has no split {' or '.join(missing)}, only {', '.join(rows)}.")
    return DatasetDict({split: convert(rows[split]) for split in (train, test)})


def load_from_hub(name: str, config: str | None) -> DatasetDict:
    if name.startswith((".", "/", "~")) or name.lower().endswith(FILES) or name.count("/") > 1:
        raise ValueError(f"{name} is not here: --dataset_name is a JSON Lines file, a folder of these, or a Hub id.")
    try:
        return load_dataset(name, config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} is no file here, and no data set of the Hub: {in_a_line(error)}") from error


def read_file(path: str | os.PathLike) -> Dataset:
    """All rows of a JSON Lines file, `.gz` or not; raises a `ValueError` that names the line at fault."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not here: it is to be a JSON Lines file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: it has no rows.")
    try:
        with without_log():
            rows = load_dataset("json", data_files=glob.escape(str(path)), split="train")
    except KeyError as error:  # of datasets 4, where a later row lacks what the first one has
        raise ValueError(f"{path}: a row of the data has no field {error}.") from error
    except Exception as error:  # of several libraries, as they have it
        raise ValueError(find_fault(path) or f"{path} can't be read: {in_a_line(error)}") from error
    if not len(rows):
        raise ValueError(f"{path} is empty: it has no rows.")
    return rows


@contextmanager
def without_log() -> Iterator[None]:
    """What `datasets` logs of a file that it can't read is said in a sentence instead."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def find_fault(path: Path) -> str | None:
    """What is wrong with the first line that is no JSON object."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"{path}, line {number} is no JSON object ({{...}})."
        except json.JSONDecodeError as error:
            return f"{path}, line {number} is no JSON: {error.msg} at column {error.colno}."
        except (UnicodeDecodeError, OSError, EOFError) as error:
            return f"{path} can't be read: {in_a_line(error)}."
    return None


def to_rows(rows: Dataset, prompt: str, completion: str) -> Dataset:
    """Rows in a form of TRL's: chats as they are, unless the format strings are asked for, else prompts and
    completions by these.

    Raises:
        ValueError: That names the row at fault.
    """
    if (prompt, completion) == (PROMPT, COMPLETION) and are_chats(rows):
        return check_chats(rows)
    return to_prompt_completion(rows, prompt, completion)


def read_answers(file: str | os.PathLike, prompt: str, completion: str) -> list[dict[str, Any]]:
    """The rows of a file, each with a prompt and its completion."""
    return to_answers(to_rows(read_file(file), prompt, completion))


def to_prompt_completion(rows: Dataset, prompt: str, completion: str) -> Dataset:
    """Rows in TRL's prompt-completion form, by two format strings over a row's fields.

    Raises:
        ValueError: If a row lacks a field, or has nothing in it.
    """

    prompt, completion = (text.replace("\\n", "\n") for text in (prompt, completion))  # of a command line

    def convert(row: dict, index: int) -> dict[str, str]:
        has = {name: value for name, value in row.items() if value is not None}
        try:
            return {"prompt": prompt.format(**has), "completion": completion.format(**has)}
        except (AttributeError, TypeError) as error:  # of "{question.text}", "{question[text]}"
            raise ValueError(
                f"Row {index + 1} of the data does not suit --prompt and --completion: {error}."
            ) from error
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"Row {index + 1} of the data has no field {error}; it has {sorted(has)}: set --prompt and "
                "--completion."
            ) from error

    return rows.map(convert, with_indices=True, remove_columns=rows.column_names)

"""Rows from a file, a folder or the Hub, as prompts and completions."""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any, TextIO

from datasets import Dataset, DatasetDict, load_dataset, logging

from .chats import RENAMED, are_chats, check_chats, to_answers
from .parser import in_a_line

TEST_SHARE = 0.1  # of a single file
# what is no Hub id, which may end in ".5"
FILES = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".yaml", ".zst", ".zip")
READERS = {".csv": "from_csv", ".parquet": "from_parquet", ".arrow": "from_file"}  # of datasets.Dataset
PROMPT, COMPLETION = "{prompt}", "{completion}"  # format strings, where nothing else is asked for


def load_rows(
    name: str | None,
    prompt: str,
    completion: str,
    train: str = "train",
    test: str = "test",
    config: str | None = None,
) -> DatasetDict:
    """The training and the test split, of a folder, of a JSON Lines file (its last tenth is the test split) or of the
    Hub; rows as [`to_rows`] makes them by the two format strings.

    Raises:
        ValueError: In a sentence, for what holds no rows.
    """
    if not name:
        raise ValueError("There is no data: --dataset_name is a JSON Lines file, a folder of these, or a Hub id.")
    path, convert = Path(name), partial(to_rows, prompt=prompt, completion=completion)
    if path.is_dir():
        files = {split: sorted(path.glob(f"{split}.jsonl*")) for split in (train, test)}
        missing = [split for split in files if not files[split]]
        if missing:
            raise ValueError(f"{path} has no file {' or '.join(f'{split}.jsonl[.gz]' for split in missing)}.")
        return DatasetDict(
            {split: convert(read_file(file), written=written(file)) for split, (file, *_) in files.items()}
        )
    if path.is_file():
        rows = convert(read_file(path), written=written(path))
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


def open_text(path: Path) -> TextIO:
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else open(path, encoding="utf-8-sig")


class Written(float):
    """A number that is printed as its file has it: "1.50"."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __format__(self, form: str) -> str:
        return format(float(self), form) if form else self.text


def written(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The rows of a file that [`read_file`] reads, with values as they stand there. A column of a data set has one
    type: 2 beside 0.5 becomes "2.0", and a text that looks like a date a moment."""
    with open_text(Path(path)) as file:
        first = next(filter(None, map(str.strip, file)), "")
        file.seek(0)
        try:
            if first.startswith("["):  # one array, no lines
                yield from json.load(file, parse_float=Written)
            else:
                yield from (json.loads(line, parse_float=Written) for line in file if line.strip())
        except json.JSONDecodeError as error:
            raise ValueError(find_fault(Path(path))) from error


def find_fault(path: Path) -> str | None:
    """What is wrong with the first line that is no JSON object, or with the kind of file."""
    reader = READERS.get(path.suffix.lower())
    if reader is not None:
        made = f"datasets.Dataset.{reader}({str(path)!r}).to_json('rows.jsonl')"
        return f"{path} is no JSON Lines file, which is wanted here. This makes one: {made}"
    with open_text(path) as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"{path}, line {number} is no JSON object ({{...}})."
        except json.JSONDecodeError as error:
            return f"{path}, line {number} is no JSON by itself: {error.msg} at column {error.colno}."
        except (UnicodeDecodeError, OSError, EOFError) as error:
            return f"{path} can't be read: {in_a_line(error)}."
    return None


def to_rows(
    rows: Dataset, prompt: str, completion: str, written: Iterable[Mapping[str, Any]] | None = None
) -> Dataset:
    """Rows in a form of TRL's: chats as they are, unless the format strings are asked for, else prompts and
    completions by these, of the same rows as they are written where they come from a file.

    Raises:
        ValueError: That names the row at fault.
    """
    if (prompt, completion) == (PROMPT, COMPLETION) and are_chats(rows):
        return check_chats(rows)
    return to_prompt_completion(rows if written is None else written, prompt, completion)


def read_answers(file: str | os.PathLike, prompt: str, completion: str) -> list[dict[str, Any]]:
    """The rows of a file, each with a prompt and its completion."""
    return to_answers(to_rows(read_file(file), prompt, completion, written(file)))


def to_prompt_completion(rows: Iterable[Mapping[str, Any]], prompt: str, completion: str) -> Dataset:
    """Rows in TRL's prompt-completion form, by two format strings over a row's fields.

    Raises:
        ValueError: If one is no format string, or a row lacks a field, or has nothing in it.
    """
    forms = {"prompt": prompt.replace("\\n", "\n"), "completion": completion.replace("\\n", "\n")}  # of a command line
    for name, form in forms.items():
        check_form(name, form)
    return Dataset.from_list([formatted(row, number, forms) for number, row in enumerate(rows, 1)])


def check_form(name: str, form: str) -> None:
    try:
        list(Formatter().parse(form))
    except ValueError as error:
        raise ValueError(
            f"--{name} {form!r} is no format string: {error}. A brace of the text is written twice."
        ) from error


def formatted(row: Mapping[str, Any], number: int, forms: Mapping[str, str]) -> dict[str, str]:
    has = {name: value for name, value in row.items() if value is not None}
    try:
        return {name: form.format(**has) for name, form in forms.items()}
    except (AttributeError, TypeError, ValueError) as error:  # of "{question.text}", "{question[text]}", "{answer:d}"
        raise ValueError(f"Row {number} of the data does not suit --prompt and --completion: {error}.") from error
    except (KeyError, IndexError) as error:
        way = RENAMED if "conversations" in has else "set --prompt and --completion"
        raise ValueError(f"Row {number} of the data has no field {error}; it has {sorted(has)}: {way}.") from error

"""Rows that are chats: which are, what is wrong with them, and what is answered in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from ..evaluation.rows import to_answer
from ..training.chats import MESSAGES, PAIR, form_of, is_chat

READ_BY_TEMPLATES = ("tools", "chat_template_kwargs")  # columns beside the messages
RENAMED = "rename `conversations` to `messages`, each with a `role` (user, assistant) and a `content`"
AS_TEXT = "say by --prompt and --completion how a row becomes text"


def are_chats(rows: Dataset) -> bool:
    """Whether what TRL reads is messages, of one row at least."""
    form = form_of(rows.column_names)
    return form == MESSAGES or form == PAIR and not isinstance(rows.features["prompt"], Value)


def check_chats(rows: Dataset) -> Dataset:
    """Rows of messages, with the columns of their form alone.

    Raises:
        ValueError: That names the row at fault, if one is of another form, or has no assistant message.
    """
    form = form_of(rows.column_names)
    for number, row in enumerate(rows, 1):
        fault = find_fault(row, form)
        if fault is not None:
            raise ValueError(f"Row {number} of the data {fault}")
    return rows.select_columns([*form, *(name for name in READ_BY_TEMPLATES if name in rows.column_names)])


def find_fault(row: Mapping[str, Any], form: tuple[str, ...]) -> str | None:
    """What is wrong with a chat whose messages stand in the columns `form`, as the end of a sentence."""
    has = sorted(name for name, value in row.items() if value is not None)
    for name in form:
        if name not in has:
            return f"has no field {name!r}, as others have; it has {has}: all rows are to have one form."
        if not (isinstance(row[name], list) and row[name] and all(map(is_message, row[name]))):
            return f"has in {name!r} no list of messages, each with a role and a content."
    if not any(message["role"] == "assistant" for message in row[form[-1]]):
        return f"has no assistant message in {form[-1]!r}: there is nothing to learn."
    return None


def is_message(value: Any) -> bool:
    is_mapping = isinstance(value, Mapping) and isinstance(value.get("role"), str)
    return is_mapping and bool(value.get("content") is not None or value.get("tool_calls"))


def to_answers(rows: Iterable[Mapping[str, Any]], what: str = "the data") -> list[dict[str, Any]]:
    """Rows with a prompt and a completion, which is the last assistant message of a chat; raises a `ValueError` that
    names the row at fault."""
    answers = []
    for number, row in enumerate(rows, 1):
        try:
            answers.append(to_answer(row))
        except ValueError as error:
            raise ValueError(f"Row {number} of {what} can't be measured. {error}") from error
    return answers


def check_template(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, has_encoder: bool) -> None:
    """Raise a `ValueError` for chats that this tokenizer can't render, or that an encoder-decoder would read."""
    if not any(map(is_chat, rows)):
        return
    if has_encoder:
        raise ValueError(f"The rows are chats, which encoder-decoders are not given here: {AS_TEXT}.")
    if not tokenizer.chat_template:
        raise ValueError(
            f"The rows are chats, and the tokenizer has no chat template: take a chat model, or {AS_TEXT}."
        )

"""Which columns of a row TRL reads, and the tokens that SFTTrainer makes of them.

A chat is `messages`, or a `prompt` and a `completion` of messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]  # with a role and a content

PAIR, MESSAGES, TEXT = ("prompt", "completion"), ("messages",), ("text",)


def form_of(columns: Iterable[str]) -> tuple[str, ...]:
    """The columns that TRL reads: a prompt and a completion, where there are both, go before messages, and these
    before a text. Empty where there are none of them."""
    present = {*columns}
    return next((form for form in (PAIR, MESSAGES, TEXT) if {*form} <= present), ())


def form_of_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the columns that hold anything."""
    return form_of(name for name, value in row.items() if value is not None)


def is_chat(row: Mapping[str, Any]) -> bool:
    form = form_of_row(row)
    return form == MESSAGES or form == PAIR and all(isinstance(row[name], list) for name in PAIR)


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """All messages of a chat."""
    return row["prompt"] + row["completion"] if form_of_row(row) == PAIR else row["messages"]


def row_tokens(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], chat_template: str | None = None
) -> list[int]:
    """A row as SFTTrainer tokenises it: a text with the end token at its end, or a chat by the tokenizer's template or
    another.

    Raises:
        ValueError: For a row that is no text and no chat, or a tokenizer without an end token.
    """
    if is_chat(row):
        return chat_ids(tokenizer, messages_of(row), row, chat_template=chat_template)
    form = form_of_row(row)
    if not form:
        raise ValueError(
            f"A row with the columns {sorted(row)} can't be tokenised: give it `prompt` and `completion`, `messages`, "
            "`text`, or what it was tokenised to, `input_ids`."
        )
    if tokenizer.eos_token is None:
        raise ValueError("The tokenizer has no end token, which stands behind every text: set tokenizer.eos_token.")
    text = "".join(row[name] for name in form)
    return tokenizer(text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token)["input_ids"]


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], row: Mapping[str, Any], **options: Any
) -> list[int]:
    """Messages as the tokenizer's chat template renders them, with the row's `tools` and `chat_template_kwargs`, as
    SFTTrainer does. `options` are those of `apply_chat_template`."""
    tools = row.get("tools")
    options |= {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    options |= row.get("chat_template_kwargs") or {}
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]

"""Rows that are chats, in TRL's forms: `messages`, or a `prompt` and a `completion` of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]  # with a role and a content


def is_chat(row: Mapping[str, Any]) -> bool:
    both = (row.get("prompt"), row.get("completion"))
    return row.get("messages") is not None or all(isinstance(part, list) for part in both)


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """All messages of a chat."""
    return row["messages"] if row.get("messages") is not None else row["prompt"] + row["completion"]


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], row: Mapping[str, Any], **options: Any
) -> list[int]:
    """Messages as the tokenizer's chat template renders them, with the row's `tools` and `chat_template_kwargs`, as
    SFTTrainer does. `options` are those of `apply_chat_template`."""
    tools = row.get("tools")
    options |= {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    options |= row.get("chat_template_kwargs") or {}
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]

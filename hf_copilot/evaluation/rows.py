"""Rows with a prompt and a completion, as a Pilot is given them: labelled as in training, or to be answered.

Both are texts, or both are messages of a chat, which the tokenizer's chat template renders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import common_prefix_length

from ..training.chats import Message, chat_ids, is_chat, messages_of, row_tokens
from ..training.records import IGNORE

logger = logging.get_logger(__name__)


def ids_with_end(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None, is_read: bool = True
) -> list[int]:
    """A text as an encoder-decoder reads or writes it: with the end token.

    Args:
        max_length: Tokens at most, by default the tokenizer's `model_max_length`; that texts are cut is said once.
        is_read: Whether an encoder reads it, with an end token wherever it ends. What is written and cut has none:
            nothing ends there.
    """
    ids, end = tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id
    if end is None:
        raise ValueError("The tokenizer has no end token, with which texts of an encoder-decoder end: set eos_token.")
    ids = ids if ids[-1:] == [end] else [*ids, end]
    longest = tokenizer.model_max_length if max_length is None else max_length
    if len(ids) <= longest:
        return ids
    logger.warning_once(f"Texts of more than {longest} tokens are cut: by default the tokenizer's model_max_length.")
    return [*ids[: longest - 1], end] if is_read else ids[:longest]


def to_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the last assistant message of its chat as the completion, and what comes before it as the prompt; a
    row of texts as it is.

    Raises:
        ValueError: If no assistant message has a text.
    """
    if not is_chat(row):
        return dict(row)
    chat = messages_of(row)
    places = [i for i, message in enumerate(chat) if message["role"] == "assistant" and message.get("content")]
    if not places or not places[-1] or not isinstance(chat[places[-1]]["content"], str):
        raise ValueError("After a question there is to be an assistant message with a text.")
    rest = {name: value for name, value in row.items() if name != "messages"}
    return rest | {"prompt": chat[: places[-1]], "completion": chat[places[-1] : places[-1] + 1]}


def text_of(part: str | Sequence[Message]) -> str:
    """A text, or what the last message of a chat says."""
    return part if isinstance(part, str) else part[-1]["content"]


def expected_answer(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> str:
    """A row's completion as [`generate_answers`] would give it: without an end token, say, that its text ends with."""
    ids = tokenizer(text_of(row["completion"]), add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True)


def prompt_of(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> str | list[int]:
    """What a Pilot reads before it answers: a text, or token ids of messages and the beginning of its turn."""
    return chat_ids(tokenizer, row["prompt"], row, add_generation_prompt=True) if is_chat(row) else row["prompt"]


def label_row(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], has_encoder: bool) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a row, as for [`score`]: what SFTTrainer makes of a prompt and a completion, or for
    an encoder-decoder the prompt and the completion."""
    if has_encoder:
        return {
            "input_ids": ids_with_end(tokenizer, row["prompt"]),
            "labels": ids_with_end(tokenizer, row["completion"], is_read=False),
        }
    ids, prompt = row_tokens(tokenizer, row), as_ids(tokenizer, prompt_of(tokenizer, row), has_encoder=False)
    border = common_prefix_length(prompt, ids)
    return {"input_ids": ids, "labels": [IGNORE] * border + ids[border:]}


def as_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[int], has_encoder: bool) -> list[int]:
    """A prompt as it is read before an answer: by a decoder without an end token that the tokenizer adds."""
    if not isinstance(prompt, str):
        return prompt
    if has_encoder:
        return ids_with_end(tokenizer, prompt)
    ids, end = tokenizer(prompt)["input_ids"], tokenizer.eos_token_id
    if not prompt or ids[-1:] != [end]:  # of nothing, one that begins a text is left, which may be the same
        return ids
    own = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids[:-1] if ids[-len(own) - 1 :] == [*own, end] else ids


@torch.no_grad()
def generate_answers(
    pilot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    processor: LogitsProcessor | None,
    title: str | None = None,
    batch_size: int = 64,
    **generation,
) -> list[str]:
    """The text after each prompt (of an encoder-decoder all its text), in batches; with a title, a progress bar. A
    prompt is a text or its token ids."""
    answers, has_encoder = [], pilot.config.is_encoder_decoder
    side = "right" if has_encoder else "left"
    processors = [processor] if processor is not None else []
    for start in tqdm(range(0, len(prompts), batch_size), desc=title, disable=title is None):
        ids = [as_ids(tokenizer, prompt, has_encoder) for prompt in prompts[start : start + batch_size]]
        if not all(ids):
            raise ValueError("A prompt without a token can't be answered: a decoder goes on from one at least.")
        inputs = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt").to(pilot.device)
        out = pilot.generate(**inputs, logits_processor=processors, pad_token_id=tokenizer.pad_token_id, **generation)
        prompt = 0 if has_encoder else inputs["input_ids"].shape[1]
        answers += tokenizer.batch_decode(out[:, prompt:], skip_special_tokens=True)
    return answers

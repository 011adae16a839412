"""Rows with a prompt and a completion, as a Pilot is given them: labelled as in training, or to be answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..training.records import IGNORE


def ids_with_end(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int = 512) -> list[int]:
    """A text as an encoder-decoder reads and writes it: with the end token."""
    ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def label_row(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, str], has_encoder: bool) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a row, as for [`score`]: what SFTTrainer makes of it, or for an encoder-decoder the
    prompt and the completion."""
    if has_encoder:
        return {
            "input_ids": ids_with_end(tokenizer, row["prompt"]),
            "labels": ids_with_end(tokenizer, row["completion"]),
        }
    end = "" if row["completion"].endswith(tokenizer.eos_token) else tokenizer.eos_token
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = tokenizer(row["prompt"] + row["completion"] + end)["input_ids"]
    same = [a == b for a, b in zip(prompt, ids, strict=False)] + [False]
    border = same.index(False)  # the first token in which both differ, in most tokenizers behind the prompt
    return {"input_ids": ids, "labels": [IGNORE] * border + ids[border:]}


@torch.no_grad()
def generate_answers(
    pilot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    processor: LogitsProcessor | None,
    title: str | None = None,
    batch_size: int = 64,
    **generation,
) -> list[str]:
    """The text after each prompt (of an encoder-decoder all its text), in batches; with a title, a progress bar."""
    answers, has_encoder = [], pilot.config.is_encoder_decoder
    side = "right" if has_encoder else "left"
    processors = [processor] if processor is not None else []
    for start in tqdm(range(0, len(prompts), batch_size), desc=title, disable=title is None):
        texts = prompts[start : start + batch_size]
        ids = [ids_with_end(tokenizer, text) if has_encoder else tokenizer(text)["input_ids"] for text in texts]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt").to(pilot.device)
        out = pilot.generate(**inputs, logits_processor=processors, pad_token_id=tokenizer.pad_token_id, **generation)
        prompt = 0 if has_encoder else inputs["input_ids"].shape[1]
        answers += tokenizer.batch_decode(out[:, prompt:], skip_special_tokens=True)
    return answers

"""Answers by `model.generate` and a table of Pilot beside Pilot + Copilot; shared by the recipes."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


def ids_with_end(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int = 512) -> list[int]:
    """A text as an encoder-decoder reads and writes it: with the end token."""
    ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


@torch.no_grad()
def generate_answers(
    pilot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    processor: LogitsProcessor | None,
    title: str,
    batch_size: int = 64,
    **generation,
) -> list[str]:
    """The text after each prompt (of an encoder-decoder all its text), in batches, with a progress bar."""
    answers, has_encoder = [], pilot.config.is_encoder_decoder
    side = "right" if has_encoder else "left"
    processors = [processor] if processor is not None else []
    for start in tqdm(range(0, len(prompts), batch_size), desc=title):
        texts = prompts[start : start + batch_size]
        ids = [ids_with_end(tokenizer, text) if has_encoder else tokenizer(text)["input_ids"] for text in texts]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt").to(pilot.device)
        out = pilot.generate(**inputs, logits_processor=processors, pad_token_id=tokenizer.pad_token_id, **generation)
        prompt = 0 if has_encoder else inputs["input_ids"].shape[1]
        answers += tokenizer.batch_decode(out[:, prompt:], skip_special_tokens=True)
    return answers


def print_comparison(title: str, pilot: torch.Tensor, rectified: torch.Tensor, metrics: dict[str, float]) -> None:
    """Both accuracies with their standard errors, the paired difference, and the teacher-forced figures.

    Args:
        title: Of the table.
        pilot, rectified: `[items]` float, 1 where the answer is right; the same items.
        metrics: Of `trainer.evaluate`, on the same items.
    """
    table = Table(title=title)
    for column in ("", "exact match", "s.e.", "NLL/token", "token acc."):
        table.add_column(column, justify="right" if column else "left")
    figures = {
        name: [metrics[f"eval_{name}_nll"], metrics[f"eval_{name}_token_accuracy"]] for name in ("pilot", "rectified")
    }
    change = [after - before for before, after in zip(*figures.values(), strict=True)]
    rows = (
        ("Pilot", pilot, figures["pilot"]),
        ("Pilot + Copilot", rectified, figures["rectified"]),
        ("difference (paired)", rectified - pilot, change),
    )
    for name, hits, (nll, accuracy) in rows:
        error = hits.std() / len(hits) ** 0.5
        table.add_row(name, f"{hits.mean():.1%}", f"{error:.1%}", f"{nll:.4f}", f"{accuracy:.1%}")
    Console().print(table)

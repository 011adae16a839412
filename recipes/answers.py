"""Answers by `model.generate` and a table of Pilot beside Pilot + Copilot; shared by the recipes."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


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
    """The text after each prompt (of an encoder-decoder all its text), in left-padded batches, with a progress bar."""
    answers = []
    tokenizer.padding_side = "left"
    processors = [processor] if processor is not None else []
    for start in tqdm(range(0, len(prompts), batch_size), desc=title):
        inputs = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True).to(pilot.device)
        inputs.pop("token_type_ids", None)
        out = pilot.generate(**inputs, logits_processor=processors, pad_token_id=tokenizer.pad_token_id, **generation)
        prompt = 0 if pilot.config.is_encoder_decoder else inputs["input_ids"].shape[1]
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

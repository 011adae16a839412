"""Figures of a Pilot, alone or rectified, for every test item: teacher-forced likelihood and generated answers.

Teacher-forced figures, λ's choice among them, feed the Copilot realised discrepancies; `error_feedback="predicted"`
(the paper's preset) shows in generated answers alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_copilot import CopilotLearner, CopilotLogitsProcessor
from hf_copilot.model.discrepancy import fuse
from hf_copilot.training.records import IGNORE

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "recipes"))

from answers import generate_answers  # noqa: E402

BATCH = 32


class Figures(NamedTuple):
    """One figure of every test item; the mean over items is Σ weight · value / Σ weight."""

    values: list[float]
    weights: list[float] | None = None


@dataclass
class Rectified:
    """A Pilot in eval mode, with the Copilot of `learner` at λ, or alone."""

    pilot: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    learner: CopilotLearner | None = None
    strength: float = 0.0

    def answers(self, prompts: list[str], title: str, max_new_tokens: int, **generation: Any) -> list[str]:
        """Greedy answers by `model.generate`."""
        title = f"{title}, λ = {self.strength:g}" if self.learner else title
        with self.processor() as processor:
            return generate_answers(
                self.pilot,
                self.tokenizer,
                prompts,
                processor,
                title,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **generation,
            )

    def processor(self):
        """A context with the logits processor, or None for the Pilot alone."""
        if self.learner is None:
            return nullcontext()
        return CopilotLogitsProcessor(self.learner.copilot, self.pilot, strength=self.strength)

    @torch.no_grad()
    def token_scores(self, inputs: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Chunks of c targets, teacher-forced: their rows in the batch `[c]`, log p̃ `[c, V]`, labels `[c]`."""
        if self.learner is None:
            logits = self.pilot(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1]  # [B, T - 1, V]
            rows, positions = (inputs["labels"][:, 1:] != IGNORE).nonzero(as_tuple=True)  # [Q], [Q]
            yield rows, logits[rows, positions].float().log_softmax(-1), inputs["labels"][rows, positions + 1]
            return
        learner, config = self.learner, self.learner.copilot.config
        learner.copilot.eval()
        records = learner.forced.read(inputs, lambda: self.pilot(**inputs))
        learner.close()
        if len(records) != len(inputs["labels"]):
            raise ValueError("A row has no target, or the Pilot's forward on it is not finite: it can't be scored.")
        batch = learner.forced.collate(records)
        rows = batch.valid.nonzero()[:, 0]  # [Q]
        for chunk, logits, correction in learner.forced.corrections(batch):
            scores = fuse(logits.log_softmax(-1), correction, self.strength, config.fusion)  # [c, V]
            yield rows[chunk], scores, batch.labels[chunk]

    def log_likelihoods(self, examples: list[dict[str, list[int]]]) -> torch.Tensor:
        """Of the completions of encoded rows: `[rows, 3]` with Σ log p̃, top-1 hits, and targets."""
        sums = torch.zeros(len(examples), 3, dtype=torch.float64)
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
        for start in range(0, len(order), BATCH):
            picked = torch.tensor(order[start : start + BATCH])  # [B]
            for rows, scores, labels in self.token_scores(self.collate([examples[i] for i in picked])):
                label = labels[:, None]  # [c, 1]
                log_p, hit = scores.gather(-1, label)[:, 0], scores.argmax(-1) == labels  # [c], [c]
                figures = torch.stack([log_p, hit.float(), torch.ones_like(log_p)], dim=-1)  # [c, 3]
                sums.index_add_(0, picked[rows.cpu()], figures.double().cpu())
        return sums

    def collate(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Encoded rows, padded on the right."""
        ids = self.tokenizer.pad(
            {"input_ids": [example["input_ids"] for example in examples]}, padding_side="right", return_tensors="pt"
        )
        labels = torch.full_like(ids["input_ids"], IGNORE)
        for row, example in zip(labels, examples, strict=True):
            row[: len(example["labels"])] = torch.tensor(example["labels"])
        return {name: tensor.to(self.pilot.device) for name, tensor in (ids | {"labels": labels}).items()}

    def calibrate(self, examples: list[dict[str, list[int]]]) -> dict[str, Any]:
        """Choose λ on encoded rows; the figures at every λ."""
        with self.learner.calibrate(data=f"{len(examples)} validation rows"), torch.no_grad():
            for start in tqdm(range(0, len(examples), BATCH), desc="calibration"):
                inputs = self.collate(examples[start : start + BATCH])
                with self.learner.evaluate(inputs):
                    self.pilot(**inputs)
        self.learner.close()
        return self.learner.copilot.config.calibration


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], max_length: int) -> dict[str, list[int]]:
    """Prompt, completion and end token; labels on the completion. Long prompts lose their beginning."""
    completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    completion = completion[:max_length]
    room = max_length - len(completion)
    prompt = tokenizer(row["prompt"])["input_ids"]
    prompt = prompt[len(prompt) - min(room, len(prompt)) :]
    return {"input_ids": prompt + completion, "labels": [IGNORE] * len(prompt) + completion}


def likelihood(sums: torch.Tensor) -> dict[str, Figures]:
    """What every task has: NLL per token (nats) and top-1 accuracy, from [`Rectified.log_likelihoods`]."""
    tokens = sums[:, 2]
    return {
        "nll": Figures((-sums[:, 0] / tokens).tolist(), tokens.tolist()),
        "token accuracy": Figures((sums[:, 1] / tokens).tolist(), tokens.tolist()),
    }

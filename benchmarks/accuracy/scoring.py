"""Figures of a Pilot, alone or rectified, for every test item: teacher-forced likelihood and generated answers.

Teacher-forced figures, λ's choice among them, feed the Copilot realised discrepancies; `error_feedback="predicted"`
(the paper's preset) shows in generated answers alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_copilot import CopilotLearner, CopilotLogitsProcessor
from hf_copilot.evaluation.rows import generate_answers
from hf_copilot.training.records import IGNORE

BATCH = 32
Example = dict[str, list[int]]  # `input_ids` and `labels` of a row


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
    def log_likelihoods(self, examples: list[Example]) -> torch.Tensor:
        """Of the completions of encoded rows: `[rows, 3]` with Σ log p̃, top-1 hits, and targets."""
        if self.learner is None:
            return self._log_likelihoods_of_pilot(examples)
        with self.learner.forced as forced:
            scores = forced.score(examples, [self.strength], BATCH)
        rows = [(s.log_likelihoods.double().sum(), s.is_likeliest.sum(), s.is_likeliest.numel()) for s in scores]
        return torch.tensor(rows, dtype=torch.float64)

    def _log_likelihoods_of_pilot(self, examples: list[Example]) -> torch.Tensor:
        """Likewise without a Copilot: log p̂."""
        sums = torch.zeros(len(examples), 3, dtype=torch.float64)
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
        for start in range(0, len(order), BATCH):
            picked = order[start : start + BATCH]
            inputs = self.collate([examples[i] for i in picked])
            labels = inputs.pop("labels")[:, 1:]  # [B, T - 1]
            scores = self.pilot(**inputs).logits[:, :-1].float().log_softmax(-1)  # [B, T - 1, V]
            targets = labels != IGNORE
            log_p = scores.gather(-1, labels.clamp_min(0)[..., None])[..., 0]  # [B, T - 1]
            hits = scores.argmax(-1) == labels
            figures = [(column * targets).double().sum(1).cpu() for column in (log_p, hits, targets)]  # [B] each
            sums[picked] = torch.stack(figures, dim=1)
        return sums

    def collate(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Encoded rows, padded on the right."""
        ids = self.tokenizer.pad(
            {"input_ids": [example["input_ids"] for example in examples]}, padding_side="right", return_tensors="pt"
        )
        labels = torch.full_like(ids["input_ids"], IGNORE)
        for row, example in zip(labels, examples, strict=True):
            row[: len(example["labels"])] = torch.tensor(example["labels"])
        return {name: tensor.to(self.pilot.device) for name, tensor in (ids | {"labels": labels}).items()}

    def calibrate(self, examples: list[Example]) -> dict[str, Any]:
        """Choose λ on encoded rows; the figures at every λ."""
        with self.learner.calibrate(data=f"{len(examples)} validation rows"), torch.no_grad():
            for start in tqdm(range(0, len(examples), BATCH), desc="calibration"):
                inputs = self.collate(examples[start : start + BATCH])
                with self.learner.evaluate(inputs):
                    self.pilot(**inputs)
        self.learner.close()
        return self.learner.copilot.config.calibration


def beside(alone: Rectified, learner: CopilotLearner) -> Rectified:
    """A Pilot with a Copilot at its own λ."""
    return replace(alone, learner=learner, strength=learner.copilot.config.strength)


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], max_length: int) -> Example:
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

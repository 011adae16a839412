"""Figures of a trained Pilot and what stands beside it: likelihoods at a grid of weights, and generated answers.

Two sets of logits are mixed, α z + λ f: z the Pilot's, f the Copilot's correction (α = 1), or the logits of another
model (an ensemble). Shapes: c targets, V vocabulary, G pairs of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.pretrained.steps import collate, decoded
from benchmarks.pretrained.tasks import Example, Row, Task
from benchmarks.pretrained.variants import Learner, SecondModel
from hf_copilot.model.discrepancy import fuse, row_chunks
from hf_copilot.training.records import IGNORE

Weights = tuple[float, float]  # α, λ
ALONE: Weights = (1.0, 0.0)
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0)
PILOT_GRID = [ALONE] + [(scale, 0.0) for scale in (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3)]  # a temperature
COPILOT_GRID = [(1.0, strength) for strength in STRENGTHS]
ENSEMBLE_GRID = [ALONE] + [
    (round(total * (1 - share), 3), round(total * share, 3))
    for total in (0.8, 1.0, 1.2, 1.5)
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
]
TEMPERATURE = 0.7


@dataclass
class Likelihoods:
    """Of the completions of rows: `nll` and `hits` `[G, rows]`, sums over a row's targets, and `tokens` `[rows]`."""

    grid: list[Weights]
    nll: torch.Tensor
    hits: torch.Tensor
    tokens: torch.Tensor

    def means(self) -> tuple[list[float], list[float]]:
        """NLL and token accuracy at each of the grid."""
        total = self.tokens.sum()
        return (self.nll.sum(1) / total).tolist(), (self.hits.sum(1) / total).tolist()

    def best(self, by: str) -> Weights:
        """By least NLL, or by most hits and of equals by least NLL."""
        nll, accuracy = self.means()
        keys = [(-a if by == "accuracy" else 0.0, n, i) for i, (n, a) in enumerate(zip(nll, accuracy, strict=True))]
        return self.grid[min(keys)[-1]]

    def at(self, weights: Weights) -> dict[str, list[float]]:
        """Of every row."""
        i = self.grid.index(weights)
        return {"nll": [round(x, 4) for x in self.nll[i].tolist()], "hits": [int(x) for x in self.hits[i].tolist()]}


@dataclass
class Model:
    """A Pilot, and beside it a Copilot (`learner`), another model (`second`), or nothing."""

    pilot: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    learner: Learner | None = None
    second: PreTrainedModel | None = None

    @property
    def grid(self) -> list[Weights]:
        if self.learner is None and self.second is None:
            return PILOT_GRID
        return ENSEMBLE_GRID if self.second is not None or self.learner.alone else COPILOT_GRID

    @torch.no_grad()
    def likelihoods(self, examples: list[Example], batch_size: int = 32) -> Likelihoods:
        """Teacher-forced, at each of the grid."""
        grid, order = self.grid, sorted(range(len(examples)), key=lambda i: -sum(map(len, examples[i])))
        sums = torch.zeros(2, len(grid), len(examples), device=self.pilot.device)
        for start in range(0, len(order), batch_size):
            picked = torch.tensor(order[start : start + batch_size], device=self.pilot.device)  # [B]
            for rows, z, f, labels in self.logits([examples[i] for i in picked.tolist()]):
                at, label = picked[rows.to(picked.device)], labels[:, None]  # [c], [c, 1]
                for i, weights in enumerate(grid):
                    mixed = self.mixed(z, f, weights)  # [c, V]
                    chosen = mixed.gather(-1, label)[:, 0]  # [c]
                    sums[0, i].index_add_(0, at, mixed.logsumexp(-1) - chosen)
                    sums[1, i].index_add_(0, at, (mixed.argmax(-1) == labels).float())
        tokens = torch.tensor([float(len(example.completion)) for example in examples], dtype=torch.float64)
        return Likelihoods(grid, *sums.double().cpu(), tokens)

    def nll(self, examples: list[Example]) -> float:
        """The least of the grid's."""
        return min(self.likelihoods(examples).means()[0])

    def mixed(self, z: torch.Tensor, f: torch.Tensor | None, weights: Weights) -> torch.Tensor:
        """α z + λ f `[c, V]`, or Eq. 8 for a Copilot that was trained for it."""
        if f is None:
            return weights[0] * z
        if self.learner is not None and self.learner.copilot.config.fusion == "probability":
            return fuse(z.log_softmax(-1), f, weights[1], "probability")
        return weights[0] * z + weights[1] * f

    def logits(self, examples: list[Example]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Chunks of c targets: their rows in the batch `[c]`, z `[c, V]`, f `[c, V]` or None, labels `[c]`."""
        inputs = collate(examples, self.tokenizer.pad_token_id, self.pilot.device)
        if self.learner is not None:
            yield from self._with_copilot(inputs)
            return
        models = [self.pilot] if self.second is None else [self.pilot, self.second]
        for rows, (z, *other), labels in logits_of(models, inputs):
            yield rows, z, other[0] if other else None, labels

    def _with_copilot(self, inputs: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
        forced = self.learner.forced
        records = forced.read(inputs, lambda: decoded(self.pilot, inputs))
        if len(records) != len(inputs["labels"]):
            raise ValueError("The Pilot's forward on a row is not finite: it can't be scored.")
        batch = forced.collate(records)
        rows, _ = batch.queries  # [Q]
        for chunk, z, f in forced.corrections(batch):
            yield rows[chunk], z, f, batch.labels[chunk]

    @torch.no_grad()
    def answers(self, examples: list[Example], task: Task, weights: Weights, samples: int = 0) -> list[list[str]]:
        """For every row one greedy answer, or `samples` at temperature 0.7."""
        found: list[list[str]] = [[] for _ in examples]
        order, copies = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt)), max(samples, 1)
        size = max(task.batch_size // copies, 1)
        how: dict[str, Any] = {"do_sample": False}
        if samples:
            how = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
            how["num_return_sequences"] = samples
        for start in range(0, len(order), size):
            picked = order[start : start + size]
            for i, text in enumerate(self._generate([examples[i].prompt for i in picked], weights, task, how)):
                found[picked[i // copies]].append(text)
        return found

    def _generate(self, prompts: list[list[int]], weights: Weights, task: Task, how: dict[str, Any]) -> list[str]:
        pad, length = self.tokenizer.pad_token_id, max(map(len, prompts))
        ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts], device=self.pilot.device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.pilot.device)
        with self.processor(weights, mask) as processor:
            out = self.pilot.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=[] if processor is None else [processor],
                max_new_tokens=task.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=self.tokenizer.eos_token_id,
                **how,
            )
        return self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)

    def processor(self, weights: Weights, mask: torch.Tensor) -> AbstractContextManager:
        """A context with what mixes the logits in `generate`, or None for the Pilot alone, whose greedy answers no
        temperature changes."""
        if weights[1] == 0:
            return nullcontext()
        if self.learner is not None:
            return self.learner.processor(weights)
        return nullcontext(SecondModel(self.second, mask, weights))

    def right(
        self, rows: list[Row], examples: list[Example], task: Task, weights: Weights, samples: int = 0
    ) -> list[float]:
        """The share of a row's answers that are right."""
        answers = self.answers(examples, task, weights, samples)
        return [
            sum(task.right(text, row) for text in texts) / len(texts) for texts, row in zip(answers, rows, strict=True)
        ]


def logits_of(
    models: list[PreTrainedModel], inputs: dict[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]]:
    """Chunks of c targets: their rows in the batch `[c]`, every model's logits `[c, V]`, labels `[c]`."""
    rows, positions = (inputs["labels"][:, 1:] != IGNORE).nonzero(as_tuple=True)  # [Q], [Q]
    labels = inputs["labels"][rows, positions + 1]  # [Q]
    hidden = [decoded(model, inputs)[rows, positions] for model in models]  # [Q, d_P] each
    for chunk in row_chunks(len(rows), models[0].config.vocab_size):
        logits = [m.get_output_embeddings()(h[chunk]).float() for m, h in zip(models, hidden, strict=True)]
        yield rows[chunk], logits, labels[chunk]

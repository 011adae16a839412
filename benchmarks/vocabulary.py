"""What a Copilot's two vocabulary matrices cost in training, and three ways to do with less: time, memory, file.

    python -m benchmarks.vocabulary      # writes benchmarks/results/vocabulary.json

State Copilots of two layers beside the Pilot of benchmarks/cost.py, on a CPU. All take a step on the same documents,
by turns, every second time in reverse; times are processor time, and ratios to full matrices those of a turn. What
each costs in likelihood is not asked here.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.common import RESULTS, device_name, table
from benchmarks.cost import SHAPES, Work, make_pilot, spread
from hf_copilot import CopilotConfig, CopilotLearner, CopilotModel, copilot_for
from hf_copilot.model.modeling_copilot import Vocabulary
from hf_copilot.training.preflight import memory_bytes
from hf_copilot.training.report import count_parameters

RANK, REPETITIONS, WARM_UP = 64, 6, 2
WORK = Work(26, 8, 1)  # labelled tokens of 256, rows, micro-batches


class LowRank(CopilotModel):
    """E = E' B and W = W' C with E', W' `[V, r]`: the Copilot reads and writes r numbers of a token."""

    def __init__(self, config: CopilotConfig, rank: int):
        super().__init__(config)
        size, vocab_size = config.hidden_size, config.vocab_size
        self.embed_tokens, self.input_proj = nn.Embedding(vocab_size, rank), nn.Linear(rank, size, bias=False)
        self.output_proj, self.lm_head = nn.Linear(size, rank, bias=False), nn.Linear(rank, vocab_size, bias=False)
        nn.init.zeros_(self.lm_head.weight)


class FrozenWithAdapter(CopilotModel):
    """E and W are frozen copies; W has a change of low rank, W + A B, with A `[V, r]`, B `[r, d]`."""

    def __init__(self, config: CopilotConfig, rank: int):
        super().__init__(config)
        self.head_up = nn.Parameter(torch.zeros(config.vocab_size, rank))
        self.head_down = nn.Parameter(torch.randn(rank, config.hidden_size) * config.hidden_size**-0.5)
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def vocabulary(self, lent: Vocabulary | None) -> Vocabulary:
        vocabulary = super().vocabulary(lent)
        return vocabulary._replace(head=vocabulary.head + self.head_up @ self.head_down)  # [V, d]


def full(pilot: PreTrainedModel) -> CopilotModel:
    return copilot_for(pilot, CopilotConfig(memory="pilot"))


def lent(pilot: PreTrainedModel) -> CopilotModel:
    return copilot_for(pilot, CopilotConfig(memory="pilot", vocab_projection="pilot"))


def arms(rank: int) -> dict[str, Callable[[PreTrainedModel], CopilotModel]]:
    return {
        "full matrices (default)": full,
        f"low rank, {rank}": lambda pilot: LowRank(full(pilot).config, rank),
        f"frozen copies, W with an adapter of rank {rank}": lambda pilot: FrozenWithAdapter(full(pilot).config, rank),
        "lent by the Pilot": lent,
    }


def measure(rank: int = RANK, repetitions: int = REPETITIONS, work: Work = WORK) -> list[dict[str, Any]]:
    """Rows of a table, one for each arm."""
    pilot = make_pilot("cpu", "cpu").train()
    learners = {name: CopilotLearner(make(pilot), pilot, 1000, steps_per_round=1) for name, make in arms(rank).items()}
    for learner in learners.values():
        learner.close()
    (batch,), seconds = work.batches(SHAPES["cpu"]["vocab_size"], "cpu"), {name: [] for name in learners}
    for repetition in range(-WARM_UP, repetitions):
        for name in list(learners)[:: -1 if repetition % 2 else 1]:
            with learners[name].observe(batch):
                pilot(**batch, fused_lm_head=True)
            begun = time.process_time()
            learners[name].step()
            learners[name].close()
            if repetition >= 0:
                seconds[name].append(time.process_time() - begun)
    base = next(iter(seconds.values()))
    return [row(name, learner.copilot, seconds[name], base) for name, learner in learners.items()]


def row(name: str, copilot: CopilotModel, seconds: list[float], base: list[float]) -> dict[str, Any]:
    parameters, trained = count_parameters(copilot)
    return {
        "vocabulary": name,
        "trained_m": trained / 1e6,
        "step_s": statistics.median(seconds),
        **spread(sorted(own / other for own, other in zip(seconds, base, strict=True))),
        "memory_mb": memory_bytes(copilot) / 1e6,
        "file_mb": 4 * parameters / 1e6,
    }


def main() -> None:
    logging.set_verbosity_error()
    rows = measure()
    found = {"device": device_name("cpu"), "threads": torch.get_num_threads(), "shape": SHAPES["cpu"], "rows": rows}
    (RESULTS / "vocabulary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()

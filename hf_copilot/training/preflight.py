"""What a run will take: memory and disk from shapes, before it begins; time and the log from its first rounds."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import psutil
import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from .distributed import local_processes, num_processes
from .learner import CopilotLearner

WARM_UP, MEASURED = 2, 8  # rounds


def trained_bytes(copilot: nn.Module) -> int:
    """Of the weights that learn: their gradients take as much, and each of AdamW's two moments."""
    return sum(parameter.nbytes for parameter in copilot.parameters() if parameter.requires_grad)


def memory_bytes(copilot: nn.Module) -> int:
    """Of all weights, the gradients and AdamW's moments; activations come on top."""
    return sum(parameter.nbytes for parameter in copilot.parameters()) + 3 * trained_bytes(copilot)


def checkpoint_bytes(learner: CopilotLearner) -> int:
    """Of the Copilot's part of a checkpoint, without the Mistake Log: its exported weights, AdamW's moments, and with
    an adapter its weights once more, unmerged."""
    named = learner.copilot.named_parameters()
    weights = sum(parameter.nbytes for name, parameter in named if ".original_module." not in name)
    return weights * (1 if learner.peft_model is None else 2) + 2 * trained_bytes(learner.copilot)


def log_bytes(learner: CopilotLearner) -> int:
    """Of the Mistake Log when it is full: as the rounds so far; before the first, its bound."""
    log = learner.log
    if not log.rounds:
        return log.max_bytes
    return min(log.nbytes * log.max_rounds // len(log.rounds), log.max_bytes)


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def free_disk(folder: str | os.PathLike) -> int:
    """Where a folder is, or will be."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def checkpoints_to_come(args: TrainingArguments, state: TrainerState) -> int:
    """How many more will be on disk at the end."""
    if args.save_strategy == "no":
        return 0
    epochs = state.num_train_epochs if state.num_train_epochs <= state.max_steps else 1  # of a stream no one knows
    left = state.max_steps - state.global_step
    each = {
        "steps": math.ceil(left / max(state.save_steps, 1)),  # one at the last step
        "epoch": math.ceil(left * epochs / max(state.max_steps, 1)),
    }
    saved = int(each.get(args.save_strategy, 1))
    return min(saved, args.save_total_limit or saved)


def find_shortages(learner: CopilotLearner, args: TrainingArguments, state: TrainerState) -> list[str]:
    """What will not fit, in one sentence each: of the Mistake Log only once there are rounds to tell its size from."""
    has_begun = bool(learner.log.rounds)
    log = log_bytes(learner) if has_begun else 0
    saved_log = log if getattr(args, "copilot_save_mistake_log", True) else 0
    needs = [
        (
            f"The Copilot's gradients and AdamW's moments on {learner.device}",
            0 if has_begun else 3 * trained_bytes(learner.copilot),
            free_memory(learner.device),
            "train a smaller Copilot, or one with copilot_peft_config",
        ),
        (
            "The Mistake Log in CPU memory",
            local_processes() * (log - learner.log.nbytes) if has_begun else 0,
            free_memory(torch.device("cpu")),
            "lower copilot_log_max_bytes or copilot_log_rounds",
        ),
        (
            f"The Copilot's part of the checkpoints in {args.output_dir}",
            checkpoints_to_come(args, state) * (checkpoint_bytes(learner) + num_processes() * saved_log),
            free_disk(args.output_dir),
            "set save_total_limit, copilot_save_mistake_log=False, or a lower copilot_log_max_bytes",
        ),
    ]
    return [
        f"{what} will take {in_words(needed)} more, and {in_words(free)} are free: {way_out}."
        for what, needed, free, way_out in needs
        if needed > free
    ]


def in_words(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


class Stopwatch:
    """How long the first rounds take, data loading with them, and how much of it is the Copilot's."""

    def __init__(self, device: torch.device):
        self.device, self.round = device, 0
        self.total, self.own = 0.0, 0.0  # seconds
        self.since: float | None = None  # of what is not in `total` yet

    @property
    def is_running(self) -> bool:
        return WARM_UP < self.round <= WARM_UP + MEASURED

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return perf_counter()

    def begin_round(self) -> None:
        self.round += 1
        if self.since is None and self.is_running:
            self.since = self._now()

    @contextmanager
    def of_copilot(self) -> Iterator[None]:
        """Inside it is the Copilot's time."""
        begun = self._now() if self.is_running else 0.0
        yield
        self.own += self._now() - begun if self.is_running else 0.0

    def end_round(self, pauses: bool = False) -> bool:
        """Whether this was the last round that is measured. What comes after it is left out where the run pauses, to
        evaluate or to save."""
        now = self._now() if WARM_UP <= self.round <= WARM_UP + MEASURED else 0.0
        if self.is_running:
            self.total += now - self.since
        self.since = None if pauses else now
        return self.round == WARM_UP + MEASURED

    @property
    def share(self) -> float:
        """The Copilot's time for one of the rest."""
        return self.own / max(self.total - self.own, 1e-9)

"""What several processes of one run must agree on. With one process every function does nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import distributed as dist
from transformers import TrainingArguments

from .records import IGNORE, find_documents


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_processes() -> int:
    """Of this machine, by what torchrun and accelerate say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes()))


def process_index() -> int:
    return dist.get_rank() if num_processes() > 1 else 0


@torch.no_grad()
def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Replace every tensor by its sum over all processes; each must call it with tensors of the same shapes."""
    if num_processes() == 1:
        return
    for handle in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        handle.wait()


@torch.no_grad()
def copy_from_main_process(tensors: Iterable[torch.Tensor]) -> None:
    """Replace every tensor by the main process's."""
    if num_processes() == 1:
        return
    for handle in [dist.broadcast(tensor, 0, async_op=True) for tensor in tensors]:
        handle.wait()


def sum_count(count: int, device: torch.device) -> int:
    """The sum of a number over all processes."""
    if num_processes() == 1:
        return count
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)


def share(rows: Sequence[Any], measure: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
    """What `measure` gives for each of the rows, in their order. Each process measures a part of them and gets what
    all have found; every one must call it."""
    if num_processes() == 1:
        return measure(rows)
    with PartialState().split_between_processes(list(rows)) as own:
        found = measure(own) if own else []
    return gather_object(found)


def without_repeated_rows(
    inputs: Mapping[str, Any], accelerator: Accelerator, args: TrainingArguments
) -> dict[str, Any]:
    """In the last batch of an evaluation, accelerate repeats rows so that all processes have as many: unlabelled here,
    they are not counted twice. Where rows are packed, those that are repeated are not known, and counted."""
    inputs, state = dict(inputs), accelerator.gradient_state
    if args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return inputs
    labels = inputs["labels"] = inputs["labels"].clone()  # [B, T], or all rows one after the other [1, N]
    if len(labels) > 1 or inputs.get("position_ids") is None:
        labels[max(state.remainder - args.process_index * len(labels), 0) :] = IGNORE
    elif not _packs_evaluation(args):
        documents = find_documents(inputs)
        own = max(state.remainder - args.process_index * len(documents), 0)
        labels[:, documents[own].start if own < len(documents) else labels.shape[1] :] = IGNORE
    return inputs


def _packs_evaluation(args: TrainingArguments) -> bool:
    packs = getattr(args, "eval_packing", None)  # of SFTConfig alone; None is as in training
    return getattr(args, "packing", False) if packs is None else packs

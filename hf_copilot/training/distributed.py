"""What several processes of one training run must agree on. With one process every function does nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed as dist


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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

"""The Copilot's blocks through `torch.compile`: one launch for many operators, on CUDA one for a whole pass."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .attention import Span
from .modeling_copilot import CopilotModel

logger = logging.getLogger(__name__)


class CompiledDecode:
    """[`CopilotModel.decode`], compiled with its backward pass; where that fails it runs as it is, and says so.

    Lengths are symbols, so others compile nothing anew. Inductor draws dropout as PyTorch does (`fallback_random`),
    and on CUDA records one graph for every shape. Embeddings and head are left out: it would sum their gradients in
    an order that changes from run to run. So are documents long enough for attention by blocks.

    Args:
        copilot: On the device that it will run on.
        backend: Of `torch.compile`.

    Attributes:
        has_graphs: Whether CUDA graphs are recorded: what a pass gives, gradients too, lasts until the next one.
    """

    def __init__(self, copilot: CopilotModel, backend: str = "inductor"):
        self.copilot = copilot
        self.has_graphs = backend == "inductor" and copilot.device.type == "cuda"
        options = {"fallback_random": True, "triton.cudagraphs": self.has_graphs}
        options = options if backend == "inductor" else None
        self.compiled: Any = torch.compile(copilot.decode, backend=backend, dynamic=True, options=options)

    def __call__(self, hidden_states: torch.Tensor, memory: torch.Tensor, *others: Any) -> torch.Tensor:
        if self.compiled is None or any(isinstance(reads, Span) and not reads.is_small for reads in others):
            return self.copilot.decode(hidden_states, memory, *others)
        try:
            torch.compiler.cudagraph_mark_step_begin()
            return self.compiled(hidden_states, memory, *others)
        except Exception as error:
            self.give_up(error)
            return self.copilot.decode(hidden_states, memory, *others)

    def give_up(self, error: Exception) -> None:
        """Run as it is from now on, and say so. What is no fault of compiling is raised again."""
        if self.compiled is None or isinstance(error, torch.OutOfMemoryError):
            raise error
        self.compiled, self.has_graphs = None, False
        reason = " ".join(f"{type(error).__name__}: {error}".splitlines()[:2])
        logger.warning("The Copilot can't be compiled here and runs without, with the same results (%s).", reason)

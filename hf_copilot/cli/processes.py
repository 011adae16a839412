"""Commands in several processes, by `accelerate launch` or torchrun."""

from __future__ import annotations

import os
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

PATIENCE = timedelta(weeks=52)  # of a process that waits for the others, as in lm-eval


def is_launched() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start_processes(device: str | None) -> Accelerator:
    """Their accelerator, each with a device of its own; or all on the CPU, if that is asked for."""
    return Accelerator(cpu=device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])

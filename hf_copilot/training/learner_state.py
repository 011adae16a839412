"""A learner's state on disk: what a resumed run needs besides the Copilot's exported weights. Safetensors and JSON.

The main process writes what all share (optimizer, schedule, and the weights where there is an adapter); every process
writes its own generator and Mistake Log, under its number.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from .distributed import process_index

if TYPE_CHECKING:
    from .learner import CopilotLearner

logger = logging.getLogger(__name__)

TENSORS, SCALARS = "learner.safetensors", "learner.json"


def generator_file(process: int) -> str:
    return f"generator-{process}.safetensors"


def log_file(process: int) -> str:
    return f"mistake_log-{process}.safetensors"


@contextmanager
def written_beside(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `folder`, whose files are moved into it when the block is done: a file of that name is
    either the old one or the new one, whole, and a block that fails leaves no trace."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"_{folder.name}.", dir=folder.parent) as beside:
        yield Path(beside)
        folder.mkdir(exist_ok=True)
        for file in Path(beside).iterdir():
            os.replace(file, folder / file.name)


def save_state(learner: CopilotLearner, directory: str | os.PathLike, mistake_log: bool = True) -> None:
    """Write the learner's state; every process calls it. The log can be left out: it may be large, and it holds
    token ids of the training data."""
    with written_beside(directory) as folder:
        save_file({"generator": learner.generator.get_state()}, folder / generator_file(process_index()))
        if mistake_log:
            learner.log.save(folder / log_file(process_index()))
        if process_index() == 0:
            _save_shared(learner, folder)


def _save_shared(learner: CopilotLearner, folder: Path) -> None:
    state = learner.optimizer.adamw.state_dict()
    tensors = {f"optimizer.{i}.{k}": v for i, entry in state["state"].items() for k, v in entry.items()}
    tensors |= {f"weights.{name}": tensor.detach() for name, tensor in _beside_exported(learner)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    scalars = {
        "param_groups": state["param_groups"],
        "scheduler": learner.optimizer.scheduler.state_dict(),
        "steps": learner.steps,
        "skipped_steps": learner.skipped_steps,
        "largest_batch": learner.max_positions,
        "trained": _what_is_trained(learner),
    }
    (folder / SCALARS).write_text(json.dumps(scalars), encoding="utf-8")


def _beside_exported(learner: CopilotLearner) -> list[tuple[str, torch.Tensor]]:
    """The weights that the exported ones do not give: all of a Copilot with an adapter, which they hold merged. What
    it lies on is frozen, but a resumed run may start from other weights of the Pilot. PEFT's first copies of modules
    that are trained whole are never read, and left out."""
    weights = [] if learner.peft_model is None else learner.copilot.named_parameters()
    return [(name, tensor) for name, tensor in weights if ".original_module." not in name]


def _what_is_trained(learner: CopilotLearner) -> dict[str, Any]:
    """Shapes of all weights that are trained, and an adapter's factors."""
    shapes = {name: list(p.shape) for name, p in learner.copilot.named_parameters() if p.requires_grad}
    modules = learner.copilot.named_modules()
    return shapes | {name: module.scaling for name, module in modules if isinstance(module, LoraLayer)}


def load_state(learner: CopilotLearner, directory: str | os.PathLike) -> None:
    """Take up where [`save_state`] left off; call after `start`. The exported weights are loaded on their own.

    Raises:
        ValueError: If the folder holds no state of a learner, or of one that trains other weights.
    """
    directory = Path(directory)
    missing = [name for name in (TENSORS, SCALARS) if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory} is not a saved state of a CopilotLearner: {missing} missing.")
    tensors = load_file(directory / TENSORS)
    scalars = json.loads((directory / SCALARS).read_text(encoding="utf-8"))
    beside = {f"weights.{name}" for name, _ in _beside_exported(learner)}
    if scalars["trained"] != _what_is_trained(learner) or not beside <= tensors.keys():
        raise ValueError(
            f"{directory} was saved by a run that trains other weights of its Copilot: resume with the "
            "copilot_peft_config that it was started with (and, with one, the hf_copilot that it was saved by)."
        )
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    learner.optimizer.adamw.load_state_dict({"state": state, "param_groups": scalars["param_groups"]})
    learner.optimizer.scheduler.load_state_dict(scalars["scheduler"])
    learner.steps, learner.optimizer.skipped_steps = scalars["steps"], scalars["skipped_steps"]
    learner.max_positions = scalars["largest_batch"]
    with torch.no_grad():
        for name, parameter in _beside_exported(learner):
            parameter.copy_(tensors[f"weights.{name}"])
    _load_own(directory / generator_file(process_index()), _set_generator(learner), "the draws from the log")
    _load_own(directory / log_file(process_index()), learner.log.load, "the Mistake Log, which starts empty")


def _set_generator(learner: CopilotLearner) -> Callable[[Path], None]:
    return lambda path: learner.generator.set_state(load_file(path)["generator"])


def _load_own(path: Path, load: Callable[[Path], None], loss: str) -> None:
    """Load a file of this process, or say what is lost without it."""
    if path.is_file():
        load(path)
    else:
        logger.warning(
            "%s is not there (saved without it, or by another number of processes): the Pilot resumes exactly, the "
            "Copilot without %s.",
            path,
            loss,
        )

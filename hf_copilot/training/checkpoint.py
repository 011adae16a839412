"""All of a run that is on disk, in the order in which it is written and read. Safetensors and JSON.

A checkpoint is written in five steps: [`begin_checkpoint`] marks it as not whole; Trainer saves the model, and with it
the Copilot's weights ([`save_weights`]); every process saves its learner's state after Trainer's last file of its own
([`save_state`]); the main process lists all files ([`write_manifest`]); Trainer writes `trainer_state.json`. Without
that last file a checkpoint is torn. It is read in three: a whole one is found ([`newest_whole_checkpoint`], or
[`check_whole`]), Trainer takes the Pilot up from it, and the learner is started and takes up the rest
([`load_checkpoint`]).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..model.configuration_copilot import CopilotConfig
from ..model.modeling_copilot import CopilotModel
from .distributed import num_processes, process_index, sum_count
from .learner import CopilotLearner
from .metrics import UNCHOSEN_STRENGTH

logger = logging.getLogger(__name__)

WEIGHTS_FOLDER = "copilot"  # in output_dir and in every checkpoint: the Copilot, ready for from_pretrained
STATE_FOLDER = "copilot_state"  # in every checkpoint: what a resumed run needs besides
MANIFEST = "files.json"  # in STATE_FOLDER: the size of every file of the checkpoint
BINARY = (".safetensors", ".pt", ".pth", ".bin")  # a shorter one was cut off; texts a person may have changed
TORN = "_torn-"  # what begins with _ Trainer does not push
SAVING_AT_ONCE = "checkpoint-is-incomplete.txt"  # of transformers' enable_jit_checkpoint, until all is saved
TENSORS, SCALARS = "learner.safetensors", "learner.json"  # in STATE_FOLDER


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


# ---- writing -------------------------------------------------------------------------------------------------------


def begin_checkpoint(checkpoint: str | os.PathLike) -> None:
    """Mark a checkpoint that is about to be written, perhaps over an older one, as not whole."""
    (Path(checkpoint) / TRAINER_STATE_NAME).unlink(missing_ok=True)


def save_weights(learner: CopilotLearner, directory: str | os.PathLike) -> None:
    """Write the Copilot as plain weights, with its card, into its folder of `directory`."""
    with written_beside(Path(directory) / WEIGHTS_FOLDER) as folder:
        learner.exported("cpu").save_pretrained(folder)


def save_state(
    learner: CopilotLearner, directory: str | os.PathLike, mistake_log: bool = True, shared: bool | None = None
) -> None:
    """Write the learner's state; every process calls it. The log can be left out: it may be large, and it holds
    token ids of the training data. `shared` is whether this process writes what all have in common, by default the
    first alone."""
    if learner.ledger is not None:
        learner.ledger.flush()  # a resumed run goes on from what is on disk
    with written_beside(directory) as folder:
        save_file({"generator": learner.generator.get_state()}, folder / generator_file(process_index()))
        if mistake_log:
            learner.log.save(folder / log_file(process_index()))
        if shared or (shared is None and process_index() == 0):
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
        "limit": learner.optimizer.limit,
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


def write_manifest(checkpoint: str | os.PathLike) -> None:
    """List the files of a checkpoint: all but the state that Trainer writes last, and the mark of a save at once that
    it takes away then."""
    checkpoint = Path(checkpoint)
    sizes = {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.suffix != ".md"
    }
    for name in (TRAINER_STATE_NAME, SAVING_AT_ONCE, f"{STATE_FOLDER}/{MANIFEST}"):
        sizes.pop(name, None)
    (checkpoint / STATE_FOLDER / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


# ---- reading -------------------------------------------------------------------------------------------------------


def find_fault(checkpoint: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        manifest = checkpoint / STATE_FOLDER / MANIFEST
        sizes = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    except (OSError, ValueError):
        return f"{TRAINER_STATE_NAME}, which is written last, is missing or cut off"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file() and not is_dispensable(name):
            return f"{name} is missing"
        if file.is_file() and file.suffix in BINARY and file.stat().st_size < size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def is_dispensable(name: str) -> bool:
    """Whether a run resumes without a file, if perhaps not bit for bit."""
    own = f"{STATE_FOLDER}/mistake_log-", f"{STATE_FOLDER}/generator-"
    unread = "training_args.", "tokenizer", "chat_template", "special_tokens_map."
    return name.startswith(("optimizer.", "scheduler.", "rng_state", *own, *unread))


def warn_of_missing(checkpoint: str | os.PathLike) -> None:
    """Name the files that were in a whole checkpoint, and that Trainer resumes without."""
    manifest = Path(checkpoint) / STATE_FOLDER / MANIFEST
    names = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    missing = [name for name in names if not (Path(checkpoint) / name).is_file()]
    if missing:
        logger.warning(f"{checkpoint} has lost {missing}: the run resumes without, and perhaps not bit for bit.")


def newest_whole_checkpoint(output_dir: str | os.PathLike) -> str:
    """The checkpoint to resume from. Torn ones that are newer are named in a warning and set aside, under names that
    Trainer's rotation does not count: else it might keep one of these and delete the last whole one.

    Raises:
        ValueError: If there is none.
    """
    named = ((re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in Path(output_dir).glob("*"))
    numbered, torn = {int(name[1]): path for name, path in named if name and path.is_dir()}, {}
    for _, folder in sorted(numbered.items(), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            _set_aside(torn)
            warn_of_missing(folder)
            return str(folder)
        torn[folder] = fault
    faults = [f"{folder.name}: {fault}" for folder, fault in torn.items()]
    raise ValueError(
        f"{output_dir} holds no whole checkpoint to resume from ({faults}): train without resume_from_checkpoint."
    )


def _set_aside(torn: dict[Path, str]) -> None:
    for folder, fault in torn.items():
        aside = folder.with_name(TORN + folder.name)
        logger.warning(f"{folder} is not a whole checkpoint: {fault}. Passed over and kept as {aside.name}.")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def check_whole(checkpoint: str | os.PathLike) -> None:
    """Raise a `ValueError` if a checkpoint is torn."""
    if not Path(checkpoint).is_dir():
        return
    fault = find_fault(checkpoint)
    if fault is not None:
        raise ValueError(
            f"{checkpoint} is not a whole checkpoint: {fault}. Resume from an older one, or leave the choice to "
            "resume_from_checkpoint=True."
        )
    warn_of_missing(checkpoint)


def starts_fresh(checkpoint: str | os.PathLike, may_start_fresh: bool) -> bool:
    """Whether a Trainer checkpoint holds no Copilot, so that a fresh one learns from the rounds that are left.

    Raises:
        ValueError: If it holds none (plain SFTTrainer wrote it), and that was not asked for.
    """
    if Path(checkpoint, STATE_FOLDER).is_dir():
        return False
    if not may_start_fresh:
        raise ValueError(
            f"{checkpoint} holds no Copilot to resume ({STATE_FOLDER}/ is missing; a plain SFTTrainer or "
            "save_only_model=True wrote it). Set copilot_start_fresh=True in CopilotSFTConfig to resume the Pilot "
            "with a fresh Copilot."
        )
    logger.warning(f"{checkpoint} holds no Copilot: starting a fresh one (copilot_start_fresh=True).")
    return True


def load_checkpoint(learner: CopilotLearner, checkpoint: str | os.PathLike) -> None:
    """Take the Copilot and its learner's state up from a Trainer checkpoint."""
    load_weights(learner, checkpoint)
    load_state(learner, Path(checkpoint, STATE_FOLDER))


def resumed_strength(saved: CopilotConfig, now: CopilotConfig) -> float | None:
    """λ of a run that goes on; None where a user has changed it."""
    if saved.calibration or now.calibration or saved.strength == now.strength:
        return saved.strength
    if {saved.strength, now.strength} == {CopilotConfig.strength, UNCHOSEN_STRENGTH}:
        return now.strength  # only whether it is chosen has changed
    return None


def load_weights(learner: CopilotLearner, checkpoint: str | os.PathLike) -> None:
    """Load the Copilot's exported weights, its λ and results; one that is trained with an adapter has its weights in
    its learner's state."""
    folder, config = Path(checkpoint) / WEIGHTS_FOLDER, learner.copilot.config
    saved = CopilotConfig.from_pretrained(folder)
    different = {name: (getattr(saved, name), getattr(config, name)) for name in saved.differences(config)}
    strength = resumed_strength(saved, config)
    if strength is None:
        different["strength"] = saved.strength, config.strength
    if different:
        raise ValueError(
            f"The Copilot in {checkpoint} has other settings than this run's (saved, now): {different}. Resume with "
            "the settings that it was started with."
        )
    if learner.peft_model is None:
        learner.copilot.load_state_dict(CopilotModel.from_pretrained(folder).state_dict())
    config.strength = strength
    config.results, config.calibration = saved.results, saved.calibration


def load_best(learner: CopilotLearner, checkpoint: str | os.PathLike) -> None:
    """The Copilot of the best checkpoint, where it has one: a run without may have gone before.

    Raises:
        ValueError: If some of the processes see one and others don't.
    """
    have_one = sum_count(int((Path(checkpoint) / WEIGHTS_FOLDER).is_dir()), learner.device)
    if not have_one:
        logger.warning(f"{checkpoint} is best, and holds no Copilot: that of this run stays as it is.")
        return
    if have_one < num_processes():
        raise ValueError(f"{checkpoint} is best, and not all machines see its Copilot: set save_on_each_node=True.")
    load_weights(learner, checkpoint)
    if learner.peft_model is not None:
        load_state(learner, Path(checkpoint) / STATE_FOLDER)


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
    learner.optimizer.say_what_stays(scalars["param_groups"])
    learner.optimizer.adamw.load_state_dict({"state": state, "param_groups": scalars["param_groups"]})
    learner.optimizer.scheduler.load_state_dict(scalars["scheduler"])
    learner.steps, learner.optimizer.skips[0] = scalars["steps"], scalars["skipped_steps"]
    learner.max_positions = scalars["largest_batch"]
    learner.optimizer.limit = scalars.get("limit")  # of version 0.2 on
    with torch.no_grad():
        for name, parameter in _beside_exported(learner):
            parameter.copy_(tensors[f"weights.{name}"])
    _load_own(
        directory / generator_file(process_index()),
        lambda path: learner.generator.set_state(load_file(path)["generator"]),
        "the draws from the log",
    )
    _load_own(directory / log_file(process_index()), learner.log.load, "the Mistake Log, which starts empty")


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

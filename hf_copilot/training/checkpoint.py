"""Which checkpoints of a Trainer are whole, and which one a run resumes from.

`trainer_state.json` is the last file that Trainer writes into a checkpoint: one without it is torn. Ours also holds a
list of its other files and their sizes, so that one which lost a file later is found too.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

WEIGHTS_FOLDER = "copilot"  # in output_dir and in every checkpoint: the Copilot, ready for from_pretrained
STATE_FOLDER = "copilot_state"  # in every checkpoint: what a resumed run needs besides
MANIFEST = "files.json"  # in STATE_FOLDER: the size of every file of the checkpoint
TORN = "_torn-"  # what begins with _ Trainer does not push


def begin_checkpoint(checkpoint: str | os.PathLike) -> None:
    """Mark a checkpoint that is about to be written, perhaps over an older one, as not whole."""
    (Path(checkpoint) / TRAINER_STATE_NAME).unlink(missing_ok=True)


def write_manifest(checkpoint: str | os.PathLike) -> None:
    """List the files of a checkpoint, all but the state that Trainer writes last."""
    checkpoint = Path(checkpoint)
    sizes = {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.suffix != ".md"
    }
    for name in (TRAINER_STATE_NAME, f"{STATE_FOLDER}/{MANIFEST}"):
        sizes.pop(name, None)
    (checkpoint / STATE_FOLDER / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


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
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes and not {size}"
    return None


def newest_whole_checkpoint(output_dir: str | os.PathLike) -> str:
    """The checkpoint to resume from. Torn ones that are newer are named in a warning and set aside, under names that
    Trainer's rotation does not count: else it might keep one of these and delete the last whole one.

    Raises:
        ValueError: If there is none.
    """
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = {int(folder.name.rpartition("-")[2]): folder for folder in folders if folder.name[-1].isdigit()}
    for _, folder in sorted(numbered.items(), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            return str(folder)
        aside = folder.with_name(TORN + folder.name)
        logger.warning(f"{folder} is not a whole checkpoint: {fault}. Passed over and kept as {aside.name}.")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    raise ValueError(f"{output_dir} holds no whole checkpoint to resume from: train without resume_from_checkpoint.")


def check_whole(checkpoint: str | os.PathLike) -> None:
    """Raise a `ValueError` if a checkpoint is torn."""
    fault = find_fault(checkpoint) if Path(checkpoint).is_dir() else None
    if fault is not None:
        raise ValueError(
            f"{checkpoint} is not a whole checkpoint: {fault}. Resume from an older one, or leave the choice to "
            "resume_from_checkpoint=True."
        )

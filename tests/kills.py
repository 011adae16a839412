"""Kill a training process again and again until it is done, and see whether anything was lost.

    python tests/kills.py --kills 100

The process is killed with SIGKILL at random moments, during writes too, and resumes from its newest whole checkpoint.
At the end its weights must be those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from pathlib import Path

STEPS = 30


def train(folder: str, has_begun) -> None:
    """Start, or go on from the newest whole checkpoint; every step writes one."""
    import torch
    from test_checkpoint import make_trainer
    from transformers import TrainerCallback

    from hf_copilot.training.checkpoint import newest_whole_checkpoint

    class Tell(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            has_begun.set()

    torch.set_num_threads(1)
    try:
        checkpoint = newest_whole_checkpoint(folder)
    except ValueError:
        checkpoint = None
    if checkpoint is not None and checkpoint.endswith(f"-{STEPS}"):
        return  # killed after its last checkpoint
    settings = {"max_steps": STEPS, "save_steps": 1, "save_total_limit": 2, "gradient_accumulation_steps": 1}
    trainer = make_trainer(folder, callbacks=[Tell()], **settings)
    trainer.train(resume_from_checkpoint=checkpoint)


def final_weights(folder: Path) -> list[bytes]:
    """Pilot and Copilot after the last step, as files."""
    last = folder / f"checkpoint-{STEPS}"
    return [(last / name).read_bytes() for name in ("model.safetensors", "copilot/model.safetensors")]


def survive(folder: Path, kills: int, seed: int = 0) -> tuple[int, int]:
    """Train in processes that are killed up to `kills` times, within 0.3 s after their training has begun: how many
    were, and how many torn checkpoints are left (one that is written anew later is not counted)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_checkpoint"])
    rng, killed = random.Random(seed), 0
    while True:
        has_begun = context.Event()
        process = context.Process(target=train, args=(str(folder), has_begun))
        process.start()
        while process.is_alive() and not has_begun.wait(0.05):
            pass
        process.join(rng.uniform(0.0, 0.3) if killed < kills else None)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        killed += 1
    if process.exitcode:
        raise RuntimeError(f"The training process failed with exit code {process.exitcode}.")
    return killed, len(list(folder.glob("_torn-*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=20, help="Kills in all; runs are repeated until there are enough."
    )
    arguments = parser.parse_args()
    start, survived, torn, seed = time.time(), 0, 0, 0
    with tempfile.TemporaryDirectory() as directory:
        survive(Path(directory) / "whole", kills=0)
        expected = final_weights(Path(directory) / "whole")
        while survived < arguments.kills:
            folder = Path(directory) / str(seed)
            killed, torn_here = survive(folder, arguments.kills - survived, seed)
            if final_weights(folder) != expected:
                raise SystemExit(f"Run {seed} ended with other weights after {killed} kills.")
            survived, torn, seed = survived + killed, torn + torn_here, seed + 1
    print(f"{survived} kills survived in {seed} runs of {STEPS} steps, {torn} checkpoints torn, 0 differences")  # noqa: T201
    print(f"{time.time() - start:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()

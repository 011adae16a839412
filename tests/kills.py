"""Kill a training process again and again until it is done, and see whether anything was lost.

    python tests/kills.py --kills 1000 --folder kills

The process is killed with SIGKILL at random moments, during writes too, and resumes from its newest whole checkpoint.
At the end its weights must be those of a run that nobody killed. The folder holds the sum of all runs so far, so the
command goes on where it was stopped, and prints the sum.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

STEPS = 30
MOST_STEPS = 3  # that a process may take before it is killed
SUM = "sum.json"
NOTHING = {"kills": 0, "runs": 0, "torn": 0, "seconds": 0.0}


def train(folder: str, steps) -> None:
    """Start, or go on from the newest whole checkpoint; every step writes one, and releases the semaphore before."""
    import torch
    from test_checkpoint import make_trainer
    from transformers import TrainerCallback

    from hf_copilot.training.checkpoint import newest_whole_checkpoint

    class Tell(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.release()

    torch.set_num_threads(1)
    gc.freeze()  # what is imported, which Trainer would look through at every start
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


def forks_with_imports() -> multiprocessing.context.BaseContext:
    """Processes that are forked from one that has imported all; it finds modules by PYTHONPATH alone."""
    before, here = os.environ.get("PYTHONPATH", ""), Path(__file__).parent
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_checkpoint"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), before])
    forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before
    return context


def survive(folder: Path, kills: int, seed: int = 0) -> tuple[int, int]:
    """Train in processes that are killed up to `kills` times, each within 0.3 s after one of its first steps, when a
    checkpoint is written: how many were, and how many torn checkpoints are left (one that is written anew later is
    not counted)."""
    context = forks_with_imports()
    rng, killed = random.Random(seed), 0
    while True:
        steps = context.Semaphore(0)
        process = context.Process(target=train, args=(str(folder), steps))
        process.start()
        for _ in range(rng.randint(1, MOST_STEPS)):
            while not steps.acquire(timeout=0.05) and process.is_alive():
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


def survive_once_more(folder: Path, done: dict, kills: int, expected: list[bytes]) -> dict:
    """One run with up to `kills` kills: the new sum. The files of a run that ends with other weights are kept."""
    start, run = time.time(), folder / f"run-{done['runs']}"
    shutil.rmtree(run, ignore_errors=True)  # of a command that was stopped
    killed, torn = survive(run, kills, seed=done["runs"])
    if final_weights(run) != expected:
        raise SystemExit(f"{run} ended with other weights after {killed} kills.")
    shutil.rmtree(run)
    more = {"kills": killed, "runs": 1, "torn": torn, "seconds": time.time() - start}
    return {name: done[name] + more[name] for name in NOTHING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="Kills in all, with those of the folder.")
    parser.add_argument("--folder", type=Path, help="Holds the sum of all runs so far; by default a new one.")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    written = folder / SUM
    done = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else NOTHING
    if done["kills"] < arguments.kills:
        with tempfile.TemporaryDirectory() as whole:
            survive(Path(whole), kills=0)
            expected = final_weights(Path(whole))
    while done["kills"] < arguments.kills:
        done = survive_once_more(folder, done, arguments.kills - done["kills"], expected)
        written.write_text(json.dumps(done), encoding="utf-8")
    print(  # noqa: T201
        f"{done['kills']} kills survived in {done['runs']} runs of {STEPS} steps, {done['torn']} checkpoints torn, "
        f"0 differences, {done['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()

"""Run by test_distributed.py under torchrun or accelerate: writes what each process saw to <folder>/<rank>.json."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from test_checkpoint import make_trainer
from test_failure import no_memory, not_finite
from test_learner import observe, padded_batch
from tiny import OBJECTIVES, QUIET, addition, tiny_pilot, tiny_tokenizer, trained_like
from torch import distributed as dist
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from versions import CANT_RESUME_ON_TWO_CPU_PROCESSES, is_installed

from hf_copilot import CopilotConfig, CopilotLearner


def digest(state: dict[str, torch.Tensor]) -> str:
    tensors = (tensor.detach().contiguous().float().numpy().tobytes() for tensor in state.values())
    return hashlib.sha256(b"".join(tensors)).hexdigest()


def plain_trainer(folder: Path, pilot: PreTrainedModel, peft_config=None, **changes) -> SFTTrainer:
    """What SFTTrainer makes of a Pilot with the settings of `make_trainer`."""
    args = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = SFTTrainer(
        model=pilot,
        args=SFTConfig(output_dir=str(folder), **(QUIET | args | changes)),
        train_dataset=addition(64),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def learn(records_of: list[int], config: CopilotConfig) -> CopilotLearner:
    """Two steps on those records of one batch."""
    pilot = tiny_pilot().eval()
    learner = CopilotLearner(trained_like(pilot, config), pilot, num_training_steps=3, log_dtype=torch.float32)
    records = observe(learner, pilot, padded_batch())
    for _ in range(2):
        learner.update([records[i] for i in records_of])
    return learner


def evaluated(folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of seven rows in batches of two, padded or one after the other: the last batch repeats rows where
    there are two processes."""
    metrics = {}
    for form, more in {"padded": {}, "padding_free": {"padding_free": True, "max_length": None}}.items():
        args = {"copilot": trained_like(tiny_pilot()), "per_device_eval_batch_size": 2, **more}
        metrics[form] = make_trainer(folder / f"eval-{form}", **args).evaluate(addition(7, seed=5))
    return metrics


def failed(failure: Callable, rank: int) -> dict:
    """Three steps, the second of which fails on the second process: the Copilot after each, and the steps left out."""
    pilot = tiny_pilot().eval()
    learner = CopilotLearner(trained_like(pilot), pilot, num_training_steps=3)
    records, copilots, works = observe(learner, pilot, padded_batch()), [], learner.forced.loss
    for step in range(3):
        learner.forced.loss = partial(failure, learner.forced) if (step, rank) == (1, 1) else works
        learner.update(records)
        copilots.append(digest(learner.copilot.state_dict()))
    return {"copilots": copilots, "skipped": learner.skipped_steps}


def resumed(folder: Path) -> list[str] | None:
    """Pilot and Copilot of a run that goes on from the checkpoint of another, where transformers can."""
    if is_installed(CANT_RESUME_ON_TWO_CPU_PROCESSES):
        return None
    trainer = make_trainer(folder / "resumed")
    trainer.train(resume_from_checkpoint=str(folder / "straight" / "checkpoint-4"))
    return [digest(trainer.model.state_dict()), digest(trainer.copilot.state_dict())]


def main(folder: Path) -> None:
    trainer = make_trainer(folder / "straight")
    trainer.train()
    seen = {
        "processes": dist.get_world_size(),
        "pilot": digest(trainer.model.state_dict()),
        "copilot": digest(trainer.copilot.state_dict()),
        "resumed": resumed(folder),
        "plain_pilot": digest(plain_trainer(folder / "plain", tiny_pilot(attention_dropout=0.1)).model.state_dict()),
        "documents": [record.input_ids.tolist() for round_ in trainer.learner.log.rounds for record in round_],
        "logs": [entry for entry in trainer.state.log_history if "copilot_loss" in entry],
        "eval": evaluated(folder),
        "learnt": {},
    }
    rank = dist.get_rank()
    shares = {"shared": [[0, 2], [1]], "one_has_none": [[0, 1, 2], []]}
    for name, share in shares.items():
        for objective, config in OBJECTIVES.items():
            learner = learn(share[rank], config)
            weights = torch.cat([p.detach().flatten() for p in learner.copilot.parameters()])
            torch.save(weights, folder / f"{name}-{objective}-{rank}.pt")
            seen["learnt"][f"{name}-{objective}"] = learner.pop_metrics()["copilot_loss"]
    seen["failed"] = {failure.__name__: failed(failure, rank) for failure in (no_memory, not_finite)}
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Run by test_distributed.py under torchrun or accelerate: writes what each process saw to <folder>/<rank>.json."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from test_checkpoint import make_trainer
from test_learner import observe, padded_batch
from tiny import QUIET, addition, tiny_pilot, tiny_tokenizer, trained_like
from torch import distributed as dist
from trl import SFTConfig, SFTTrainer

from hf_copilot import CopilotConfig, CopilotLearner


def digest(model: torch.nn.Module) -> str:
    tensors = (tensor.detach().contiguous().float().numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(b"".join(tensors)).hexdigest()


def plain_pilot(folder: Path) -> str:
    """What SFTTrainer makes of the same Pilot."""
    args = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = SFTTrainer(
        model=tiny_pilot(attention_dropout=0.1),
        args=SFTConfig(output_dir=str(folder), **(QUIET | args)),
        train_dataset=addition(64),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return digest(trainer.model)


def learn(records_of: list[int], config: CopilotConfig) -> CopilotLearner:
    """Two steps on those records of one batch."""
    pilot = tiny_pilot().eval()
    learner = CopilotLearner(trained_like(pilot, config), pilot, num_training_steps=3, log_dtype=torch.float32)
    records = observe(learner, pilot, padded_batch())
    for _ in range(2):
        learner._update([records[i] for i in records_of])
    return learner


def evaluated(folder: Path) -> dict[str, float]:
    """The metrics of seven rows in batches of two: the last batch repeats rows where there are two processes."""
    trainer = make_trainer(folder / "eval", copilot=trained_like(tiny_pilot()), per_device_eval_batch_size=2)
    return trainer.evaluate(addition(7, seed=5))


def main(folder: Path) -> None:
    trainer = make_trainer(folder / "straight")
    trainer.train()
    resumed = make_trainer(folder / "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "straight" / "checkpoint-4"))
    seen = {
        "processes": dist.get_world_size(),
        "pilot": digest(trainer.model),
        "copilot": digest(trainer.copilot),
        "resumed": [digest(resumed.model), digest(resumed.copilot)],
        "plain_pilot": plain_pilot(folder / "plain"),
        "documents": [record.input_ids.tolist() for round_ in trainer.learner.log.rounds for record in round_],
        "logs": [entry for entry in trainer.state.log_history if "copilot_loss" in entry],
        "eval": evaluated(folder),
        "learnt": {},
    }
    rank = dist.get_rank()
    shares = {"shared": [[0, 2], [1]], "one_has_none": [[0, 1, 2], []]}
    for name, share in shares.items():
        for objective, config in (("ours", CopilotConfig()), ("paper", CopilotConfig.paper(num_hidden_layers=2))):
            learner = learn(share[rank], config)
            weights = torch.cat([p.detach().flatten() for p in learner.copilot.parameters()])
            torch.save(weights, folder / f"{name}-{objective}-{rank}.pt")
            seen["learnt"][f"{name}-{objective}"] = learner.pop_metrics()["copilot_loss"]
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

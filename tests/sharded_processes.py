"""Run by test_distributed.py under torchrun: CopilotTrainer with a Pilot that FSDP2 shards over two processes.

accelerate offers FSDP on accelerators alone; here the CPU stands for one, everything else is what a user runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import accelerate.state
import torch
from peft import LoraConfig
from test_checkpoint import make_trainer
from tiny import tiny_pilot
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from two_processes import digest, plain_trainer

from hf_copilot import CopilotConfig
from hf_copilot.pilot.inspect import is_sharded

DistributedType = accelerate.state.DistributedType
WRAP = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
VARIANTS = {
    "full": {},
    "lora": {"peft_config": LoraConfig(r=2, lora_dropout=0.1)},
    "tied": {"model": {"tie_word_embeddings": True}},
    "pilot_states": {"copilot": CopilotConfig(dropout=0.1, memory="pilot")},
    "sharded_states": {"fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}},
}


class CpuStandsForAnAccelerator:
    """accelerate's DistributedType, but several CPU processes pass for several accelerators."""

    MULTI_NEURON = DistributedType.MULTI_CPU

    def __getattr__(self, name: str) -> DistributedType:
        return getattr(DistributedType, name)


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def run(folder: Path, variant: str) -> dict:
    changes = dict(VARIANTS[variant])
    sharded = {"fsdp": True, "fsdp_config": WRAP | changes.pop("fsdp", {})}
    model, copilot = changes.pop("model", {}), changes.pop("copilot", None)
    plain = plain_trainer(folder / "plain", tiny_pilot(attention_dropout=0.1, **model), **sharded, **changes)
    changes |= sharded | {"pilot": model, "copilot": copilot}
    trainers = [make_trainer(folder / name, **changes) for name in ("straight", "resumed")]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(folder / "straight" / "checkpoint-4"))
    evaluated = trainers[1].evaluate(trainers[1].train_dataset.select(range(7)))
    return {
        "sharded": is_sharded(trainers[0].model),
        "plain_pilot": digest(whole(plain.model)),
        "pilots": [digest(whole(trainer.model)) for trainer in trainers],
        "copilots": [digest(trainer.copilot.state_dict()) for trainer in trainers],
        "logs": [entry for entry in trainers[0].state.log_history if "copilot_loss" in entry],
        "eval_rectified_nll": evaluated["eval_rectified_nll"],
    }


def main(folder: Path, variants: list[str]) -> None:
    accelerate.state.DistributedType = CpuStandsForAnAccelerator()
    seen = {variant: run(folder / variant, variant) for variant in variants}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

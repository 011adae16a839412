"""What the Copilot's part of a checkpoint costs, in seconds and bytes, for a Copilot of the shape of Llama 3.2 1B.

    python -m benchmarks.checkpoint                     # trained with LoRA r 32; needs 24 GiB of memory
    python -m benchmarks.checkpoint --training full     # needs 64 GiB

Random weights and a full Mistake Log (128 rounds of 4 x 256 tokens, 10 of them labelled, beside a LoRA Pilot). The
Pilot is cut to one layer: it is not written. Writes benchmarks/results/checkpoint_1b_<training>.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.common import RESULTS, device_name, table
from benchmarks.cost import LLAMA_3, SMALL_DECODER
from hf_copilot import CopilotConfig, CopilotLearner, MistakeLog, copilot_for
from hf_copilot.training.checkpoint import save_state
from hf_copilot.training.mistake_log import MistakeRecord

ADAPTERS = {"lora": LoraConfig(r=32, target_modules="all-linear"), "full": None}
CONFIG = CopilotConfig(init="random", num_hidden_layers=16, head_dim=64, **SMALL_DECODER)


def make_learner(adapter: str) -> CopilotLearner:
    """A learner as it is after its first step: its optimizer has its moments, its log is full."""
    shape = LLAMA_3 | SMALL_DECODER | {"num_hidden_layers": 1, "tie_word_embeddings": True}
    pilot = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0)).to(torch.bfloat16)
    learner = CopilotLearner(copilot_for(pilot, CONFIG), pilot, 10, peft_config=ADAPTERS[adapter])
    learner.log = full_log()
    for parameter in learner.optimizer.parameters():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        learner.optimizer.adamw.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return learner


def full_log(positions: int = 255, labelled: int = 10, width: int = 2048, kept: int = 65) -> MistakeLog:
    ints, states = torch.arange(positions), torch.zeros(positions, width, dtype=torch.bfloat16)
    targets, values = ints[:labelled], torch.zeros(labelled, kept)
    record = MistakeRecord(
        ints, states[:0], states, targets, targets, states[:labelled], values.int(), values, values[:, 0]
    )
    log = MistakeLog()
    for _ in range(log.max_rounds):
        log.append([record] * 4)
    return log


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(adapter: str) -> dict:
    """Seconds and megabytes of the three things that a checkpoint holds of the Copilot."""
    learner, row = make_learner(adapter), {"copilot": adapter}
    parts = {
        "weights": lambda folder: learner.exported("cpu").save_pretrained(folder),
        "optimizer": lambda folder: save_state(learner, folder, mistake_log=False),
        "log": lambda folder: learner.log.save(folder / "log.safetensors"),
    }
    for name, write in parts.items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            write(Path(folder))
            row[f"{name}_s"] = time.perf_counter() - start
            row[f"{name}_mb"] = size(Path(folder)) / 1e6
    row["total_s"] = sum(row[f"{name}_s"] for name in parts)
    row["total_mb"] = sum(row[f"{name}_mb"] for name in parts)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", choices=ADAPTERS, default="lora")
    training = parser.parse_args().training
    logging.set_verbosity_error()
    row = measure(training)
    path = RESULTS / f"checkpoint_1b_{training}.json"
    result = {"machine": device_name("cpu"), "torch": torch.__version__, "checkpoint": row}
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{table([row])}\n\nwritten to {path}")


if __name__ == "__main__":
    main()

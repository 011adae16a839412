"""A fixed run's losses of Pilot and Copilot, committed in reference_losses.json: whatever moves them must be meant.

python tests/test_reference.py     # after a change that is meant to move them: writes the file anew
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import QUIET, addition, tiny_pilot, tiny_tokenizer

from hf_copilot import CopilotConfig, CopilotSFTConfig, CopilotTrainer

FILE = Path(__file__).with_name("reference_losses.json")
NAMES = ("loss", "copilot_loss", "pilot_nll", "rectified_nll")
RUNS = {
    "default": {},
    "paper": {"copilot": CopilotConfig.paper(num_hidden_layers=3)},
    "states": {"copilot": CopilotConfig(memory="pilot")},
    "lora": {"peft_config": LoraConfig(r=4), "copilot_peft_config": LoraConfig(r=4)},
}


def trajectory(name: str) -> dict[str, list[float]]:
    """Forty steps; every tenth is logged."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = CopilotTrainer(
            model=tiny_pilot(initializer_range=0.02),
            args=CopilotSFTConfig(
                output_dir=folder,
                max_steps=40,
                logging_steps=10,
                learning_rate=1e-3,
                copilot_learning_rate=1e-3,
                copilot_strength="config",
                **QUIET,
            ),
            train_dataset=addition(320),
            processing_class=tiny_tokenizer(),
            **RUNS[name],
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "copilot_loss" in entry]
    return {quantity: [round(entry[quantity], 5) for entry in logs] for quantity in NAMES}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_the_reference(name):
    expected, found = json.loads(FILE.read_text())[name], trajectory(name)
    for quantity in NAMES:
        assert found[quantity] == pytest.approx(expected[quantity], rel=2e-3), quantity


if __name__ == "__main__":
    torch.set_num_threads(2)
    FILE.write_text(json.dumps({name: trajectory(name) for name in RUNS}, indent=1) + "\n")

"""Number formats, quantised Pilots, checkpointing, compilation: the Pilot is the parent's, and the Copilot learns."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig
from test_checkpoint import make_trainer
from test_learner import padded_batch
from tiny import MEMORIES, QUIET, addition, assert_same, tiny_pilot, tiny_tokenizer, trained_like
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_copilot import (
    CopilotConfig,
    CopilotLearner,
    CopilotLogitsProcessor,
    CopilotSFTConfig,
    CopilotTrainer,
    copilot_for,
)
from hf_copilot.pilot.copilot_for import block_state
from hf_copilot.training.report import count_parameters

BY_64 = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}  # what bitsandbytes' blocks divide
QUANTIZED = {
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
}


def both(folder, make_pilot, peft_config=None, memory=None, **changes):
    """A CopilotTrainer and an SFTTrainer that have trained the same Pilot."""
    args = QUIET | {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    ours = partial(CopilotTrainer, copilot=CopilotConfig(memory=memory))
    trainers = []
    for trainer_class, config_class in ((ours, CopilotSFTConfig), (SFTTrainer, SFTConfig)):
        trainer = trainer_class(
            model=make_pilot(),
            args=config_class(output_dir=str(folder), **(args | changes)),
            train_dataset=addition(32),
            processing_class=tiny_tokenizer(),
            peft_config=peft_config,
        )
        trainer.train()
        trainers.append(trainer)
    return trainers


def assert_learns(trainer):
    losses = [entry["copilot_loss"] for entry in trainer.state.log_history if "copilot_loss" in entry]
    assert len(losses) == 4 and trainer.learner.skipped_steps == 0
    assert trainer.copilot.lm_head.weight.dtype == torch.float32 and trainer.copilot.lm_head.weight.abs().sum() > 0


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_bf16_weights(tmp_path, peft_config, memory):
    ours, theirs = both(tmp_path, lambda: tiny_pilot().to(torch.bfloat16), peft_config, memory)
    assert_same(ours.model, theirs.model)
    assert_learns(ours)


@pytest.mark.parametrize(("bits", "memory"), zip(QUANTIZED, MEMORIES, strict=True))
def test_qlora(tmp_path, bits, memory):
    tiny_pilot(**BY_64).save_pretrained(tmp_path / "pilot")

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "pilot", quantization_config=QUANTIZED[bits], device_map="cpu"
        )

    ours, theirs = both(tmp_path, load, LoraConfig(r=4), memory, bf16=True)
    assert_same(ours.model, theirs.model)
    assert_learns(ours)
    assert count_parameters(ours.model)[0] == ours.model.num_parameters()
    ours.model.eval()
    inputs = tiny_tokenizer()(["1+2="], return_tensors="pt", return_token_type_ids=False)
    with CopilotLogitsProcessor(trained_like(ours.model), ours.model) as processor:
        text = ours.model.generate(**inputs, max_new_tokens=4, do_sample=False, logits_processor=[processor])
    assert text.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("bits, error", [("4bit", 0.15), ("8bit", 0.01)])
def test_quantised_weights_are_taken_over_dequantised(tmp_path, bits, error):
    """Before and after a forward for inference, for which bitsandbytes repacks its weights on a CPU."""
    pilot = tiny_pilot(**BY_64)
    pilot.save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTIZED[bits], device_map="cpu")
    expected = block_state(pilot.model.layers[0])
    for _ in range(2):
        found = block_state(quantized.model.layers[0])
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name] - tensor).abs().max() <= error * tensor.abs().max()
        quantized(torch.tensor([[5, 6]]))


def plain_fp16_loop(pilot, learner=None) -> torch.Tensor:
    """Three steps under float16 autocast with a gradient scaler, the first of which overflows: the Pilot after."""
    optimizer = torch.optim.AdamW(pilot.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for _ in range(25):
        batch = padded_batch()
        with torch.autocast("cpu", dtype=torch.float16):
            if learner is None:
                loss = pilot(**batch).loss
            else:
                with learner.observe(batch):
                    loss = pilot(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if learner is not None:
            learner.step()
    assert scaler.get_scale() < 2.0**40
    return torch.cat([parameter.detach().flatten() for parameter in pilot.parameters()])


def test_fp16_with_the_gradient_scaler():
    """accelerate refuses fp16 on a CPU; a plain loop has the same parts."""
    pilot = tiny_pilot()
    learner = CopilotLearner(copilot_for(pilot), pilot, num_training_steps=25, learning_rate=3e-3)
    with_copilot = plain_fp16_loop(pilot, learner)
    assert torch.equal(with_copilot, plain_fp16_loop(tiny_pilot()))
    assert learner.skipped_steps == 0 and learner.pop_metrics()["copilot_loss"] > 0


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_gradient_checkpointing_in_the_copilot(tmp_path, adapter, memory):
    settings = {"copilot_peft_config": adapter, "copilot": CopilotConfig(dropout=0.1, memory=memory)}
    trainers = []
    for on in (False, True):
        trainers.append(make_trainer(tmp_path, copilot_gradient_checkpointing=on, **settings))
        trainers[-1].train()
    plain, checkpointed = trainers
    assert all(layer.gradient_checkpointing is False for layer in plain.learner.copilot.layers)
    assert all(layer.gradient_checkpointing is True for layer in checkpointed.learner.copilot.layers)
    states = plain.copilot.state_dict(), checkpointed.copilot.state_dict()
    assert all(torch.allclose(tensor, states[1][name], atol=1e-6) for name, tensor in states[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_compiled_pilot_stops_compiling(tmp_path, memory):
    """Hooks add no recompilation from step to step, with evaluations between."""
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            graphs.append(sum(counters["frames"].values()) + counters["stats"]["unique_graphs"])

    trainer = CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(
            output_dir=str(tmp_path),
            **(QUIET | {"max_steps": 12, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 3}),
            torch_compile=True,
            torch_compile_backend="eager",
            per_device_train_batch_size=2,
        ),
        train_dataset=addition(1).select([0] * 64),  # one shape
        eval_dataset=addition(1).select([0] * 4),
        processing_class=tiny_tokenizer(),
        copilot=CopilotConfig(memory=memory),
        callbacks=[Count()],
    )
    trainer.train()
    assert graphs[0] > 0 and graphs[4] == graphs[-1]

"""Real weights: a chat model whose pad token is its end token, LoRA on it, and a Copilot beside it.

`HF_COPILOT_PRETRAINED` names the folder: `python -m benchmarks.pretrained.pilot FOLDER` makes one, and so does
`.ci/run pretrained`.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from tiny import QUIET, assert_same
from transformers import AutoTokenizer, pipeline

from benchmarks.common import CHECKPOINTING
from hf_copilot import CopilotConfig, CopilotLogitsProcessor, CopilotModel, CopilotSFTConfig, CopilotTrainer, score
from hf_copilot.training.metrics import STRENGTHS

FOLDER = os.environ.get("HF_COPILOT_PRETRAINED")
pytestmark = [
    pytest.mark.pretrained,
    pytest.mark.skipif(not FOLDER, reason="HF_COPILOT_PRETRAINED names no folder with a pretrained Pilot"),
]
COPILOTS = {  # the default, and the paper's memory with the Pilot's vocabulary: no second matrix of 49,152 rows
    "tokens": CopilotConfig(),
    "states": CopilotConfig(memory="pilot", vocab_projection="pilot", hidden_state_lag=0),
}
STEPS, SAVED = 4, 2
CHATS = [
    [{"role": "user", "content": "How many legs have three cats?"}],
    [{"role": "user", "content": "Name the capital of France, and one river of that country."}],
    [{"role": "user", "content": "13 + 21 = ?"}],
]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def chats(count: int, seed: int) -> Dataset:
    """Sums, asked and answered in the Pilot's own chat form."""
    rng = random.Random(seed)
    pairs = [(rng.randint(1, 99), rng.randint(1, 99)) for _ in range(count)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{a} + {b} = ?"}],
                "completion": [{"role": "assistant", "content": f"It is {a + b}."}],
            }
            for a, b in pairs
        ]
    )


def make_trainer(folder, kind: str) -> CopilotTrainer:
    return CopilotTrainer(
        model=FOLDER,
        args=CopilotSFTConfig(
            **(QUIET | {"save_strategy": "steps", CHECKPOINTING: False}),
            output_dir=str(folder),
            model_init_kwargs={"dtype": "float32"},
            max_steps=STEPS,
            save_steps=SAVED,
            logging_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            copilot_learning_rate=1e-3,
        ),
        train_dataset=chats(8, seed=0),
        eval_dataset=chats(4, seed=1),
        processing_class=AutoTokenizer.from_pretrained(FOLDER),
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear"),
        copilot=COPILOTS[kind],
    )


@pytest.fixture(scope="module", params=COPILOTS)
def trained(request, tmp_path_factory):
    """A run of a few steps, saved."""
    trainer = make_trainer(tmp_path_factory.mktemp(request.param), request.param)
    trainer.kind = request.param
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def loaded(trained):
    """Pilot, Copilot and tokenizer as a user loads them."""
    folder = trained.args.output_dir
    pilot = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    copilot = CopilotModel.from_pretrained(f"{folder}/copilot")
    return pilot, copilot, AutoTokenizer.from_pretrained(folder)


def asked(tokenizer, messages: list) -> dict[str, torch.Tensor]:
    """One chat or several, left-padded."""
    form = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    tokenizer.padding_side = "left"
    return dict(tokenizer.apply_chat_template(messages, padding=True, **form))


def answers(loaded, messages: list, strength: float | None = None, **generation) -> list[list[int]]:
    """The new tokens of each row up to its end."""
    pilot, copilot, tokenizer = loaded
    inputs = asked(tokenizer, messages)
    with CopilotLogitsProcessor(copilot, pilot, strength, tokenizer) as processor:
        out = pilot.generate(**inputs, logits_processor=[processor], **(GREEDY | generation))
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in rows]


def test_training(trained):
    """The end token, which is the pad token, is learnt; both models move, and the frozen base does not."""
    end = trained.processing_class.eos_token_id
    assert end == trained.processing_class.pad_token_id
    records = [record for round_ in trained.learner.log.rounds for record in round_]
    assert len(records) == 2 * STEPS and all(end in record.labels.tolist() for record in records)
    entries = [entry for entry in trained.state.log_history if "pilot_nll" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert entries[-1]["pilot_nll"] < entries[0]["pilot_nll"] == pytest.approx(entries[0]["rectified_nll"], rel=1e-4)
    assert entries[-1]["rectified_nll"] != pytest.approx(entries[-1]["pilot_nll"], rel=1e-3)
    frozen = trained.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    fresh = AutoPeftModelForCausalLM.from_pretrained(trained.args.output_dir, dtype=torch.float32)
    assert torch.equal(frozen, fresh.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight)


def test_what_is_loaded_is_what_was_trained(trained, loaded):
    pilot, copilot, tokenizer = loaded
    assert_same(copilot, trained.copilot.cpu())
    rectified = answers(loaded, [CHATS[2]])
    assert rectified == answers((trained.model.eval(), trained.copilot, tokenizer), [CHATS[2]])
    inputs = asked(tokenizer, [CHATS[2]])
    bare = pilot.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    assert answers(loaded, [CHATS[2]], strength=0.0)[0] == [token for token in bare if token != tokenizer.eos_token_id]


def test_a_batch_equals_single_rows(loaded):
    """Prompts of several lengths, padded with the end token, which is inside every chat as well."""
    assert answers(loaded, CHATS, strength=2.0) == [answers(loaded, [chat], strength=2.0)[0] for chat in CHATS]


def test_beams_have_the_scores_of_teacher_forcing(loaded):
    pilot, copilot, tokenizer = loaded
    inputs = asked(tokenizer, [CHATS[2]])
    beams = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "do_sample": False}
    beams |= {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    with CopilotLogitsProcessor(copilot, pilot, strength=1.0) as processor:
        out = pilot.generate(**inputs, logits_processor=[processor], **beams)
    length, end = inputs["input_ids"].shape[1], tokenizer.eos_token_id
    rows = []
    for ids in out.sequences.tolist():
        new = ids[length:]
        new = new[: new.index(end) + 1] if end in new else new
        rows.append({"input_ids": ids[:length] + new, "labels": [-100] * length + new})
    found = [row.log_likelihoods[0].sum() for row in score(pilot, copilot, rows, strengths=[1.0])]
    torch.testing.assert_close(torch.stack(found), out.sequences_scores, rtol=1e-3, atol=1e-3)


def test_a_pipeline_answers_as_generate_does(loaded):
    pilot, copilot, tokenizer = loaded
    ask = pipeline("text-generation", model=pilot, tokenizer=tokenizer)
    with CopilotLogitsProcessor(copilot, pilot, tokenizer=tokenizer) as processor:
        said = ask(CHATS[0], logits_processor=[processor], **GREEDY)[0]["generated_text"][-1]
    assert said == {"role": "assistant", "content": tokenizer.decode(answers(loaded, [CHATS[0]])[0])}


def test_the_strength_that_is_chosen_is_best_there(trained):
    found = trained.calibrate()
    assert found["strengths"] == sorted({0.0, *STRENGTHS}) and min(found["nll"]) <= found["nll"][0]
    metrics = trained.evaluate()
    assert metrics["eval_rectified_nll"] == pytest.approx(min(found["nll"]), rel=1e-4)
    assert metrics["eval_pilot_nll"] == pytest.approx(found["nll"][0], rel=1e-4)


def test_resumed_equals_uninterrupted(trained, tmp_path):
    resumed = make_trainer(tmp_path, trained.kind)
    resumed.train(resume_from_checkpoint=f"{trained.args.output_dir}/checkpoint-{SAVED}")
    assert resumed.state.global_step == STEPS
    assert_same(resumed.model, trained.model)
    assert_same(resumed.copilot, trained.copilot)

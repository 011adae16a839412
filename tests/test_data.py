"""Every kind of data and loss of SFTTrainer: the Pilot is the parent's, and the Copilot sees the same labels."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from test_learner import forward
from tiny import OBJECTIVES, QUIET, VOCAB_SIZE, addition, assert_same, tiny_pilot, tiny_tokenizer, trained_like
from trl import SFTConfig, SFTTrainer

from hf_copilot import CopilotLearner, CopilotSFTConfig, CopilotTrainer

CHAT = {
    "messages": [
        [
            {"role": "user", "content": "1+2="},
            {"role": "assistant", "content": f"{i}"},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": f"{i + 1}."},
        ]
        for i in range(32)
    ]
}


def tokenized() -> Dataset:
    tokenizer = tiny_tokenizer()
    rows = [(tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]) for row in addition(32)]
    masks = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows]
    return Dataset.from_dict({"input_ids": [p + a for p, a in rows], "completion_mask": masks})


KINDS = {
    "prompt_completion": (addition(32), {}),
    "whole_text": (addition(32), {"completion_only_loss": False}),
    "chat_turns": (Dataset.from_dict(CHAT), {"assistant_only_loss": True}),
    "tokenized": (tokenized(), {}),
    "streaming": (addition(32).to_iterable_dataset(), {}),
    "dft": (addition(32), {"loss_type": "dft"}),
    "label_smoothing": (addition(32), {"label_smoothing_factor": 0.1}),
    "neftune": (addition(32), {"neftune_noise_alpha": 5.0}),
    "packed": (addition(32), {"packing": True, "packing_strategy": "bfd", "max_length": 24}),
    "packed_split": (addition(32, form="text"), {"packing": True, "packing_strategy": "bfd_split", "max_length": 8}),
    "packed_wrapped": (addition(32, form="text"), {"packing": True, "packing_strategy": "wrapped", "max_length": 8}),
    "padding_free": (addition(32), {"padding_free": True, "max_length": None}),
    "compiled": (addition(32), {"torch_compile": True, "torch_compile_backend": "eager"}),
    "bfloat16": (addition(32), {"bf16": True}),
}


def train(trainer_class, config_class, folder, data, resume_from=None, **changes):
    args = {"max_steps": 4, "logging_steps": 2, "learning_rate": 1e-2}
    args |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_class(
        model=tiny_pilot(attention_dropout=0.1),
        args=config_class(output_dir=str(folder), **(QUIET | args | changes)),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_the_pilot_is_the_parents(tmp_path, kind):
    data, changes = KINDS[kind]
    ours = train(CopilotTrainer, CopilotSFTConfig, tmp_path / "ours", data, **changes)
    theirs = train(SFTTrainer, SFTConfig, tmp_path / "theirs", data, **changes)
    assert_same(ours.model, theirs.model)
    logs = [entry for entry in ours.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["copilot_loss"] > 0 and entry["rectified_nll"] > 0 for entry in logs)
    assert "copilot_skipped_steps" not in logs[-1]


def test_every_turn_of_a_chat_is_a_run(tmp_path):
    data, changes = KINDS["chat_turns"]
    trainer = train(CopilotTrainer, CopilotSFTConfig, tmp_path, data, **changes)
    for record in (record for round_ in trainer.learner.log.rounds for record in round_):
        assert record.is_start.sum() == 2
        assert record.labels[-1] == trainer.processing_class.eos_token_id


def test_several_evaluation_sets_and_prediction(tmp_path):
    trainer = CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(output_dir=str(tmp_path), **QUIET),
        train_dataset=addition(16),
        eval_dataset={"a": addition(4, seed=1), "b": addition(4, seed=2)},
        processing_class=tiny_tokenizer(),
    )
    metrics = trainer.evaluate()
    assert metrics["eval_a_rectified_nll"] > 0 and metrics["eval_b_pilot_token_accuracy"] >= 0
    predicted = trainer.predict(trainer.eval_dataset["a"])
    assert predicted.metrics["test_pilot_nll"] == pytest.approx(metrics["eval_a_pilot_nll"])
    assert predicted.predictions.shape[-1] == VOCAB_SIZE


# ---- what must not matter ------------------------------------------------------------------------------------------

DOCUMENTS = [[5, 15, 6, 17, 9, 8, 2], [7, 7, 15, 8, 17, 5, 5, 10, 2], [9, 15, 9, 17, 6, 6, 2]]
PROMPTS = [4, 5, 4]


def labels_of(document: list[int], prompt: int) -> list[int]:
    return [-100] * prompt + document[prompt:]


def packed(documents=DOCUMENTS) -> dict[str, torch.Tensor]:
    """All in one row, without a mask: positions begin anew."""
    labels = [token for pair in zip(documents, PROMPTS, strict=True) for token in labels_of(*pair)]
    positions = [position for document in documents for position in range(len(document))]
    ids = [token for document in documents for token in document]
    return {n: torch.tensor([x]) for n, x in (("input_ids", ids), ("labels", labels), ("position_ids", positions))}


def padded(side="right", pad=0, documents=DOCUMENTS) -> dict[str, torch.Tensor]:
    width = max(len(document) for document in documents)

    def row(values: list[int], filler: int) -> list[int]:
        fill = [filler] * (width - len(values))
        return fill + values if side == "left" else values + fill

    columns = {
        "input_ids": [row(document, pad) for document in documents],
        "labels": [row(labels_of(*pair), -100) for pair in zip(documents, PROMPTS, strict=True)],
        "attention_mask": [row([1] * len(document), 0) for document in documents],
    }
    return {name: torch.tensor(values) for name, values in columns.items()}


def corrections(batches, config=None) -> list[torch.Tensor]:
    """f of every document."""
    pilot = tiny_pilot().eval()
    learner = CopilotLearner(trained_like(pilot, config), pilot, log_dtype=torch.float32)
    for batch in batches:
        with learner.observe(batch):
            pilot(**{name: tensor for name, tensor in batch.items() if name != "labels"}, use_cache=False)
    return [forward(learner, [record]) for record in learner.round]


def assert_equal_corrections(found, expected):
    assert len(found) == len(expected) == len(DOCUMENTS)
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, atol=1e-4)


def test_packed_equals_unpacked():
    assert_equal_corrections(corrections([packed()]), corrections([padded()]))


def test_padding_side_and_pad_token_do_not_matter():
    for changes in ({"side": "left"}, {"pad": 9}, {"side": "left", "pad": 9}):
        assert_equal_corrections(corrections([padded(**changes)]), corrections([padded()]))


def test_documents_do_not_see_each_other():
    changed = [[30] * len(DOCUMENTS[0]), *DOCUMENTS[1:]]
    before, after = corrections([packed()]), corrections([packed(changed)])
    assert not torch.allclose(before[0], after[0], atol=1e-2)
    for mine, other in zip(before[1:], after[1:], strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def rows_of(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(len(batch["labels"]))]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_accumulated_or_packed_is_the_same_step(objective):
    """The Copilot after one step on the same documents, however the Pilot's batches were cut."""
    config, weights = OBJECTIVES[objective], []
    for batches in ([padded()], rows_of(padded()), [packed()], [dict(reversed(padded().items()))]):
        pilot = tiny_pilot().eval()
        learner = CopilotLearner(trained_like(pilot, config), pilot, num_training_steps=2, log_dtype=torch.float32)
        for batch in batches:
            with learner.observe(batch):
                pilot(**{name: tensor for name, tensor in batch.items() if name != "labels"}, use_cache=False)
        learner.update(learner.round)
        weights.append(torch.cat([p.detach().flatten() for p in learner.copilot.parameters()]))
    for other in weights[1:]:
        assert torch.allclose(weights[0], other, atol=1e-5)

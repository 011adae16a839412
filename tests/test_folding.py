"""Folding: p̃ becomes the teacher of the Pilot's own weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import QUIET, VOCAB_SIZE, addition, assert_same, sums, tiny_pilot, tiny_seq2seq, tiny_tokenizer, trained_like
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments, TrainingArguments
from trl import SFTConfig

from hf_copilot import CopilotConfig, CopilotSeq2SeqTrainer, CopilotTrainer, fold_copilot, score
from hf_copilot.training.folding import SoftTargets, collate, folding_loss, labelled_rows, teach, with_soft_targets

ROWS = [  # a prompt and a completion; no prompt; nothing labelled; two completions
    {"input_ids": [5, 9, 12, 20, 21, 2], "labels": [-100, -100, -100, 20, 21, 2]},
    {"input_ids": [11, 12, 13], "labels": [11, 12, 13]},
    {"input_ids": [11, 12, 13], "labels": [-100, -100, -100]},
    {"input_ids": [5, 9, 12, 30, 31, 7, 8], "labels": [-100, 9, -100, -100, 31, 7, 8]},
]
LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def arguments(tmp_path, **changes):
    settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 60, "logging_steps": 1000}
    return TrainingArguments(str(tmp_path), **(QUIET | settings | changes))


def distributions(seed=0):
    """z `[6, V]`, and log p̃ `[6, V]` of another."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = 3 * torch.randn(2, 6, VOCAB_SIZE, generator=generator)
    return logits.requires_grad_(), teacher.log_softmax(-1)


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_with_all_tokens_it_is_the_divergence():
    logits, teacher = distributions()
    log_probs, tokens = teacher.topk(VOCAB_SIZE)
    expected = F.kl_div(logits.log_softmax(-1), teacher, reduction="sum", log_target=True)
    torch.testing.assert_close(folding_loss(logits, tokens.int(), log_probs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, 20])
def test_the_other_tokens_count_as_one(k):
    logits, teacher = distributions()
    log_probs, tokens = teacher.topk(k)

    def coarse(log_p):  # the k tokens, and all others together
        kept = log_p.exp().gather(-1, tokens)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)

    expected = F.kl_div(coarse(logits.log_softmax(-1)).log(), coarse(teacher), reduction="sum")
    found = folding_loss(logits, tokens.int(), log_probs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found < F.kl_div(logits.log_softmax(-1), teacher, reduction="sum", log_target=True)


@pytest.mark.parametrize("sharp", [1.0, 100.0])
def test_who_knows_it_all_learns_nothing(sharp):
    logits = (sharp * distributions()[0].detach()).requires_grad_()
    log_probs, tokens = logits.detach().log_softmax(-1).topk(5)
    loss = folding_loss(logits, tokens.int(), log_probs)
    loss.backward()
    assert loss.abs() < 1e-5 and logits.grad.abs().max() < 1e-5


def test_a_sure_teacher_of_an_unsure_pilot():
    """Nothing is left of the teacher beside its k tokens, and something of the Pilot."""
    logits = torch.zeros(2, VOCAB_SIZE, requires_grad=True)
    sharp = torch.full((2, VOCAB_SIZE), -100.0).scatter_(1, torch.tensor([[3], [5]]), 0.0)
    log_probs, tokens = sharp.topk(4)
    loss = folding_loss(logits, tokens, log_probs)
    loss.backward()
    assert loss.item() == pytest.approx(2 * torch.tensor(VOCAB_SIZE).log().item(), rel=1e-4)
    assert logits.grad.isfinite().all() and logits.grad[0, 3] < 0 < logits.grad[0, 5]


# ---- the teacher ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"memory": "pilot"}, {"fusion": "probability", "objective": "rmse"}], ids=str)
def test_the_teacher_is_the_rectified_distribution(pilot, config):
    copilot = trained_like(pilot, CopilotConfig(**config))
    taught = teach(pilot, copilot, ROWS, strength=0.6, top_k=VOCAB_SIZE)
    for row, soft, scored in zip(ROWS, taught, score(pilot, copilot, ROWS, [0.6]), strict=True):
        labels = torch.tensor(row["labels"])[1:]
        labels = labels[labels != -100]
        assert soft.tokens.dtype == torch.int32 and soft.tokens.shape == (len(labels), VOCAB_SIZE)
        found = soft.log_probs[soft.tokens == labels[:, None]]  # of the labels
        torch.testing.assert_close(found, scored.log_likelihoods[0])
        torch.testing.assert_close(soft.log_probs.exp().sum(-1), torch.ones(len(labels)))


def test_batches_of_the_teacher_change_nothing(pilot):
    copilot = trained_like(pilot)
    together, alone = (teach(pilot, copilot, ROWS, top_k=3, batch_size=size) for size in (16, 1))
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=1e-4, atol=1e-4)


def test_targets_stay_at_their_places():
    targets = [
        SoftTargets(torch.full((m, 2), i, dtype=torch.int32), torch.zeros(m, 2)) for i, m in enumerate((3, 2, 0, 4))
    ]
    rows = with_soft_targets(ROWS, targets)
    batch = collate(rows)
    assert len(rows) == 3 and batch["labels"].shape == (3, 7)
    assert batch["teacher_tokens"][:, 0].tolist() == [0] * 3 + [1] * 2 + [3] * 4


# ---- folding --------------------------------------------------------------------------------------------------------


def divergence(pilot, teacher):
    dataset = with_soft_targets(ROWS, teacher)
    with torch.no_grad():
        batch = collate(dataset)
        logits = pilot(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits[:, -batch["labels"].shape[1] : -1]  # without virtual tokens
    labels = batch["labels"][:, 1:]
    return folding_loss(logits[labels != -100], batch["teacher_tokens"], batch["teacher_log_probs"]).item()


@pytest.mark.parametrize("way", ["full", "lora", "checkpointing"])
def test_the_pilot_learns_the_rectified_distribution(tmp_path, way):
    pilot = tiny_pilot()
    copilot = trained_like(pilot)
    kept = {name: tensor.clone() for name, tensor in copilot.state_dict().items()}
    teacher = teach(pilot, copilot, ROWS, top_k=8)
    before = divergence(pilot, teacher)
    student = get_peft_model(pilot, LORA) if way == "lora" else pilot
    output = fold_copilot(
        student, copilot, ROWS, arguments(tmp_path, gradient_checkpointing=way == "checkpointing"), top_k=8
    )
    assert output.global_step == 60
    assert divergence(student.eval(), teacher) < 0.2 * before
    assert all(torch.equal(kept[name], tensor) for name, tensor in copilot.state_dict().items())
    if way != "checkpointing":  # which has a hook of its own
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in pilot.modules())


def test_virtual_tokens_are_no_targets(tmp_path):
    """Beside which a Copilot can't generate."""
    pilot = get_peft_model(tiny_pilot(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    copilot = trained_like(pilot)
    teacher = teach(pilot, copilot, ROWS)
    before = divergence(pilot, teacher)
    fold_copilot(pilot, copilot, ROWS, arguments(tmp_path, learning_rate=0.1))
    assert divergence(pilot, teacher) < before


def test_a_resumed_folding_is_the_uninterrupted_one(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
    folded = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        pilot = tiny_pilot()
        args = arguments(tmp_path / name, resume_from_checkpoint=resume, **settings)
        fold_copilot(pilot, trained_like(pilot), ROWS, args)
        folded.append(pilot)
    assert_same(*folded)


def test_the_loss_is_a_mean_over_targets(tmp_path):
    """However a step is cut into micro-batches."""

    def weights(**sizes):
        pilot = tiny_pilot()
        copilot = trained_like(pilot)
        fold_copilot(pilot, copilot, ROWS * 2, arguments(tmp_path, max_steps=3, optim="sgd", seed=1, **sizes))
        return pilot

    whole = weights(per_device_train_batch_size=6)
    parts = weights(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_can_not_be_folded_raises(tmp_path, monkeypatch):
    pilot = tiny_pilot()
    copilot, args = trained_like(pilot), arguments(tmp_path)
    with pytest.raises(ValueError, match="λ is 0"):
        fold_copilot(pilot, copilot, ROWS, args, strength=0.0)
    with pytest.raises(ValueError, match="top_k=0"):
        fold_copilot(pilot, copilot, ROWS, args, top_k=0)
    with pytest.raises(ValueError, match="No row has a labelled token"):
        fold_copilot(pilot, copilot, ROWS[2:3], args)
    with pytest.raises(ValueError, match="label_smoothing_factor=0"):
        fold_copilot(pilot, copilot, ROWS, arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="is_trainable=True"):
        fold_copilot(tiny_pilot().requires_grad_(False), copilot, ROWS, args)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(NotImplementedError, match="one process"):
        fold_copilot(pilot, copilot, ROWS, args)


# ---- in a trainer ---------------------------------------------------------------------------------------------------


def trained(tmp_path, form="prompt-completion", peft_config=None, eval_rows=16, **changes):
    settings = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 100}
    trainer = CopilotTrainer(
        model=tiny_pilot(),
        args=SFTConfig(str(tmp_path), **(QUIET | settings | changes)),
        train_dataset=addition(48, form=form),
        eval_dataset=addition(eval_rows, seed=1, form=form) if eval_rows else None,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("way", ["full", "lora", "chat"])
def test_a_trainer_folds(tmp_path, way, caplog, monkeypatch):
    chat = {"form": "chat", "assistant_only_loss": True} if way == "chat" else {}
    settings = {"eval_on_start": True, "warmup_steps": 2}
    trainer = trained(tmp_path, peft_config=LORA if way == "lora" else None, **settings, **chat)
    copilot = trainer.copilot
    copilot.config.strength = 1.0
    metrics = trainer.evaluate()
    monkeypatch.setattr("hf_copilot.training.metrics.LITTLE", 2.0)  # whatever is left would be said to be little
    caplog.clear()
    found = trainer.fold_copilot(num_train_epochs=10, learning_rate=3e-3)
    assert "it_does_not_help" not in caplog.text  # all of the gain may be in the Pilot
    assert found["pilot_nll"] == pytest.approx(metrics["eval_pilot_nll"], rel=1e-4)
    assert found["rectified_nll"] == pytest.approx(metrics["eval_rectified_nll"], rel=1e-4)
    assert found["kept"] == pytest.approx(
        (found["pilot_nll"] - found["folded_nll"]) / (found["pilot_nll"] - found["rectified_nll"])
    )
    assert found["kept"] > 0.3
    chosen = trainer.copilot.config.calibration
    assert chosen["nll"][0] == pytest.approx(found["folded_nll"]) and chosen["strength"] == copilot.config.strength
    assert trainer.evaluate()["eval_pilot_nll"] == pytest.approx(found["folded_nll"], rel=1e-4)


def test_without_an_evaluation_set_the_copilot_is_left_off(tmp_path, caplog):
    trainer = trained(tmp_path, eval_rows=0)
    found = trainer.fold_copilot()
    assert set(found) == {"train_loss"} and trainer.copilot.config.strength == 0
    assert "λ is 0 now" in caplog.text


def test_an_encoder_decoder_folds(tmp_path):
    args = Seq2SeqTrainingArguments(str(tmp_path), **QUIET, max_steps=8, learning_rate=1e-3)
    pilot = tiny_seq2seq()
    trainer = CopilotSeq2SeqTrainer(
        pilot,
        args,
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer(), pilot),
        train_dataset=sums(32),
        eval_dataset=sums(8, seed=1),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.copilot.config.strength = 1.0
    before = tiny_seq2seq()
    before.load_state_dict(pilot.state_dict())
    found = trainer.fold_copilot(num_train_epochs=4)
    assert found["folded_nll"] < found["pilot_nll"]
    with pytest.raises(AssertionError):
        assert_same(before, pilot)


def test_rows_of_an_encoder_decoder_are_whole(tmp_path):
    """Padded to the same length as their prompts, and beside a column that only the trainer ignores."""
    rows = sums(10)
    rows = rows.add_column("question", ["a text"] * len(rows))
    trainer = CopilotSeq2SeqTrainer(
        tiny_seq2seq(),
        Seq2SeqTrainingArguments(str(tmp_path), **QUIET, per_device_eval_batch_size=4),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer(), pad_to_multiple_of=8),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    found = labelled_rows(trainer, trainer.train_dataset)
    assert [row["input_ids"].tolist() for row in found] == rows["input_ids"]
    assert [row["labels"][row["labels"] != -100].tolist() for row in found] == rows["labels"]


def test_packed_rows_streams_and_several_evaluation_sets_raise(tmp_path):
    trainer = trained(tmp_path, form="text", packing=True, max_length=32, eval_packing=False)
    with pytest.raises(NotImplementedError, match="one document in each row"):
        trainer.fold_copilot()
    with pytest.raises(NotImplementedError, match="A stream"):
        trainer.fold_copilot(train_dataset=iter(()))
    trainer.eval_dataset = {"one": trainer.eval_dataset, "another": trainer.eval_dataset}
    trainer.args.packing = False
    with pytest.raises(NotImplementedError, match="one evaluation set"):
        trainer.fold_copilot()

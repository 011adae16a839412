"""CopilotTrainer: the Pilot is trained as by SFTTrainer, bit for bit, and the Copilot learns beside it."""

from __future__ import annotations

import copy
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny import MEMORIES, QUIET, VOCAB_SIZE, addition, assert_same, tiny_pilot, tiny_tokenizer
from transformers import Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.common import CHECKPOINTING
from hf_copilot import (
    CopilotArguments,
    CopilotCallback,
    CopilotConfig,
    CopilotLogitsProcessor,
    CopilotModel,
    CopilotSFTConfig,
    CopilotTrainer,
)
from hf_copilot.training.checkpoint import TORN, written_beside
from hf_copilot.training.metrics import UNCHOSEN_STRENGTH

DROPOUT = {"attention_dropout": 0.1}


def settings(tmp_path, **changes):
    base = {"output_dir": str(tmp_path), "max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4}
    return base | {"learning_rate": 1e-2} | QUIET | changes


def train(trainer_class, tmp_path, data="prompt-completion", peft=None, pilot=None, config=None, **changes):
    config_class = CopilotSFTConfig if trainer_class is CopilotTrainer else SFTConfig
    extra = {"copilot": config} if trainer_class is CopilotTrainer else {}
    trainer = trainer_class(
        model=pilot if pilot is not None else tiny_pilot(**DROPOUT),
        args=config_class(**settings(tmp_path, **changes)),
        train_dataset=addition(64, form=data) if isinstance(data, str) else data,
        processing_class=tiny_tokenizer(),
        peft_config=peft,
        **extra,
    )
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def count_hooks(model):
    """Hooks of ours."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(type(getattr(hook, "__self__", None)).__module__.startswith("hf_copilot") for hook in hooks)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "config", [None, CopilotConfig.paper(num_hidden_layers=2, dropout=0.2)], ids=["ours", "paper"]
)
def test_the_pilot_is_the_parents_bit_for_bit(tmp_path, accumulation, lora, config):
    def peft():
        return LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "up_proj"]) if lora else None

    changes = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2}
    ours = train(CopilotTrainer, tmp_path / "a", peft=peft(), config=copy.deepcopy(config), **changes)
    theirs = train(SFTTrainer, tmp_path / "b", peft=peft(), **changes)
    assert_same(ours.model, theirs.model)
    assert losses(ours) == losses(theirs)
    assert count_hooks(ours.model) == 0
    assert ours.learner.steps == 4 and len(ours.learner.log) == 4 * 2 * accumulation


@pytest.mark.parametrize("config", [CopilotConfig(), CopilotConfig.paper(num_hidden_layers=2)], ids=["ours", "paper"])
def test_every_copilot_parameter_moves_and_no_frozen_one_of_the_pilot(tmp_path, config):
    pilot = tiny_pilot()
    before = {name: tensor.clone() for name, tensor in pilot.state_dict().items()}
    config.init, config.hidden_size, config.num_attention_heads = "random", 16, 2  # with an aligning layer
    trainer = CopilotTrainer(
        model=pilot,
        args=CopilotSFTConfig(**settings(tmp_path)),
        train_dataset=addition(64),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4),
        copilot=config,
    )
    fresh = {name: tensor.clone() for name, tensor in trainer.copilot.state_dict().items()}
    trainer.train()
    still = [name for name, tensor in trainer.copilot.state_dict().items() if torch.equal(tensor, fresh[name])]
    unused = ["embed_tokens.weight"] if config.copilot_input == "token" else []
    assert still == unused
    after = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(before[n.replace(".base_layer", "")], t) for n, t in after.items() if "lora_" not in n)
    assert any(bool(t.any()) for n, t in after.items() if "lora_B" in n)


@pytest.mark.parametrize("data", ["prompt-completion", "text", "chat"])
def test_forms_of_data(tmp_path, data):
    changes = {"assistant_only_loss": True} if data == "chat" else {}
    trainer = train(CopilotTrainer, tmp_path, data=data, **changes)
    record = next(iter(trainer.learner.log.rounds[0]))
    assert (record.positions[0] == 0) == (data == "text")
    assert trainer.state.log_history[0]["copilot_loss"] > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_logs_one_record_per_document(tmp_path, checkpointing):
    config = CopilotConfig(memory="pilot")
    trainer = train(CopilotTrainer, tmp_path, config=config, **{CHECKPOINTING: checkpointing})
    assert len(trainer.learner.log) == 4 * 4


def train_beside_a_pilot_that_hardly_learns(tmp_path, config=None):
    """The Pilot's rate is tiny; the metrics are on problems that neither has seen."""
    trainer = CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(**settings(tmp_path, max_steps=40, learning_rate=1e-5, copilot_learning_rate=1e-2)),
        train_dataset=addition(160),
        eval_dataset=addition(32, seed=7),
        processing_class=tiny_tokenizer(),
        copilot=config,
    )
    trainer.train()
    return trainer, trainer.evaluate()


def test_the_copilot_learns_what_the_pilot_gets_wrong(tmp_path):
    trainer, metrics = train_beside_a_pilot_that_hardly_learns(tmp_path)
    assert metrics["eval_rectified_nll"] < 0.8 * metrics["eval_pilot_nll"]
    assert metrics["eval_pilot_nll"] == pytest.approx(metrics["eval_loss"], rel=1e-2)
    assert count_hooks(trainer.model) == 0
    train_log = trainer.state.log_history[0]
    for name in ("copilot_loss", "pilot_nll", "rectified_nll", "pilot_token_accuracy", "rectified_token_accuracy"):
        assert name in train_log and (name == "copilot_loss" or f"eval_{name}" in metrics)
    results = trainer.copilot.config.results
    assert results["rectified_nll"] == metrics["eval_rectified_nll"]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped", None])
def test_packed_and_padding_free_documents(tmp_path, strategy, memory):
    """Several documents in a row: no attention mask, positions that begin anew."""
    packing = {"packing": True, "packing_strategy": strategy, "max_length": 16}
    packing = packing if strategy else {"padding_free": True, "max_length": None}
    data = "text" if strategy == "wrapped" else "prompt-completion"
    trainer = train(CopilotTrainer, tmp_path, data=data, config=CopilotConfig(memory=memory), **packing)
    assert len(trainer.learner.log) >= 16 and trainer.state.log_history[0]["copilot_loss"] > 0


def test_compute_metrics_sees_the_pilot(tmp_path):
    seen = []
    trainer = CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(**settings(tmp_path)),
        train_dataset=addition(64),
        eval_dataset=addition(8, seed=2),
        processing_class=tiny_tokenizer(),
        compute_metrics=lambda prediction: seen.append(prediction.predictions.shape) or {"mine": 1.0},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_mine"] == 1.0 and "eval_rectified_nll" in metrics and seen[0][-1] == VOCAB_SIZE


def test_metrics_at_the_end_of_every_epoch(tmp_path):
    trainer = train(CopilotTrainer, tmp_path, logging_strategy="epoch", max_steps=-1, num_train_epochs=2)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["rectified_nll"] > 0 for entry in logs)


def test_one_adapter_config_for_both(tmp_path):
    """PEFT writes what it resolves into a config: the Pilot's adapter must still load into a Pilot."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=2)
    trainer = CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(**settings(tmp_path)),
        train_dataset=addition(64),
        processing_class=tiny_tokenizer(),
        peft_config=lora,
        copilot_peft_config=lora,
    )
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_pilot(), tmp_path)
    assert_same(loaded, trainer.model)
    adapted = {name.split(".lora_A")[0] for name, _ in trainer.learner.copilot.named_parameters() if "lora_A" in name}
    assert any("mlp" in name for name in adapted) and not any("lm_head" in name for name in adapted)
    assert_same(CopilotModel.from_pretrained(tmp_path / "copilot"), trainer.copilot)


class GenerateInEvaluation(TrainerCallback):
    """What people do to look at samples while training."""

    def __init__(self):
        self.texts = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        prompt = torch.tensor([[5, 15, 6, 17]])
        was_training = model.training
        model.eval()
        with CopilotLogitsProcessor(self.trainer.copilot, model) as processor:
            self.texts.append(model.generate(prompt, logits_processor=[processor], max_new_tokens=4, num_beams=2))
        model.train(was_training)


def test_generation_between_training_steps_changes_nothing(tmp_path):
    trainers = []
    for callback in (None, GenerateInEvaluation()):
        trainer = CopilotTrainer(
            model=tiny_pilot(),
            args=CopilotSFTConfig(**settings(tmp_path)),
            train_dataset=addition(64),
            processing_class=tiny_tokenizer(),
        )
        if callback is not None:
            callback.trainer = trainer
            trainer.add_callback(callback)
        trainer.train()
        trainers.append(trainer)
    assert len(callback.texts) == 4
    assert_same(trainers[0].model, trainers[1].model)
    assert_same(trainers[0].copilot, trainers[1].copilot)


def test_saving_and_loading(tmp_path):
    trainer = train(CopilotTrainer, tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    trainer.save_model()
    assert not (tmp_path / "checkpoint-2").exists()
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        loaded = CopilotModel.from_pretrained(folder / "copilot")
        assert_same(loaded, trainer.copilot)
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Copilot") == 1 and "copilot/" in card
    assert loaded.config.tokenizer_fingerprint and loaded.config.hf_copilot_version
    again = CopilotTrainer(
        model=tiny_pilot(),
        args=SFTConfig(**settings(tmp_path / "again")),
        train_dataset=addition(16),
        processing_class=tiny_tokenizer(),
        copilot=str(tmp_path / "copilot"),
    )
    assert_same(again.copilot, loaded)


def test_best_model_takes_its_copilot_along(tmp_path):
    trainer = CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(
            **settings(tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1),
            load_best_model_at_end=True,
            metric_for_best_model="eval_rectified_nll",
            greater_is_better=True,  # the first is the best: not the last
            copilot_strength="config",
        ),
        train_dataset=addition(64),
        eval_dataset=addition(8, seed=3),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    assert_same(CopilotModel.from_pretrained(best / "copilot"), trainer.copilot)
    first = next(entry for entry in trainer.state.log_history if "eval_rectified_nll" in entry)
    assert trainer.copilot.config.results["rectified_nll"] == first["eval_rectified_nll"]


def test_the_least_nll_is_the_best(tmp_path, caplog):
    settings_of = partial(settings, tmp_path, eval_strategy="epoch", metric_for_best_model="eval_rectified_nll")
    assert CopilotSFTConfig(**settings_of()).greater_is_better is False
    assert CopilotSFTConfig(**settings_of(greater_is_better=True)).greater_is_better is True
    args = SFTConfig(**settings_of())  # which takes greater_is_better=True
    data = {"train_dataset": addition(8), "eval_dataset": addition(8)}
    CopilotTrainer(tiny_pilot(), args, processing_class=tiny_tokenizer(), **data)
    assert "best where it is least" in caplog.text


def test_only_the_model_is_saved_with_its_copilot(tmp_path):
    trainer = train(CopilotTrainer, tmp_path, save_strategy="steps", save_steps=2, save_only_model=True)
    assert not list(tmp_path.rglob("copilot_state"))
    assert_same(CopilotModel.from_pretrained(tmp_path / "checkpoint-4" / "copilot"), trainer.copilot)
    with pytest.raises(ValueError, match="copilot_start_fresh=True"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


PUSHED = {  # by strategy: where the Copilot is in each push of a run that saves twice
    "end": [],
    "every_save": ["copilot"] * 2,
    "checkpoint": ["copilot", "last-checkpoint/copilot"] * 2,
    "all_checkpoints": ["copilot", "checkpoint-2/copilot", "copilot", "checkpoint-4/copilot"],
}


@pytest.mark.parametrize("strategy", PUSHED)
def test_push_takes_the_copilot_along(tmp_path, monkeypatch, strategy):
    pushed = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **kwargs):
            where = Path(kwargs.get("path_in_repo") or ".")
            files = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*")]
            kept = filter_repo_objects(files, ignore_patterns=kwargs.get("ignore_patterns"))
            pushed.append({str(where / name) for name in kept})
            return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    hub = {"push_to_hub": True, "hub_model_id": "me/m", "hub_strategy": strategy}
    trainer = train(CopilotTrainer, tmp_path, save_strategy="steps", save_steps=2, **hub)
    assert len(pushed) == len(PUSHED[strategy])
    for files, folder in zip(pushed, PUSHED[strategy], strict=True):
        assert {f"{folder}/model.safetensors", f"{folder}/config.json"} <= files
    trainer.push_to_hub()
    assert {"copilot/config.json", "copilot/README.md", "model.safetensors"} <= pushed[-1]


def test_what_is_being_uploaded_is_left_alone(tmp_path, monkeypatch):
    """A push that takes longer than a save: Trainer leaves the Pilot of the first one in output_dir."""
    job = type("Job", (Future,), {"done": lambda self: False})()
    job.set_result(None)
    api = {"create_repo": lambda self, name, **kwargs: SimpleNamespace(repo_id=name)}
    monkeypatch.setattr("transformers.trainer.hf_api", type("Api", (), api | {"upload_folder": lambda *a, **k: job}))
    hub = {"push_to_hub": True, "hub_model_id": "me/m", "hub_strategy": "every_save"}
    train(CopilotTrainer, tmp_path, save_strategy="steps", save_steps=2, **hub)
    first, pushed = (CopilotModel.from_pretrained(tmp_path / name) for name in ("checkpoint-2/copilot", "copilot"))
    assert_same(pushed, first)


def test_a_process_that_does_not_push_copies_nothing(tmp_path, monkeypatch):
    """Trainer keeps in the main process alone what is being uploaded."""
    trainer = train(CopilotTrainer, tmp_path, max_steps=1)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "copilot").exists()


def test_what_is_torn_or_half_written_is_not_pushed(tmp_path):
    """A Mistake Log holds token ids of the training data."""
    names = [f"{TORN}checkpoint-4/copilot_state/mistake_log-0.safetensors"]
    with written_beside(tmp_path / "copilot") as folder:
        names.append(f"{folder.name}/model.safetensors")
    assert list(filter_repo_objects(names, ignore_patterns=["_*", "checkpoint-*"])) == []


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments])
def test_arguments_of_other_kinds(tmp_path, kind):
    args = kind(**{"hub_token": "hf_secret"} | settings(tmp_path))
    data = addition(16)
    trainer = CopilotTrainer(model=tiny_pilot(), args=args, train_dataset=data, processing_class=tiny_tokenizer())
    assert trainer.copilot_args.copilot_learning_rate == 3e-4 and trainer.args.hub_token == "hf_secret"
    trainer.train()
    assert trainer.learner.steps == 4


def test_no_arguments_are_the_parents_defaults(tmp_path, monkeypatch):
    """SFTTrainer makes its own arguments; they want bf16, which is not to be had on a CPU, hence the stand-in."""
    monkeypatch.setattr("trl.trainer.sft_trainer.SFTConfig", lambda folder: SFTConfig(**settings(tmp_path / folder)))
    trainer = CopilotTrainer(model=tiny_pilot(), train_dataset=addition(16), processing_class=tiny_tokenizer())
    assert trainer.args.output_dir.endswith("-SFT")


@pytest.mark.parametrize("args", [CopilotArguments(), Seq2SeqTrainingArguments("unused", use_cpu=True)])
def test_arguments_of_another_trainer_are_named(args):
    with pytest.raises(TypeError, match="takes a CopilotSFTConfig or SFTConfig"):
        CopilotTrainer(tiny_pilot(), args, train_dataset=addition(16), processing_class=tiny_tokenizer())


def test_callbacks_that_are_added_later(tmp_path):
    """The Copilot's step stays behind them: one may ask for logging. A second Copilot is none for this trainer."""

    class Logs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = True

    args = CopilotSFTConfig(**settings(tmp_path, logging_steps=10))
    trainer = CopilotTrainer(tiny_pilot(), args, train_dataset=addition(16), processing_class=tiny_tokenizer())
    trainer.add_callback(Logs())
    trainer.train()
    assert sum("rectified_nll" in entry for entry in trainer.state.log_history) == 4
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match="trains a Copilot by itself"):
        trainer.add_callback(CopilotCallback())
    assert trainer.callback_handler.callbacks == before


def test_hooks_are_gone_after_an_exception(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(**settings(tmp_path)),
        train_dataset=addition(16),
        processing_class=tiny_tokenizer(),
        callbacks=[Stop()],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert count_hooks(trainer.model) == 0
    trainer.evaluate(addition(4))
    assert count_hooks(trainer.model) == 0


def test_an_empty_data_set_and_a_wrong_copilot_raise(tmp_path):
    def build(**kwargs):
        given = {"train_dataset": addition(16), "args": SFTConfig(**settings(tmp_path))} | kwargs
        return CopilotTrainer(model=tiny_pilot(), processing_class=tiny_tokenizer(), **given)

    with pytest.raises(ValueError, match="empty"):
        build(train_dataset=Dataset.from_dict({"prompt": [], "completion": []}))
    with pytest.raises(ValueError, match="`eval_dataset` b is empty"):
        build(eval_dataset={"a": addition(2), "b": Dataset.from_dict({"prompt": [], "completion": []})})
    with pytest.raises(ValueError, match="streamed data set is empty"):
        build(train_dataset=IterableDataset.from_generator(lambda: iter(())), args=SFTConfig(**settings(tmp_path)))
    with pytest.raises(ValueError, match="No row of `train_dataset`"):
        build(args=SFTConfig(**settings(tmp_path, max_length=3)))
    with pytest.raises(TypeError, match="CopilotConfig"):
        build(copilot=3)
    for adapter in ({"r": 8}, {}):
        with pytest.raises(ValueError, match="pass a config of PEFT"):
            build(copilot_peft_config=adapter)
    from tiny import trained_like

    with pytest.raises(ValueError, match="vocabulary rows"):
        build(copilot=trained_like(tiny_pilot(vocab_size=VOCAB_SIZE + 1)))


def test_a_copilot_moves_to_an_independently_trained_pilot(tmp_path):
    """Trained beside one Pilot, attached to another from the same base: it keeps its gain there."""
    base = tiny_pilot()
    common = {"max_steps": 60, "learning_rate": 1e-4}
    with_copilot = CopilotTrainer(
        model=copy.deepcopy(base),
        args=CopilotSFTConfig(**settings(tmp_path / "a", copilot_learning_rate=1e-2, **common)),
        train_dataset=addition(240),
        processing_class=tiny_tokenizer(),
    )
    with_copilot.train()
    other = SFTTrainer(
        model=copy.deepcopy(base),
        args=SFTConfig(**settings(tmp_path / "b", seed=5, **common)),
        train_dataset=addition(240, seed=11),
        processing_class=tiny_tokenizer(),
    )
    other.train()
    trainer = CopilotTrainer(
        model=other.model,
        args=CopilotSFTConfig(**settings(tmp_path / "c")),
        train_dataset=addition(16),
        eval_dataset=addition(64, seed=9),
        processing_class=tiny_tokenizer(),
        copilot=with_copilot.copilot,
    )
    metrics = trainer.evaluate()
    own = with_copilot.evaluate(addition(64, seed=9))
    gain = metrics["eval_pilot_nll"] - metrics["eval_rectified_nll"]
    own_gain = own["eval_pilot_nll"] - own["eval_rectified_nll"]
    assert own_gain > 0.1 and gain > 0.5 * own_gain


def plain_data():
    tokenizer = tiny_tokenizer()
    rows = []
    for row in addition(32):
        prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        pad = 12 - len(prompt) - len(answer)
        mask = [1] * (len(prompt) + len(answer)) + [0] * pad
        ids = prompt + answer + [0] * pad
        labels = [-100] * len(prompt) + answer + [-100] * pad
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return Dataset.from_list(rows)


def test_the_callback_on_a_plain_trainer(tmp_path):
    def trainer(callbacks):
        args = TrainingArguments(**settings(tmp_path, save_strategy="steps", save_steps=2))
        return Trainer(model=tiny_pilot(**DROPOUT), args=args, train_dataset=plain_data(), callbacks=callbacks)

    callback = CopilotCallback()
    ours = trainer([callback])
    ours.train()
    theirs = trainer([])
    theirs.train()
    assert_same(ours.model, theirs.model)
    assert "copilot_loss" in ours.state.log_history[0] and len(callback.learner.log) == 16
    assert_same(CopilotModel.from_pretrained(tmp_path / "copilot"), callback.copilot)
    assert count_hooks(ours.model) == 0
    assert callback.copilot.config.strength == UNCHOSEN_STRENGTH  # it sees no evaluation


def test_the_callback_and_the_best_model_raise(tmp_path):
    """The Pilot would be that of the best step, the Copilot that of the last."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    args = TrainingArguments(**settings(tmp_path, save_strategy="steps", save_steps=2), **best)
    data = {"train_dataset": plain_data(), "eval_dataset": plain_data()}
    with pytest.raises(NotImplementedError, match="different steps"):
        Trainer(model=tiny_pilot(), args=args, callbacks=[CopilotCallback()], **data).train()


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_the_callback_resumes(tmp_path, adapter):
    """An adapter of the Copilot too, whose frozen weights are then built anew from a Pilot that is trained already."""

    def run(resume=None):
        args = TrainingArguments(**settings(tmp_path, save_strategy="steps", save_steps=2))
        callback = CopilotCallback(copilot_peft_config=adapter)
        trainer = Trainer(model=tiny_pilot(), args=args, train_dataset=plain_data(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return callback.copilot

    assert_same(run(), run(str(tmp_path / "checkpoint-2")))


def test_the_callback_takes_the_trainers_own_arguments(tmp_path):
    def train(copilot_args=None, **changes):
        callback = CopilotCallback(copilot_args=copilot_args)
        args = CopilotSFTConfig(**settings(tmp_path, copilot_steps_per_round=2, **changes))
        data = {"train_dataset": addition(16), "processing_class": tiny_tokenizer()}
        SFTTrainer(model=tiny_pilot(), args=args, callbacks=[callback], **data).train()
        return callback.learner

    assert train().steps_per_round == 2
    assert train(CopilotArguments(copilot_steps_per_round=3)).steps_per_round == 3
    with pytest.raises(ValueError, match="can't hold rows out"):
        train(copilot_mistake_source="holdout")


def test_the_callback_trains_its_copilot_further(tmp_path):
    callback = CopilotCallback()
    args = TrainingArguments(**settings(tmp_path))
    trainer = Trainer(model=tiny_pilot(), args=args, train_dataset=plain_data(), callbacks=[callback])
    trainer.train()
    copilot, first = callback.copilot, callback.copilot.lm_head.weight.clone()
    trainer.train()
    assert callback.copilot is copilot and not torch.equal(copilot.lm_head.weight, first)


class Looks(TrainerCallback):
    """At the Pilot, in training mode and without gradient."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]))


def test_what_the_callback_leaves_alone(tmp_path):
    args = TrainingArguments(**settings(tmp_path, save_strategy="steps", save_steps=4, save_only_model=True))
    callbacks = [CopilotCallback(), Looks()]
    Trainer(model=tiny_pilot(), args=args, train_dataset=plain_data(), callbacks=callbacks).train()
    assert len(callbacks[0].learner.log) == 16
    assert {path.name for path in (tmp_path / "checkpoint-4").iterdir() if path.is_dir()} == {"copilot"}


def test_the_callback_without_labels_raises(tmp_path):
    args = TrainingArguments(**settings(tmp_path, label_smoothing_factor=0.1))
    trainer = Trainer(model=tiny_pilot(), args=args, train_dataset=plain_data(), callbacks=[CopilotCallback()])
    with pytest.raises(ValueError, match="label smoothing"):
        trainer.train()


def test_a_wrapped_pilot_is_trained_too(tmp_path):
    pilot = get_peft_model(tiny_pilot(), LoraConfig(task_type="CAUSAL_LM", r=2))
    assert train(CopilotTrainer, tmp_path, pilot=pilot).learner.steps == 4


def test_the_callback_and_virtual_tokens_raise(tmp_path):
    trainer = SFTTrainer(
        model=tiny_pilot(),
        args=SFTConfig(**settings(tmp_path)),
        train_dataset=addition(16),
        processing_class=tiny_tokenizer(),
        peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        callbacks=[CopilotCallback()],
    )
    with pytest.raises(NotImplementedError, match="use CopilotTrainer"):
        trainer.train()


def test_prompt_tuning(tmp_path):
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert train(CopilotTrainer, tmp_path, peft=peft).state.log_history[0]["copilot_loss"] > 0


def test_a_local_path_of_the_pilot_stays_private(tmp_path):
    tiny_pilot().save_pretrained(tmp_path / "pilot")
    tiny_tokenizer().save_pretrained(tmp_path / "pilot")
    trainer = CopilotTrainer(
        model=str(tmp_path / "pilot"),
        args=CopilotSFTConfig(**settings(tmp_path / "out")),
        train_dataset=addition(16),
    )
    trainer.copilot.save_pretrained(tmp_path / "copilot")
    for file in ("config.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "copilot" / file).read_text()
    source = CopilotConfig(init=str(tmp_path / "pilot"))
    trainer = train(CopilotTrainer, tmp_path / "again", config=source)
    assert trainer.copilot.config.init == "pilot" and source.init == str(tmp_path / "pilot")


def test_settings_of_an_adapted_copilot_are_live(tmp_path):
    trainer = CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(**settings(tmp_path)),
        train_dataset=addition(16),
        processing_class=tiny_tokenizer(),
        copilot_peft_config=LoraConfig(r=2),
    )
    trainer.copilot.config.strength = 0.5
    assert trainer.copilot.config.strength == 0.5


def test_rates_of_the_schedule_are_scaled_to_the_copilots(tmp_path):
    """`min_lr` is a rate, and the Pilot's: the Copilot's schedule ends at as large a share of its own peak."""
    trainer = train(
        CopilotTrainer,
        tmp_path,
        learning_rate=1e-3,
        copilot_learning_rate=1e-2,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 5e-4},
    )
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(5e-4)
    assert trainer.learner.optimizer.scheduler.get_last_lr()[0] == pytest.approx(5e-3)


def rows_of_a_stream():
    yield from addition(32)


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (addition(32), {"max_steps": -1, "num_train_epochs": 1.5}),
        (addition(32), {"max_steps": 10}),
        (IterableDataset.from_generator(rows_of_a_stream), {"max_steps": 16}),
    ],
    ids=["part of an epoch", "steps", "stream"],
)
def test_every_entry_that_trainer_logs_has_our_metrics(tmp_path, rows, settings):
    trainer = train(CopilotTrainer, tmp_path, data=rows, logging_strategy="epoch", **settings)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2 and all("rectified_nll" in entry for entry in entries)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("copilot_steps_per_round", 0),
        ("copilot_learning_rate", -1.0),
        ("copilot_learning_rate", float("nan")),
        ("copilot_weight_decay", -0.1),
        ("copilot_max_grad_norm", -1.0),
        ("copilot_log_rounds", 0),
        ("copilot_log_max_bytes", 0),
    ],
)
def test_a_number_out_of_range_raises_where_it_is_given(name, value):
    with pytest.raises(ValueError, match="at least"):
        CopilotArguments(**{name: value})


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_holdout_that_is_no_share_raises(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        CopilotArguments(copilot_mistake_source="holdout", copilot_holdout=share)

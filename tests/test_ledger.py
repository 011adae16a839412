"""The ledger of a run: every labelled token leads to its row, resumed equals uninterrupted, and nothing is pushed."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import trl.trainer.sft_trainer
from datasets import Dataset, concatenate_datasets
from huggingface_hub.utils import filter_repo_objects
from test_checkpoint import make_trainer
from test_data import KINDS, padded
from test_seq2seq import make as make_seq2seq
from tiny import CHAT_TEMPLATE, QUIET, addition, assert_same, sums, tiny_pilot, tiny_tokenizer, trained_like
from transformers import TrainerCallback

from hf_copilot import (
    CopilotLearner,
    CopilotSeq2SeqConfig,
    CopilotSeq2SeqTrainer,
    CopilotSFTConfig,
    CopilotTrainer,
    MistakeLedger,
    score,
)
from hf_copilot.ledger.row_tokens import RowTokens
from hf_copilot.training.ledger import (
    DOCUMENT,
    LEDGER_FOLDER,
    ROUNDS_HELD,
    TOKEN,
    LedgerWriter,
    documents_file,
    read_written,
    tokens_file,
)
from hf_copilot.training.row_ids import without_row_ids


def files(run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((Path(run) / LEDGER_FOLDER).iterdir())}


def different_rows(count: int, form: str = "prompt-completion") -> Dataset:
    """No two are the same, so that a wrong row id can't pass."""
    numbers = [f"{i + 3}+{2 * i}=" for i in range(count)], [f"{3 * i + 3}" for i in range(count)]
    if form == "text":
        return Dataset.from_dict({"text": [a + b for a, b in zip(*numbers, strict=True)]})
    return Dataset.from_dict(dict(zip(("prompt", "completion"), numbers, strict=True)))


def train_on(rows, folder, tokenizer=None, **changes) -> CopilotTrainer:
    args = {"max_steps": 40, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    trainer = CopilotTrainer(
        model=tiny_pilot(),
        args=CopilotSFTConfig(output_dir=str(folder), **(QUIET | args | changes)),
        train_dataset=rows,
        processing_class=tokenizer or tiny_tokenizer(),
    )
    trainer.train()
    return trainer


FORMS = {
    "padded": ("prompt-completion", {}),
    "by_length": ("prompt-completion", {"train_sampling_strategy": "group_by_length"}),
    "whole_text": ("text", {}),
    "padding_free": ("prompt-completion", {"padding_free": True, "max_length": None}),
    "pad_to_multiple": ("prompt-completion", {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8}),
    "packed": ("prompt-completion", {"packing": True, "max_length": 24}),
    "packed_split": ("text", {"packing": True, "packing_strategy": "bfd_split", "max_length": 6, "max_steps": 40}),
    "packed_wrapped": ("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 7}),
    "packed_and_shuffled": ("prompt-completion", {"packing": True, "max_length": 24, "shuffle_dataset": True}),
    "other_columns": ("prompt-completion", {"remove_unused_columns": False}),
    "held_out": ("prompt-completion", {"copilot_mistake_source": "holdout", "copilot_holdout": 0.25}),
    "two_workers": ("prompt-completion", {"dataloader_num_workers": 2, "max_steps": 12}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_token_leads_to_its_row(tmp_path, form):
    """`RowTokens` compares the labels of every document with those of the row that the ledger names. Every row
    is seen."""
    name, changes = FORMS[form]
    rows = different_rows(48, name)
    train_on(rows, tmp_path, **{"max_steps": 15} | changes)
    ledger = MistakeLedger.load(tmp_path)
    statistics = ledger.rows()
    assert len(statistics.row) == (36 if form == "held_out" else 48)
    text = RowTokens(ledger, rows, tiny_tokenizer())
    labels = {tuple(text.parts[row][text.labelled(row)].tolist()) for row in statistics.row}
    assert len(labels) > 20
    with pytest.raises(ValueError, match="holds other tokens than it did in the run"):
        RowTokens(ledger, rows.select([*range(1, 48), 0]), tiny_tokenizer())


def test_p_and_what_was_said_are_the_pilots(tmp_path):
    """With a rate of 0 the Pilot of the run is the Pilot after it, whose p `score` gives."""
    rows = different_rows(24)
    trainer = train_on(rows, tmp_path, learning_rate=0.0, max_steps=12)
    ledger = MistakeLedger.load(tmp_path)
    text = RowTokens(ledger, rows, tiny_tokenizer())
    for row in range(0, 24, 5):
        (found,) = score(trainer.model, trainer.copilot, [text.to_score(row)], [0.0])
        for _, tokens in ledger.of_row(row):
            assert np.allclose(tokens["p"], found.log_likelihoods[0].exp(), atol=1e-5)
            assert (tokens["said"] == -1).tolist() == found.is_likeliest[0].tolist()
            logits = trainer.model(torch.tensor(text.parts[row])[None]).logits[0]
            likeliest = logits[tokens["position"].astype(int) - 1].argmax(-1).tolist()
            labels = text.parts[row][tokens["position"]].tolist()
            expected = [-1 if a == b else a for a, b in zip(likeliest, labels, strict=True)]
            assert tokens["said"].tolist() == expected


@pytest.mark.parametrize("kind", ["prompt_completion", "packed", "packed_wrapped", "padding_free", "neftune"])
def test_the_ledger_changes_nothing_in_training(tmp_path, kind):
    rows, changes = KINDS[kind]
    trainers = [
        train_on(rows, tmp_path / str(writes), copilot_mistake_ledger=writes, max_steps=6, **changes)
        for writes in (True, False)
    ]
    assert_same(trainers[0].model, trainers[1].model)
    assert_same(trainers[0].copilot, trainers[1].copilot)
    assert not (tmp_path / "False" / LEDGER_FOLDER).exists()
    assert len(MistakeLedger.load(tmp_path / "True").documents) >= 6


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("changes", [{}, {"packing": True, "max_length": 24}], ids=["padded", "packed"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same_folder", "another_folder"])
def test_a_resumed_ledger_is_the_uninterrupted_one(tmp_path, step, changes, elsewhere):
    make_trainer(tmp_path / "a", **changes).train()
    uninterrupted = files(tmp_path / "a")
    folder = tmp_path / ("b" if elsewhere else "a")
    make_trainer(folder, **changes).train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert files(folder) == uninterrupted


class Killed(Exception):
    pass


class KillAtStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed


@pytest.mark.parametrize("cut", [0, 5, 17], ids=["whole", "torn", "torn_further"])
def test_a_killed_run_resumes_to_the_uninterrupted_ledger(tmp_path, cut):
    """Killed after the last checkpoint, with the last block written in part."""
    make_trainer(tmp_path / "straight").train()
    trainer = make_trainer(tmp_path / "run")
    trainer.add_callback(KillAtStep())
    with pytest.raises(Killed):
        trainer.train()
    assert MistakeLedger.load(tmp_path / "run").documents["step"][-1] == 5
    for name in (documents_file, tokens_file):
        path = name(tmp_path / "run" / LEDGER_FOLDER, 0)
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) - cut])
    make_trainer(tmp_path / "run").train(resume_from_checkpoint=True)
    assert files(tmp_path / "run") == files(tmp_path / "straight")


def test_a_new_run_begins_a_new_ledger(tmp_path):
    make_trainer(tmp_path).train()
    first = files(tmp_path)
    make_trainer(tmp_path).train()
    assert files(tmp_path) == first


@pytest.mark.parametrize("which", [documents_file, tokens_file])
def test_what_a_kill_cut_off_is_left_out_with_a_warning(tmp_path, caplog, which):
    make_trainer(tmp_path).train()
    whole = MistakeLedger.load(tmp_path)
    assert "cut off" not in caplog.text
    path = which(tmp_path / LEDGER_FOLDER, 0)
    path.write_bytes(path.read_bytes()[:-3])
    ledger = MistakeLedger.load(tmp_path)
    assert "was cut off while it was written" in caplog.text
    assert len(ledger.documents) == len(whole.documents) - 1
    assert len(ledger.tokens) == len(whole.tokens) - whole.documents["tokens"][-1]


def test_an_encoder_decoder_has_a_ledger_too(tmp_path):
    rows = sums(64)
    make_seq2seq(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, tmp_path, max_steps=20).train()
    ledger = MistakeLedger.load(tmp_path)
    text = RowTokens(ledger, rows)
    assert ledger.has_encoder and len(text.confusions()) > 0
    assert text.to_score(int(ledger.rows().row[0]))["labels"] == rows[int(ledger.rows().row[0])]["labels"]


def test_a_stream_has_no_row_ids_and_that_is_said(tmp_path, caplog):
    train_on(addition(32).to_iterable_dataset(), tmp_path, max_steps=2)
    assert "`train_dataset` is a IterableDataset, whose rows have no index" in caplog.text
    with pytest.raises(ValueError, match="holds no mistake ledger"):
        MistakeLedger.load(tmp_path)


def test_a_transform_is_applied_once_and_has_no_ledger(tmp_path, caplog):
    """Numbering shuffled rows would write them out, transformed, to be transformed again."""
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 8, "labels": [[5, 6, 7, 8]] * 8}).shuffle(seed=0)

    def transform(batch):
        return {"input_ids": [[token + 1 for token in row] for row in batch["input_ids"]], "labels": batch["labels"]}

    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False, "max_steps": 2}
    trainer = train_on(rows.with_transform(transform), tmp_path, **settings)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"][0].tolist() == [6, 7, 8, 9]
    assert "`train_dataset` has a transform" in caplog.text and trainer.learner.ledger is None


def test_chats_by_the_template_of_training_are_found_from_python(tmp_path, monkeypatch):
    """With assistant_only_loss SFTTrainer may take another template than the tokenizer's, which nobody saves."""
    other = CHAT_TEMPLATE.replace("<user>", "<user> ")
    monkeypatch.setattr(trl.trainer.sft_trainer, "get_training_chat_template", lambda tokenizer: other)
    tokenizer, rows = tiny_tokenizer(), addition(24, form="chat")
    plain = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.chat_template = plain
    train_on(rows, tmp_path, tokenizer, max_steps=2, assistant_only_loss=True)
    text = RowTokens(MistakeLedger.load(tmp_path), rows, tokenizer)
    rendered = tokenizer.apply_chat_template(rows[0]["messages"], chat_template=other)
    assert text.parts[0].tolist() == rendered["input_ids"]


def test_rows_that_were_prepared_are_numbered_anew(tmp_path):
    first = train_on(different_rows(24), tmp_path / "a", max_steps=2)
    rows = concatenate_datasets([first.train_dataset, first.train_dataset])
    train_on(rows, tmp_path / "b", max_steps=12, shuffle_dataset=True)
    assert sorted(MistakeLedger.load(tmp_path / "b").rows().row) == list(range(48))


def test_rows_that_the_user_packed(tmp_path):
    """Two documents in each row: positions are the row's, so that a token is found again, and met once in an epoch."""
    rows = {name: [] for name in ("input_ids", "labels", "seq_lengths")}
    for i in range(8):
        documents = [[5 + i, 6, 7 + i], [8 + i, 9, 10, 11 + i]]
        for name, value in zip(rows, ([*documents[0], *documents[1]],) * 2 + ([3, 4],), strict=True):
            rows[name].append(value)
    rows = Dataset.from_dict(rows)
    train_on(rows, tmp_path, max_steps=2, padding_free=True, max_length=None)
    ledger = MistakeLedger.load(tmp_path)
    assert ledger.rows().visits.tolist() == [1] * 8
    RowTokens(ledger, rows, tiny_tokenizer())


def test_other_rows_than_the_trainer_was_made_with_have_no_ledger(tmp_path, caplog):
    arguments = CopilotSFTConfig(output_dir=str(tmp_path), **(QUIET | {"max_steps": 2}))
    trainer = CopilotTrainer(
        tiny_pilot(), arguments, train_dataset=different_rows(8), processing_class=tiny_tokenizer()
    )
    trainer.train_dataset = without_row_ids(trainer.train_dataset)
    trainer.train()
    assert not (tmp_path / LEDGER_FOLDER).exists() and "was replaced" in caplog.text


class OwnStep(CopilotTrainer):
    seen = ()

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As some subclasses of Trainer have it, without super()."""
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.seen = set(inputs)
        return loss


def test_a_training_step_of_ones_own(tmp_path):
    arguments = CopilotSFTConfig(output_dir=str(tmp_path), **(QUIET | {"max_steps": 2}))
    trainer = OwnStep(tiny_pilot(), arguments, train_dataset=different_rows(8), processing_class=tiny_tokenizer())
    trainer.train()
    assert "row_ids" not in trainer.seen and (MistakeLedger.load(tmp_path).rows().row >= 0).all()


def test_evaluation_and_generation_leave_no_trace(tmp_path):
    trainer = train_on(different_rows(24), tmp_path, max_steps=4)
    before = files(tmp_path)
    trainer.evaluate(trainer.train_dataset)
    trainer.predict(trainer.train_dataset)
    assert files(tmp_path) == before


# ---- in a loop of one's own -----------------------------------------------------------------------------------------


def loop(folder, rounds, row_ids=None, step=0) -> CopilotLearner:
    pilot = tiny_pilot().eval()
    writer = LedgerWriter(folder / LEDGER_FOLDER, step) if folder is not None else None
    learner = CopilotLearner(trained_like(pilot), pilot, num_training_steps=100, steps_per_round=1, ledger=writer)
    batch = padded()
    for _ in range(rounds):
        with learner.observe(batch if row_ids is None else batch | {"row_ids": row_ids}):
            pilot(**{name: tensor for name, tensor in batch.items() if name != "labels"}, use_cache=False)
        learner.step()
    return learner


@pytest.mark.parametrize("ids", [[7, 2, 9], np.array([7, 2, 9]), torch.tensor([7, 2, 9])], ids=["list", "np", "torch"])
def test_a_plain_loop_passes_row_ids(tmp_path, ids):
    loop(tmp_path, 2, ids).close()
    ledger = MistakeLedger.load(tmp_path)
    assert (
        ledger.documents["row"].tolist() == [7, 2, 9, 7, 2, 9]
        and ledger.documents["step"].tolist() == [1] * 3 + [2] * 3
    )
    assert ledger.visit.tolist() == [0, 0, 0, 1, 1, 1] and ledger.num_rows is None


@pytest.mark.parametrize("ids", [[7, 2], [[7, 2, 9]]], ids=["fewer", "another_shape"])
def test_ids_that_do_not_fit_the_batch_name_no_rows(tmp_path, ids):
    loop(tmp_path, 1, ids).close()
    assert MistakeLedger.load(tmp_path).documents["row"].tolist() == [-1, -1, -1]


def test_a_plain_loop_writes_none_unless_asked(tmp_path):
    assert loop(None, 1).ledger is None


def test_a_ledger_without_row_ids_raises_where_they_are_needed(tmp_path):
    loop(tmp_path, 1).close()
    ledger = MistakeLedger.load(tmp_path)
    assert len(ledger.to_dataset()) == len(ledger.tokens) and set(ledger.to_dataset()["row"]) == {-1}
    with pytest.raises(ValueError, match="No token of this ledger has a row id"):
        ledger.rows()


def test_blocks_are_written_once_in_many_rounds(tmp_path):
    """Until then nothing is copied from the device: `observe` adds no synchronisation."""
    learner = loop(tmp_path, ROUNDS_HELD - 1, [0, 1, 2])
    assert not len(read_written(tmp_path / LEDGER_FOLDER, 0).documents)
    assert len(learner.ledger.rounds) == ROUNDS_HELD - 1
    learner.ledger.end_round()
    assert len(read_written(tmp_path / LEDGER_FOLDER, 0).documents) == 3 * (ROUNDS_HELD - 1)


def test_a_ledger_that_cant_be_written_ends_no_run(tmp_path, caplog):
    """What is whole of it stays; nothing is appended behind a gap."""
    learner = loop(tmp_path, 1, [0, 1, 2])
    learner.ledger.flush()
    documents = tmp_path / LEDGER_FOLDER / "documents-0.bin"
    documents.rename(tmp_path / "kept")
    documents.mkdir()  # no file to append to
    for _ in range(2):
        with learner.observe(padded() | {"row_ids": [0, 1, 2]}):
            learner.head.pilot(padded()["input_ids"], attention_mask=padded()["attention_mask"])
        learner.step()
        learner.ledger.flush()
    learner.close()
    assert caplog.text.count("nothing goes into the ledger") == 1
    documents.rmdir()
    (tmp_path / "kept").rename(documents)
    assert len(MistakeLedger.load(tmp_path).documents) == 3


def test_a_round_that_was_not_finished_is_not_written(tmp_path):
    learner = loop(tmp_path, 1, [0, 1, 2])
    with learner.observe(padded()):
        learner.head.pilot(padded()["input_ids"])
    learner.close()
    assert len(MistakeLedger.load(tmp_path).documents) == 3


def test_a_document_that_is_not_finite_is_left_out(tmp_path):
    learner = loop(tmp_path, 1, [0, 1, 2])
    pilot = learner.head.pilot
    with torch.no_grad():
        pilot.get_input_embeddings().weight[padded()["input_ids"][1, 0]] = float("nan")
    loop_batch = padded() | {"row_ids": [3, 4, 5]}
    with learner.observe(loop_batch):
        pilot(padded()["input_ids"], attention_mask=padded()["attention_mask"])
    learner.ledger.end_round()
    learner.close()
    ledger = MistakeLedger.load(tmp_path)
    rows = ledger.documents["row"].tolist()
    assert np.isfinite(ledger.tokens["p"]).all() and not read_written(tmp_path / LEDGER_FOLDER, 0).is_torn
    assert rows[:3] == [0, 1, 2] and 4 not in rows and len(rows) < 6


def test_two_processes_are_one_ledger(tmp_path):
    """Each has files of its own, and steps are what orders them."""
    loop(tmp_path, 2, [0, 1, 2]).close()
    folder = tmp_path / LEDGER_FOLDER
    for name in (documents_file, tokens_file):
        shutil.copy(name(folder, 0), name(folder, 1))
    documents = np.memmap(documents_file(folder, 1), read_written(folder, 1).documents.dtype, "r+")
    documents["row"] += 10
    documents.flush()
    ledger = MistakeLedger.load(tmp_path)
    assert ledger.documents["row"].tolist() == [0, 1, 2, 10, 11, 12] * 2
    alone = ledger.of_row(1)[1][1]
    assert np.array_equal(alone, ledger.of_row(11)[1][1]) and len(alone)


# ---- statistics -----------------------------------------------------------------------------------------------------


def made_by_hand() -> MistakeLedger:
    """Row 4: right, wrong, right, wrong. Row 9: wrong, and then right in two parts."""
    visits = {4: [[0.9, 0.8], [0.9, 0.2], [0.7, 0.7], [0.1, 0.1]], 9: [[0.2, 0.2]]}
    documents, tokens, step = [], [], 0
    for row, readings in visits.items():
        for ps in readings:
            step += 1
            documents.append((step, row, len(ps), 0))
            tokens += [(5 + i, p, -1 if p > 0.5 else 30) for i, p in enumerate(ps)]
    for position, p in ((5, 0.6), (6, 0.8)):  # split by packing: positions 5 and 6 in two documents
        step += 1
        documents.append((step, 11, 1, 0))
        tokens.append((position, p, -1))
    return MistakeLedger(np.array(documents, DOCUMENT), np.array(tokens, TOKEN), 20, False)


def test_statistics_of_rows():
    rows = made_by_hand().rows()
    assert rows.row.tolist() == [4, 9, 11] and rows.visits.tolist() == [4, 1, 1]
    assert rows.mean_p == pytest.approx([np.mean([0.85, 0.55, 0.7, 0.1]), 0.2, 0.7])
    assert rows.spread_p == pytest.approx([np.std([0.85, 0.55, 0.7, 0.1]), 0.0, 0.0], abs=1e-6)
    assert rows.first_p == pytest.approx([0.85, 0.2, 0.7]) and rows.last_p == pytest.approx([0.1, 0.2, 0.7])
    assert rows.last_loss == pytest.approx([-np.log(0.1), -np.log(0.2), -np.log([0.6, 0.8]).mean()])
    assert rows.learnt.tolist() == [True, False, True] and rows.forgotten.tolist() == [2, 0, 0]


def test_confusions_count_over_the_run():
    rows = [{"input_ids": [1, 2, 3, 4, 5, 6, 7]}] * 20
    ledger = made_by_hand()
    ledger.documents["check"] = [0] * len(ledger.documents)
    text = RowTokens.__new__(RowTokens)
    text.ledger, text.rows, text.parts = ledger, rows, [np.array(row["input_ids"]) for row in rows]
    text.flat, text.starts = np.concatenate(text.parts), np.arange(20) * 7
    assert [tuple(c) for c in text.confusions()] == [(7, 30, 3), (6, 30, 2)]


def test_other_data_than_the_runs_raises(tmp_path):
    train_on(different_rows(24), tmp_path, max_steps=12)
    ledger, of = MistakeLedger.load(tmp_path), partial(RowTokens, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="has 12 rows and the run's had 24"):
        of(ledger, different_rows(12))
    with pytest.raises(ValueError, match="can't be tokenised"):
        of(ledger, Dataset.from_dict({"question": ["?"] * 24}))
    with pytest.raises(ValueError, match="holds other tokens"):
        of(ledger, addition(24))


# ---- privacy --------------------------------------------------------------------------------------------------------


def test_no_text_of_the_data_is_in_the_ledger(tmp_path):
    """Of a token that was right it says so, and not which it was."""
    train_on(different_rows(24), tmp_path, max_steps=60)
    ledger = MistakeLedger.load(tmp_path)
    text = RowTokens(ledger, different_rows(24), tiny_tokenizer())
    for row in range(24):
        for _, tokens in ledger.of_row(row):
            labels = text.parts[row][tokens["position"]]
            assert not (tokens["said"] == labels).any()
    assert (ledger.tokens["said"] == -1).any()


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_a_push_has_no_file_of_the_ledger(tmp_path, monkeypatch, strategy):
    pushed = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **kwargs):
            names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
            pushed.extend(filter_repo_objects(names, ignore_patterns=kwargs.get("ignore_patterns")))
            return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    hub = {"push_to_hub": True, "hub_model_id": "me/m", "hub_strategy": strategy, "save_strategy": "steps"}
    trainer = train_on(addition(16), tmp_path, max_steps=4, save_steps=2, **hub)
    trainer.push_to_hub()
    assert len(MistakeLedger.load(tmp_path).documents) and "README.md" in pushed
    assert not [name for name in pushed if "ledger" in name or "documents-" in name or "tokens-" in name]
    assert "The ledger of its mistakes is not in this repository" in (tmp_path / "README.md").read_text()

"""Chats: trained on as `trl sft` does, measured at their last answer, and one sentence for a file that is none."""

from __future__ import annotations

import json

import pytest
import trl.trainer.sft_trainer
from datasets import Dataset
from test_cli import ON_CPU, run
from tiny import CHAT_TEMPLATE, QUIET, addition, assert_same, tiny_pilot, tiny_seq2seq, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_copilot import CopilotModel
from hf_copilot.cli.recipe import RecipeArguments, ScriptArguments, prepare_rows
from hf_copilot.evaluation.rows import label_row, prompt_of, to_answer
from hf_copilot.training.chats import is_chat, row_tokens

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3}
SMALL = ["--copilot_config", '{"num_hidden_layers": 2}', "--generate_rows", 4, "--max_new_tokens", 4]
QUIETLY = ["--report_to", "none", "--save_strategy", "no", *ON_CPU]


def user(text: str | None) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | None) -> dict:
    return {"role": "assistant", "content": text}


def chat_rows(form: str, count: int = 30) -> list[dict]:
    """Two sums in a chat; the columns `id` and, beside `messages`, a text `prompt` are not to be read."""
    sums, rows = list(addition(2 * count)), []
    for i, (first, second) in enumerate(zip(sums[:count], sums[count:], strict=True)):
        before = [user(first["prompt"]), assistant(first["completion"]), user(second["prompt"])]
        answer = [assistant(second["completion"])]
        parts = {"messages": before + answer, "prompt": "no"} if form == "messages" else None
        rows.append({"id": i} | (parts or {"prompt": before, "completion": answer}))
    return rows


def write(file, rows: list[dict]):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def save_pilot(folder, template: str | None = CHAT_TEMPLATE):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    tiny_pilot().save_pretrained(folder)
    return folder


def given(settings: dict) -> list:
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def test_a_row_of_two_forms_is_the_one_that_trl_trains_on(tmp_path):
    """A prompt and a completion go before messages; a text has an end."""
    (pair,), tokenizer = addition(1), tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    rows = [pair | {"messages": [user("7+1="), assistant("8")]}, {"text": "7+1=8"}]
    for row in rows:
        trainer = SFTTrainer(
            tiny_pilot(),
            SFTConfig(str(tmp_path), **QUIET),
            train_dataset=Dataset.from_list([row] * 2),
            processing_class=tokenizer,
        )
        theirs = trainer.train_dataset[0]["input_ids"]  # of the first the end depends on the order of a set in TRL
        assert theirs in (row_tokens(tokenizer, row), row_tokens(tokenizer, row)[: -1 if "prompt" in row else None])
    assert not is_chat(rows[0]) and to_answer(rows[0]) == rows[0]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        row_tokens(tokenizer, rows[1])


@pytest.mark.parametrize(
    ("form", "more"),
    [("messages", {}), ("messages", {"assistant_only_loss": True}), ("prompt-completion", {})],
    ids=["messages", "assistant-only", "prompt-completion"],
)
def test_a_chat_trains_the_pilot_that_trl_trains(tmp_path, form, more):
    file, pilot = write(tmp_path / "chats.jsonl", chat_rows(form)), save_pilot(tmp_path / "pilot")
    named = ["--model_name_or_path", pilot, "--dataset_name", file, "--output_dir", tmp_path / "out"]
    assert run("sft", *named, *given(TRAINING | more), *SMALL, *QUIETLY) == 0
    script = ScriptArguments(dataset_name=str(file))
    rows = prepare_rows(script, RecipeArguments(), TRAINING["seed"]).train
    columns = {"messages"} if form == "messages" else {"prompt", "completion"}
    assert {*rows.column_names} == columns and len(rows) == 25
    trainer = SFTTrainer(
        str(pilot), SFTConfig(output_dir=str(tmp_path / "plain"), **(QUIET | TRAINING | more)), train_dataset=rows
    )
    trainer.train()
    assert_same(trainer.model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("form", ["messages", "prompt-completion"])
def test_from_a_file_of_chats_to_the_page_of_mistakes(tmp_path, form, capsys):
    file, pilot = write(tmp_path / "chats.jsonl", chat_rows(form)), save_pilot(tmp_path / "pilot")
    out = tmp_path / "out"
    named = ["--model_name_or_path", pilot, "--dataset_name", file, "--output_dir", out, "--disable_tqdm", "false"]
    steps = given(TRAINING | {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 14})
    assert run("sft", *named, *steps, *SMALL, *QUIETLY) == 0
    said = capsys.readouterr().out
    assert "Answers at step 2" in said and "3 test rows" in said
    last = prepare_rows(ScriptArguments(dataset_name=str(file)), RecipeArguments(), 3).validation[0]
    expected = " ".join(to_answer(last)["completion"][0]["content"])  # as the tokenizer's decoder gives it
    assert expected in said.partition("Answers at step 2")[2].partition("}")[0]
    assert run("eval", out, "--data", file, "--limit", 6, "--max_new_tokens", 4, "--output_file", tmp_path / "e") == 0
    (found,) = json.loads((tmp_path / "e").read_text())["results"].values()
    assert [entry["metric"] for entry in found][2] == "right answers (6 rows)"
    assert run("calibrate", out, "--data", file, "--strengths", "0.5") == 0
    calibration = CopilotModel.from_pretrained(out / "copilot").config.calibration
    labels = [label_row(tiny_tokenizer(), to_answer(row), has_encoder=False)["labels"] for row in chat_rows(form)]
    assert calibration["targets"] == sum(label != -100 for row in labels for label in row)
    assert run("mistakes", out, "--rectify") == 0, capsys.readouterr().err
    assert run("mistakes", out, "--data", write(tmp_path / "other.jsonl", chat_rows(form, 25))) == 1
    assert "holds other tokens" in capsys.readouterr().err


def test_the_last_answer_is_what_is_labelled_and_asked_for():
    tokenizer, row = tiny_tokenizer(), chat_rows("messages", 1)[0] | {"tools": None}
    chat, answer = row["messages"], row["messages"][3]["content"]
    found = to_answer(row | {"messages": [*chat, user("thanks")]})  # what comes behind it is left out
    labelled = label_row(tokenizer, found, has_encoder=False)
    assert tokenizer.decode([i for i in labelled["labels"] if i != -100]).replace(" ", "") == f"{answer}<eos>"
    assert labelled["input_ids"] == tokenizer.apply_chat_template(chat)["input_ids"]
    assert (
        prompt_of(tokenizer, found) == tokenizer.apply_chat_template(chat[:3], add_generation_prompt=True)["input_ids"]
    )


def test_the_page_reads_the_template_that_training_read(tmp_path, monkeypatch):
    """With assistant_only_loss SFTTrainer takes a template of its own where the tokenizer's has no markers."""
    plain = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    other = CHAT_TEMPLATE.replace("<user>", "<user> ")
    monkeypatch.setattr(trl.trainer.sft_trainer, "get_training_chat_template", lambda tokenizer: other)
    file, pilot = write(tmp_path / "chats.jsonl", chat_rows("messages")), save_pilot(tmp_path / "pilot", plain)
    named = ["--model_name_or_path", pilot, "--dataset_name", file, "--output_dir", tmp_path / "out"]
    assert run("sft", *named, *given(TRAINING), "--assistant_only_loss", "true", *SMALL, *QUIETLY) == 0
    assert run("mistakes", tmp_path / "out", "--rectify") == 0


CHAT = {"messages": [user("1+1="), assistant("2")]}
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHAT_TEMPLATE
WRONG = {
    "another form": ([CHAT, {"prompt": "1"}], "of the data has no field"),
    "both forms": ([CHAT, {"prompt": "1", "completion": "2"}], "of the data has no field"),
    "texts and chats": (
        [{"prompt": [user("1")], "completion": [assistant("2")]}, {"prompt": "1", "completion": "2"}],
        "Row 2 of the data has in 'prompt' no list of messages",
    ),
    "no completion": ([{"prompt": [user("1")]}] * 2, "Row 1 of the data has no field 'completion'"),
    "no messages": ([CHAT, {"messages": []}], "Row 2 of the data has in 'messages' no list of messages"),
    "no mappings": ([{"messages": ["1", "2"]}] * 2, "each with a role and a content"),
    "a text": ([{"messages": "1"}] * 2, "no list of messages"),
    "a role alone": ([CHAT, {"messages": [user("1"), {"role": "assistant"}]}], "Row 2 of the data has in 'messages'"),
    "no answer": ([CHAT, {"messages": [user("1")]}], "Row 2 of the data has no assistant message in 'messages'"),
    "no question": ([CHAT, {"messages": [assistant("1")]}], "After a question there is to be an assistant message"),
    "what a template refuses": ([{"messages": [user("1") | {"role": "system"}, *CHAT["messages"]]}] * 2, "no system"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_chats_is_said_in_a_sentence(tmp_path, capsys, wrong):
    rows, says = WRONG[wrong]
    file, pilot = write(tmp_path / "chats.jsonl", rows), save_pilot(tmp_path / "pilot", REFUSING)
    assert run("sft", "--model_name_or_path", pilot, "--dataset_name", file, "--output_dir", tmp_path, *QUIETLY) == 1
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and said.count("hf-copilot sft:") == 1


def test_a_tokenizer_or_a_pilot_that_takes_no_chats(tmp_path, capsys):
    file, pilot = write(tmp_path / "chats.jsonl", chat_rows("messages", 4)), save_pilot(tmp_path / "pilot", None)
    tiny_seq2seq().save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    common = ["--dataset_name", file, "--output_dir", tmp_path / "out", *QUIETLY]
    scratch = ["--from_config", '{"model_type": "llama"}']
    for command, model, says in (
        ("sft", ["--model_name_or_path", pilot], "the tokenizer has no chat template"),
        ("sft", scratch, "a Pilot from scratch has no chat template"),
        ("seq2seq", ["--model_name_or_path", tmp_path / "t5"], "which encoder-decoders are not given here"),
    ):
        assert run(command, *model, *common) == 1
        assert says in capsys.readouterr().err
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    named = ["--model_name_or_path", pilot, "--chat_template_path", tmp_path / "chat.jinja"]
    assert run("sft", *named, *common, *given(TRAINING), *SMALL) == 0
    assert run("eval", tmp_path / "out", "--data", file, "--generate_rows", 0) == 0
    (tmp_path / "out" / "chat_template.jinja").unlink()
    assert run("eval", tmp_path / "out", "--data", file) == 1
    assert "the tokenizer has no chat template" in capsys.readouterr().err


def test_format_strings_go_before_messages(tmp_path):
    """Rows that hold messages too, where --prompt says what is read."""
    rows = [{"question": "1", "answer": "2"} | CHAT] * 4
    script = ScriptArguments(dataset_name=str(write(tmp_path / "rows.jsonl", rows)))
    train = prepare_rows(script, RecipeArguments(prompt="{question}", completion="{answer}"), 0).train
    assert isinstance(train, Dataset) and train[0] == {"prompt": "1", "completion": "2"}


def test_a_prompt_and_a_completion_go_before_messages(tmp_path):
    """As in TRL."""
    rows = [{"prompt": "1", "completion": "2"} | CHAT] * 4
    script = ScriptArguments(dataset_name=str(write(tmp_path / "rows.jsonl", rows)))
    assert prepare_rows(script, RecipeArguments(), 0).train[0] == {"prompt": "1", "completion": "2"}

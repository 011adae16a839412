"""`hf-copilot`: from a file of rows to answers, and one sentence for everything that is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import HfApi, parse_eval_result_entries
from peft import LoraConfig, get_peft_model
from test_distributed import in_two_processes
from tiny import addition, tiny_pilot, tiny_seq2seq, tiny_tokenizer, trained_like
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging

from hf_copilot import CopilotModel, CopilotTrainer
from hf_copilot.cli.__main__ import COMMANDS, main, usage
from hf_copilot.cli.card import choose_figure
from hf_copilot.cli.data import load_rows, read_answers, read_file
from hf_copilot.cli.pair import PairArguments, load_copilot, load_pilot
from hf_copilot.cli.parser import WIDTH
from hf_copilot.cli.scratch import is_unread, train_tokenizer
from hf_copilot.ledger.page import read_rows
from hf_copilot.pilot.copilot_for import copilot_for

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 64}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
FORM = ["--prompt", "{question}", "--completion", "{answer}"]
SHORT = {"tokenizer_size": 300, "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False}
SHORT |= {"report_to": "none", "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "max_new_tokens": 4}
SHORT |= {"disable_tqdm": False}
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]


def run(*argv) -> int:
    try:
        return main([str(argument) for argument in argv])
    except SystemExit as end:
        return end.code or 0


def write_rows(file, count: int, seed: int = 0):
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in addition(count, seed)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", 60)


@pytest.fixture
def out(tmp_path):
    """A run's folder, with a Copilot that changes the text."""
    pilot, tokenizer = tiny_pilot(), tiny_tokenizer()
    pilot.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    copilot = trained_like(pilot)
    copilot.config.tokenizer_fingerprint = copilot_for(pilot, None, tokenizer).config.tokenizer_fingerprint
    copilot.save_pretrained(tmp_path / "out" / "copilot")
    return tmp_path / "out"


# ---- training -------------------------------------------------------------------------------------------------------


def write_config(file, config: dict, **changes):
    file.write_text(yaml.safe_dump(SHORT | {"from_config": config} | changes))
    return file


@pytest.mark.parametrize(("command", "config"), [("sft", LLAMA), ("seq2seq", T5)])
def test_from_a_file_to_answers_by_one_command(tmp_path, rows, capsys, command, config):
    settings = write_config(tmp_path / "tiny.yaml", config, copilot_config={"num_hidden_layers": 2})
    folder = tmp_path / "run"
    assert run(command, "--config", settings, "--dataset_name", rows, "--output_dir", folder, *FORM) == 0
    said = capsys.readouterr().out
    assert "Answers at step 2" in said and "6 test rows" in said and "right answers" in said
    assert run("eval", folder, "--data", rows, "--limit", 4, "--max_new_tokens", 4, *FORM) == 0
    assert "4 rows of rows.jsonl, λ = " in capsys.readouterr().out
    assert run("check", folder) == 0


@pytest.mark.parametrize(("command", "config"), [("sft", LLAMA), ("seq2seq", T5)])
def test_a_page_of_mistakes_finds_its_rows_by_itself(tmp_path, rows, capsys, command, config):
    settings = write_config(tmp_path / "tiny.yaml", config, generate_rows=0, watch_rows=0, max_steps=14)
    folder = tmp_path / "run"
    assert run(command, "--config", settings, "--dataset_name", rows, "--output_dir", folder, *FORM) == 0
    assert run("mistakes", folder, "--rectify", "--output", tmp_path / "page.html") == 0, capsys.readouterr().err
    page = (tmp_path / "page.html").read_text()
    assert '"confusions":null' not in page and "labelled tokens in these rows" in page
    write_rows(rows, 60, seed=1)
    assert run("mistakes", folder) == 1
    assert "holds other tokens" in capsys.readouterr().err


def test_adapters_of_a_run_are_found(tmp_path, out, rows, monkeypatch):
    """The Pilot's folder holds an adapter alone; the Copilot's is merged."""
    trainers, train = [], CopilotTrainer.train
    monkeypatch.setattr(CopilotTrainer, "train", lambda self, **given: trainers.append(self) or train(self, **given))
    settings = {"--model_name_or_path": out, "--dataset_name": rows, "--output_dir": tmp_path / "lora"}
    given = [part for pair in settings.items() for part in pair]
    short = [part for name, value in SHORT.items() for part in (f"--{name}", str(value).lower())]
    assert run("sft", *given, *short, "--use_peft", "--copilot_lora_r", 2, "--generate_rows", 0, *FORM) == 0
    assert trainers[0].learner.peft_model.peft_config["default"].r == 2
    assert (tmp_path / "lora" / "adapter_config.json").is_file()
    assert run("eval", tmp_path / "lora", "--data", rows, "--generate_rows", 0, *FORM) == 0
    assert run("check", tmp_path / "lora") == 0


@pytest.mark.slow
def test_accelerate_launches_it_on_two_processes(tmp_path, rows):
    settings = write_config(tmp_path / "tiny.yaml", LLAMA)
    given = ["--config", settings, "--dataset_name", rows, "--output_dir", tmp_path / "run", *FORM]
    done = in_two_processes("accelerate", "-m", "hf_copilot.cli", "sft", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'epoch': '0.5714'" in done.stdout  # 4 of the 7 steps that two times 4 of 49 rows take
    assert done.stdout.count("right answers") == 1 and (tmp_path / "run" / "copilot" / "config.json").is_file()


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_eval_writes_what_it_shows(tmp_path, out, rows, capsys):
    file = tmp_path / "eval.json"
    given = ["--data", rows, "--strength", "0.5", "--max_new_tokens", 4, "--output_file", file, *FORM]
    assert run("eval", out, out / "copilot", *given) == 0
    figures = json.loads(file.read_text())
    (found,) = figures["results"].values()
    nll = next(entry for entry in found if entry["metric"].startswith("NLL"))
    assert f"{nll['pilot']:.4f}" in capsys.readouterr().out and figures["strength"] == 0.5
    assert nll["interval"][0] < nll["rectified"] - nll["pilot"] < nll["interval"][1]


def test_eval_answers_so_many_rows_together(out, rows, monkeypatch):
    seen, generate = [], LlamaForCausalLM.generate

    def counted(self, **given):
        seen.append(len(given["input_ids"]))
        return generate(self, **given)

    monkeypatch.setattr(LlamaForCausalLM, "generate", counted)
    assert run("eval", out, "--data", rows, *FORM, "--max_new_tokens", 1, "--batch_size", 25) == 0
    assert seen == [25, 25, 10] * 2


@pytest.mark.parametrize(
    ("given", "revision"),
    [({}, "v1"), ({"copilot_revision": "v2"}, "v2"), ({"copilot": "me/other"}, "main")],
    ids=["beside the Pilot", "its own", "elsewhere"],
)
def test_a_copilot_is_of_its_pilots_revision_where_it_lies_beside_it(monkeypatch, given, revision):
    asked = []
    monkeypatch.setattr(CopilotModel, "from_pretrained", lambda name, **where: asked.append((name, where)))
    load_copilot(PairArguments("me/run", pilot_revision="v1", **given))
    assert asked == [
        (given.get("copilot", "me/run"), {"revision": revision, "subfolder": "" if "copilot" in given else "copilot"})
    ]


def test_an_adapters_revision_is_not_its_bases(monkeypatch, tmp_path, out):
    """The base is the newest, as the adapter's config names it."""
    asked, from_pretrained = {}, AutoModelForCausalLM.from_pretrained
    get_peft_model(tiny_pilot(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(out)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda name, **given: asked.update(given) or from_pretrained(name, **given),
    )
    pilot = load_pilot(PairArguments(str(tmp_path / "adapter"), pilot_revision="v1"))
    assert asked["adapter_kwargs"] == {"revision": "v1"} and "revision" not in asked
    assert any("lora" in name for name, _ in pilot.named_parameters())


def test_eval_on_tasks(tmp_path, out, capsys):
    pytest.importorskip("lm_eval")
    from test_lm_eval import write_tasks

    write_tasks(tmp_path)
    tasks = [
        "--tasks",
        "sums_choice,sums_rolling",
        "--include_path",
        tmp_path,
        "--output_file",
        tmp_path / "eval.json",
    ]
    assert run("eval", out, *tasks) == 0
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    choice, rolling = results["sums_choice, λ = 1"], results["sums_rolling, λ = 1"]
    assert [entry["metric"] for entry in choice] == ["acc", "acc_norm"]
    assert rolling[0]["metric"] == "word_perplexity" and rolling[0]["pilot"] != rolling[0]["rectified"]
    assert run("eval", out, "--tasks", "no_such_task") == 1
    assert "no task no_such_task" in capsys.readouterr().err


def test_calibrate_writes_into_the_copilot(tmp_path, out, rows, capsys):
    before = CopilotModel.from_pretrained(out / "copilot")
    assert run("calibrate", out, "--data", rows, "--strengths", "0.1", "0.5", *FORM) == 0
    copilot = CopilotModel.from_pretrained(out / "copilot")
    assert copilot.config.calibration["strengths"] == [0.0, 0.1, 0.5]
    assert copilot.config.strength == copilot.config.calibration["strength"]
    assert f"λ = {copilot.config.strength:g} had the least NLL" in (out / "copilot" / "README.md").read_text()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), copilot.parameters(), strict=True))
    assert "is written into" in capsys.readouterr().out
    assert run("calibrate", out, "--data", rows, "--output_dir", tmp_path / "other", *FORM) == 0
    assert (tmp_path / "other" / "model.safetensors").is_file()


FOLD = ("--use_cpu", "--max_steps", "40", "--learning_rate", "0.01", "--report_to", "none", "--save_strategy", "no")


@pytest.mark.parametrize("adapter", [False, True])
def test_fold_leaves_a_pilot_that_needs_no_copilot(tmp_path, out, rows, capsys, adapter):
    pilot, files = out, ("--data", rows, "--held_out", rows, "--output_dir", tmp_path / "folded")
    if adapter:
        pilot = tmp_path / "adapted"
        get_peft_model(AutoModelForCausalLM.from_pretrained(out), LoraConfig(r=8)).save_pretrained(pilot)
        tiny_tokenizer().save_pretrained(pilot)
    assert run("fold", pilot, out / "copilot", *files, *FORM, *FOLD) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "It needs no Copilot" in text
    nll = re.search(r"60 held-out rows: Pilot ([\d.]+), Pilot \+ Copilot ([\d.]+), folded Pilot ([\d.]+):", text)
    before, rectified, after = map(float, nll.groups())
    assert abs(after - rectified) < 0.9 * abs(before - rectified)
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    before = AutoModelForCausalLM.from_pretrained(pilot)
    assert any(not torch.equal(a, b) for a, b in zip(folded.parameters(), before.parameters(), strict=True))
    assert (tmp_path / "folded" / "adapter_config.json").is_file() == adapter


# ---- check, card ----------------------------------------------------------------------------------------------------


def test_check(tmp_path, out, capsys):
    assert run("check", out, out / "copilot") == 0
    assert "LlamaForCausalLM with 47 tokens: the token Copilot fits, λ = 1." in capsys.readouterr().out
    other = tiny_tokenizer()
    other.add_tokens(["<more>"])
    tiny_pilot(vocab_size=64).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    assert run("check", tmp_path / "other", out / "copilot") == 0  # more rows, the same tokens
    assert "But for generation alone" in capsys.readouterr().out
    tiny_seq2seq().save_pretrained(tmp_path / "other")
    assert run("check", tmp_path / "other", out / "copilot") == 1
    assert "hf-copilot check: The Pilot is an encoder-decoder" in capsys.readouterr().err


def test_card_and_push(tmp_path, out, rows, capsys, monkeypatch):
    """To a made-up Hub: picture, results of both, and the snippet with the repository's name, in one commit."""
    pushed = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: type("Repo", (), {"repo_id": name}))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: pushed.append(kwargs) or "url")
    assert run("eval", out, "--data", rows, "--max_new_tokens", 2, "--output_file", tmp_path / "e.json", *FORM) == 0
    (tmp_path / "curve.png").write_bytes(b"picture")
    results = ["--results", tmp_path / "e.json", "--dataset_id", "me/sums", "--task_id", "sums"]
    given = ["--picture", tmp_path / "curve.png", "--push_to_hub", "me/copilot", *results]
    assert run("card", out / "copilot", *given) == 0
    folder = out / "copilot"
    card = (folder / "README.md").read_text()
    assert "![Pilot and Pilot + Copilot](assets/curve.png)" in card and 'from_pretrained("me/copilot")' in card
    assert (folder / "assets" / "curve.png").read_bytes() == b"picture"
    files = sorted((folder / ".eval_results").glob("*.yaml"))
    assert [file.name for file in files] == ["sums-copilot.yaml", "sums-pilot.yaml"]
    entries = [parse_eval_result_entries(yaml.safe_load(file.read_text()))[0] for file in files]
    assert entries[1].notes == "Pilot alone, NLL (nats per token)" and entries[0].dataset_id == "me/sums"
    assert entries[0].notes.startswith("Pilot + Copilot, strength 1") and entries[0].value != entries[1].value
    assert len(pushed) == 1 and pushed[0]["repo_id"] == "me/copilot"
    (tmp_path / "later.png").write_bytes(b"another")
    assert run("card", folder, "--picture", tmp_path / "later.png") == 0
    assert "(assets/later.png)" in (folder / "README.md").read_text()
    assert run("card", folder, "--picture", folder / "assets" / "later.png") == 0  # where it is already
    assert run("card", folder, *results[:-1], "sums/all") == 0
    assert (folder / ".eval_results" / "sums-all-pilot.yaml").is_file()
    assert run("card", folder, "--results", tmp_path / "e.json") == 1
    assert "--dataset_id" in capsys.readouterr().err


# ---- help and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_a_page(command, capsys):
    assert run(command, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: hf-copilot {command}") and len(lines) < 140
    assert max(map(len, lines)) <= WIDTH + 5


def test_all_arguments_are_shown_on_request(capsys):
    assert run("sft", "--help_all") == 0
    assert "--adam_beta1" in capsys.readouterr().out


def test_the_help_of_what_is_otherwise_here(capsys):
    """Of arguments that do something else than in TRL's scripts."""
    assert run("sft", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "answered after training" in said and "takes the newest" in said
    assert "is provided" not in said and "Not directly used" not in said


def test_commands_are_listed(capsys):
    assert run() == run("--help") == run("--version") == 0
    said = capsys.readouterr().out
    assert all(f"  {command} " in said for command in COMMANDS)
    assert usage() in (Path(__file__).parent.parent / "docs" / "command_line.md").read_text(encoding="utf-8")
    assert run("evaluate") == 2
    assert "no command 'evaluate'" in capsys.readouterr().err


def test_a_field_that_a_config_reads_without_keeping_it_is_taken():
    """Gemma 3 makes its layers' types of it."""
    given = {"model_type": "gemma3_text", "sliding_window_pattern": 2, "sliding_window_pat": 2}
    unread = [name for name in given if is_unread(name, AutoConfig.for_model(**given), given)]
    assert unread == ["sliding_window_pat"]


def bad_files(folder) -> dict[str, tuple[list, int, str]]:
    """By name: a command line in a folder with `out` and `rows.jsonl`, its exit code, and what it says."""
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "broken.jsonl").write_text('{"question": "1", "answer": "2"}\n{"question": \n')
    (folder / "list.jsonl").write_text('{"question": "1", "answer": "2"}\n[1]\n')
    (folder / "missing.jsonl").write_text('{"question": "1", "answer": "2"}\n{"question": "3"}\n')
    (folder / "binary.jsonl").write_bytes(bytes(range(256)))
    (folder / "pretty.json").write_text('{\n "question": "1",\n "answer": "2"\n}\n{\n "question": "3"\n}\n')
    (folder / "table.csv").write_text("question,answer\n1,2\n")
    Dataset.from_dict({"question": ["1"], "answer": ["2"]}).to_parquet(folder / "table.parquet")
    (folder / "shared.jsonl").write_text('{"conversations": [{"from": "human", "value": "1"}]}\n')
    (folder / "no.yaml").write_text("a: [1\n")
    (folder / "unknown.yaml").write_text("no_such_argument: 1\n")
    (folder / "preset.yaml").write_text("copilot_preset: papr\n")
    (folder / "metric.yaml").write_text("metric: accuracy\n")
    (folder / "strength.yaml").write_text("copilot_strength: 0.5\n")
    tiny_pilot(vocab_size=300).save_pretrained(folder / "other")
    train_tokenizer(["another vocabulary"], 300).save_pretrained(folder / "other")
    (folder / "nothing").mkdir()
    (folder / "unasked.jsonl").write_text('{"prompt": "", "completion": "2"}\n')
    adapted = get_peft_model(tiny_pilot(), LoraConfig(r=2))
    adapted.save_pretrained(folder / "merged")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    out, rows, train = folder / "out", folder / "rows.jsonl", ["sft", *ON_CPU, "--output_dir", folder / "run"]
    measure, no_results = ["eval", out, *FORM, "--data"], ["--results", rows, "--dataset_id", "a"]
    copilot, data = out / "copilot", ["--dataset_name", rows]

    def scratch(**changes) -> list:
        return [*train, *data, *FORM, "--from_config", json.dumps(LLAMA | changes)]

    small = scratch()
    return {
        "an empty file": ([*measure, folder / "empty.jsonl"], 1, "empty.jsonl is empty"),
        "blank lines": ([*measure, folder / "blank.jsonl"], 1, "blank.jsonl"),
        "a broken line": ([*measure, folder / "broken.jsonl"], 1, "broken.jsonl, line 2 is no JSON"),
        "a list": ([*measure, folder / "list.jsonl"], 1, "list.jsonl, line 2 is no JSON object"),
        "bytes": ([*measure, folder / "binary.jsonl"], 1, "binary.jsonl"),
        "objects over lines": ([*measure, folder / "pretty.json"], 1, "pretty.json, line 1 is no JSON by itself"),
        "a table of texts": ([*measure, folder / "table.csv"], 1, "Dataset.from_csv("),
        "a table of columns": ([*measure, folder / "table.parquet"], 1, "Dataset.from_parquet("),
        "another form of chats": (["eval", out, "--data", folder / "shared.jsonl"], 1, "rename `conversations` to"),
        "a missing field": ([*measure, folder / "missing.jsonl"], 1, "of the data has no field 'answer'"),
        "another form": (["eval", out, "--data", rows], 1, "has no field 'prompt'; it has ['answer', 'question']"),
        "no file": ([*measure, folder / "gone.jsonl"], 1, "gone.jsonl is not here"),
        "nothing to measure on": (["eval", out], 1, "--data names a JSON Lines file"),
        "calibration without data": (["calibrate", out], 1, "--data names a JSON Lines file"),
        "folding without data": (["fold", out], 1, "--data names a JSON Lines file"),
        "folding with a device": (["fold", *measure[1:], folder / "missing.jsonl", "--device", "cpu"], 1, "--use_cpu"),
        "folding of a missing field": (["fold", *measure[1:], folder / "missing.jsonl"], 1, "has no field"),
        "calibration with a missing field": (["calibrate", *measure[1:], folder / "missing.jsonl"], 1, "has no field"),
        "no Pilot there": (["check", folder / "gone"], 1, "neither a folder here nor a Hub id"),
        "a name that is nowhere": (["eval", "outt", "--data", rows, *FORM], 1, "The Pilot outt can't be loaded"),
        "folding of such a name": (["fold", "outt", "--data", rows, *FORM], 1, "and is no folder here"),
        "a folder without a model": (["check", folder / "nothing", copilot], 1, "is no Pilot"),
        "a file as a Pilot": (["check", rows, copilot], 1, "is a file"),
        "a Pilot as a Copilot": (["check", out, out], 1, "is no Copilot"),
        "a Copilot as a Pilot": (["check", copilot, copilot], 1, "is a Copilot: name its Pilot first"),
        "a run without a Copilot": (["check", folder / "other"], 1, "is no Copilot"),
        "another vocabulary": (["check", folder / "other", copilot], 1, "gives other ids"),
        "training on an empty file": ([*train, "--dataset_name", folder / "empty.jsonl"], 1, "is empty"),
        "training without data": (train, 1, "There is no data"),
        "training on a missing file": ([*train, "--dataset_name", folder / "gone.jsonl"], 1, "gone.jsonl is not here"),
        "training on an empty folder": ([*train, "--dataset_name", folder / "nothing"], 1, "train.jsonl[.gz]"),
        "training with a missing field": ([*train, "--dataset_name", folder / "missing.jsonl", *FORM], 1, "no field"),
        "a data set that is not there": ([*train, "--dataset_name", "me/gone", *FORM], 1, "no data set of the Hub"),
        "a Pilot that is not there": ([*train, *data, *FORM, "--model_name_or_path", folder / "gone"], 1, "gone"),
        "a Copilot of no fields": ([*train, *data, "--copilot_config", "[1]"], 2, "copilot_config is to be a mapping"),
        "a field that no Copilot has": ([*small, "--copilot_config", '{"depth": 2}'], 2, "CopilotConfig has: depth"),
        "a value that no Copilot has": ([*small, "--copilot_config", '{"memory": "none"}'], 1, "memory"),
        "training without a Pilot": ([*train, "--dataset_name", rows, *FORM], 1, "There is no Pilot"),
        "a Pilot from no kind": ([*train, "--dataset_name", rows, *FORM, "--from_config", "{}"], 1, "no model_type"),
        "JSON that is none": ([*train, "--dataset_name", rows, "--from_config", "{"], 2, "from_config '{' is neither"),
        "a Copilot of a word": ([*small, "--copilot_config", "pilot"], 2, "is to be a mapping"),
        "a field that no Pilot has": (scratch(num_hidden_layer=1), 1, "no llama config has: num_hidden_layer"),
        "a preset that is none": ([*train, "--config", folder / "preset.yaml"], 2, "copilot_preset='papr': choose"),
        "a metric that is none": (["calibrate", out, "--config", folder / "metric.yaml"], 2, "metric='accuracy'"),
        "a fixed strength": ([*train, "--copilot_strength", "0.5"], 2, "--copilot_config '{strength: 0.5}'"),
        "a fixed strength in a file": ([*train, "--config", folder / "strength.yaml"], 2, "'{strength: 0.5}'"),
        "a picture that is not there": (["card", copilot, "--picture", folder / "no.png"], 1, "is not here"),
        "no folder for a card": (["card", folder / "gone"], 1, "no folder here"),
        "results of another kind": (["card", copilot, *no_results, "--task_id", "a"], 1, "is not what"),
        "no config": (["eval", "--config", folder / "gone.yaml"], 2, "No such file"),
        "no config in one word": (["eval", f"--config={folder / 'gone.yaml'}"], 2, "No such file"),
        "a config that is no YAML": (["eval", "--config", folder / "no.yaml"], 2, "expected"),
        "an argument in a config that is unknown": (["eval", out, "--config", folder / "unknown.yaml"], 2, "no_such"),
        "an argument that is unknown": (["eval", out, "--no_such", "1"], 2, "no_such"),
        "one too many": (["check", out, copilot, "more"], 2, "one argument too many"),
        "a number that is none": (["eval", out, "--strength", "much"], 2, "invalid float"),
        "a strength out of range": (["eval", out, "--data", rows, "--strength", "-1", *FORM], 1, "finite"),
        "a pattern without a group": ([*measure, rows, "--answer_pattern", r"\d+"], 2, "has no group"),
        "a pattern that is none": ([*small, "--answer_pattern", "(a"], 2, "is no regular expression"),
        "a data set with a dot in its name": ([*train, "--dataset_name", "me/gone-2.5", *FORM], 1, "of the Hub"),
        "a stream": ([*small, "--dataset_streaming", "true"], 1, "rows are read whole"),
        "a loaded Pilot from scratch": ([*small, "--dtype", "bfloat16"], 1, "--dtype is for one that is loaded"),
        "a vocabulary from scratch": (scratch(vocab_size=9), 1, "tokenizer_size"),
        "heads that do not divide": (scratch(num_attention_heads=5), 1, "makes no llama"),
        "a picture that is no PNG": (["card", copilot, "--picture", rows], 1, "is no PNG"),
        "a device that is none": ([*measure, rows, "--device", "gpu"], 2, "--device gpu"),
        "a type that is none": ([*measure, rows, "--dtype", "float31"], 2, "--dtype float31"),
        "no beam": ([*measure, rows, "--num_beams", "0"], 2, "--num_beams 0: it is at least 1"),
        "no row together": (["calibrate", *measure[1:], rows, "--batch_size", "0"], 2, "--batch_size 0"),
        "fewer than no rows": ([*measure, rows, "--limit", "-1"], 2, "--limit -1"),
        "no folder for figures": ([*measure, rows, "--output_file", folder / "gone" / "a.json"], 2, "no such folder"),
        "a lonely brace": (["eval", out, "--prompt", "{question", "--data", rows], 1, "'{question' is no format"),
        "a field of a text": (["eval", out, "--prompt", "{question.text}", "--data", rows], 1, "does not suit"),
        "an empty prompt": (["eval", out, "--data", folder / "unasked.jsonl"], 1, "without a token"),
        "folding where the Copilot is": (["fold", *measure[1:], rows, "--output_dir", out], 1, "correct it twice"),
        "weights and an adapter": (["eval", folder / "merged", copilot, *FORM, "--data", rows], 1, "once more"),
        "a rate out of range": ([*train, "--copilot_learning_rate", "-1"], 2, "copilot_learning_rate"),
    }  # fmt: skip


def test_everything_wrong_is_said_in_a_sentence(tmp_path, out, rows, capsys):
    for name, (argv, code, says) in bad_files(tmp_path).items():
        capsys.readouterr()
        found, said = run(*argv), capsys.readouterr().err
        last = [line for line in said.splitlines() if line.startswith("hf-copilot")]
        assert (found, len(last)) == (code, 1), (name, said)
        assert says in last[0] and "Traceback" not in said, (name, said)


def test_where_it_went_wrong_is_shown_on_request(capsys, monkeypatch):
    argv = "check", "nowhere", "nowhere"
    for verbosity, is_shown in ((logging.WARNING, False), (logging.DEBUG, True)):
        monkeypatch.setattr(logging, "get_verbosity", lambda verbosity=verbosity: verbosity)
        assert run(*argv) == 1
        assert ("Traceback" in capsys.readouterr().err) is is_shown


def test_a_file_with_brackets_in_its_name_is_that_file(tmp_path):
    """No pattern, which would find the other one."""
    for name, value in {"rows1.jsonl": 1, "rows[1].jsonl": 2}.items():
        (tmp_path / name).write_text(json.dumps({"a": value}) + "\n")
    assert read_file(tmp_path / "rows[1].jsonl")[0] == read_rows(tmp_path / "rows[1].jsonl")[0] == {"a": 2}


def test_values_are_read_as_they_are_written(tmp_path):
    """A data set has one type for a column: it would make "2.0" of 2, and a moment of a day."""
    lines = [
        '{"answer": 2, "day": "2024-01-05", "id": 123456789012345678}',
        '{"answer": 1.50, "day": "2024-01-05T10:00:00", "id": 1, "note": null}',
    ]
    texts = [
        {"prompt": "2024-01-05, 123456789012345678", "completion": "2"},
        {"prompt": "2024-01-05T10:00:00, 1", "completion": "1.50"},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    assert read_answers(tmp_path / "lines.jsonl", "{day}, {id}", "{answer}") == texts
    (tmp_path / "array.json").write_text('[{"answer": 2}, {"answer": 1.50}]')
    for form, expected in (("{answer}", ["2", "1.50"]), ("{answer:.1f}", ["2.0", "1.5"])):
        assert [row["completion"] for row in read_answers(tmp_path / "array.json", "?", form)] == expected
    split = load_rows(str(tmp_path / "lines.jsonl"), "{day}, {id}", "{answer}")
    assert [split["train"][0], split["test"][0]] == texts


def test_the_figure_of_a_card_is_the_tasks():
    results = {
        "piqa, λ = 1": [{"metric": "acc", "pilot": 0.7, "rectified": 0.71}],
        "arc, λ = 1": [
            {"metric": "acc", "pilot": 0.4, "rectified": 0.45},
            {"metric": "f1", "pilot": 0, "rectified": 1},
        ],
    }
    assert choose_figure(results, "acc", "arc")["pilot"] == 0.4
    assert choose_figure(results, "f1", "anything")["rectified"] == 1
    with pytest.raises(ValueError, match="piqa, λ = 1; arc"):
        choose_figure(results, "acc", "anything")
    with pytest.raises(ValueError, match=r"No metric 'em', only \['acc', 'f1'\]"):
        choose_figure(results, "em", "arc")


def test_help_where_the_encoding_lacks_its_letters():
    """In a pipe, where Python takes the system's."""
    command, ascii_only = [sys.executable, "-m", "hf_copilot.cli"], os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, "--help"], env=ascii_only, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "?" in done.stdout, done.stderr


def test_python_runs_it_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "hf_copilot.cli", "check"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "--pilot" in done.stderr and "Traceback" not in done.stderr

"""The recipes: their arguments, and from end to end, short."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import addition, tiny_pilot, tiny_tokenizer

from hf_copilot.cli.recipe import RecipeArguments
from hf_copilot.cli.scratch import build_from_scratch
from hf_copilot.cli.train import parser
from hf_copilot.training.report import cost_since

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
slow = pytest.mark.slow


YAMLS = sorted(RECIPES.glob("*.yaml"))


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(RECIPES / script), *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@slow
def test_quickstart(tmp_path):
    out = run("quickstart.py", "--output_dir", str(tmp_path), "--max_steps", "40", "--problems", "50")
    assert "Pilot + Copilot" in out and "from_pretrained" in out
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    lines = out[out.index("    from transformers") :].splitlines()
    code = "\n".join(line[4:] for line in lines)
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and "answer" in again.stdout, again.stderr[-3000:]


@slow
def test_quickstart_on_a_pretrained_pilot(tmp_path):
    """In its own chat form, with LoRA, λ chosen; the last lines of what is printed run too."""
    tiny_pilot().save_pretrained(tmp_path / "pilot")
    tiny_tokenizer().save_pretrained(tmp_path / "pilot")
    short = ["--max_steps", "4", "--problems", "8", "--output_dir", str(tmp_path / "out")]
    out = run("quickstart.py", "--pretrained", str(tmp_path / "pilot"), *short)
    assert "Pilot before" in out and "8 unseen problems" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    calibration = json.loads((tmp_path / "out" / "copilot" / "config.json").read_text())["calibration"]
    assert calibration["data"] == "40 rows"
    lines = out[out.index("    from transformers") :].splitlines()
    code = "\n".join(line[4:] for line in lines)
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and "<user>" in again.stdout, again.stderr[-3000:]


@slow
@pytest.mark.parametrize("launcher", [[], ["--accelerate"]], ids=["plain", "accelerate"])
def test_plain_loop(tmp_path, launcher):
    assert len((RECIPES / "plain_loop.py").read_text().splitlines()) <= 110
    out = run("plain_loop.py", "--steps", "61", "--output", str(tmp_path / "copilot"), *launcher)
    last = ast.literal_eval(out.splitlines()[-2].partition(" ")[2])
    assert last["rectified_nll"] < last["pilot_nll"]
    assert "=" in out.splitlines()[-1] and (tmp_path / "copilot" / "model.safetensors").is_file()


def write_sums(folder: Path) -> None:
    rows = [{"question": row["prompt"], "equation": row["completion"]} for row in addition(400)]
    for name, part in (("train", rows[:300]), ("test", rows[300:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


@slow
def test_seq2seq_copilot(tmp_path):
    write_sums(tmp_path)
    config = str(RECIPES / "mawps_t5_tiny.yaml")
    short = ["--num_train_epochs", "1", "--generate_rows", "20", "--max_new_tokens", "8"]
    places = ["--dataset_name", str(tmp_path), "--output_dir", str(tmp_path)]
    out = run("seq2seq_copilot.py", "--config", config, *places, *short)
    assert "Pilot + Copilot" in out and (tmp_path / "copilot" / "config.json").is_file()


@slow
@pytest.mark.parametrize("source", ["folder", "file"])
def test_sft_copilot(tmp_path, source):
    write_sums(tmp_path)
    data = tmp_path if source == "folder" else tmp_path / "train.jsonl"
    config = str(RECIPES / "mawps_tiny.yaml")
    short = ["--num_train_epochs", "1", "--generate_rows", "20", "--max_new_tokens", "8"]
    out = run("sft_copilot.py", "--config", config, "--dataset_name", str(data), "--output_dir", str(tmp_path), *short)
    assert "Pilot + Copilot" in out and (tmp_path / "copilot" / "config.json").is_file()
    wrong = subprocess.run(
        [sys.executable, str(RECIPES / "sft_copilot.py"), "--config", config, "--dataset_name", str(data)]
        + ["--prompt", "{nothing}"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert wrong.returncode != 0 and "no field" in wrong.stderr


def parse(file: Path, *arguments: str) -> RecipeArguments:
    on_cpu = ["--use_cpu", "true", "--bf16", "false"]
    given = ["--config", str(file), "--dataset_name", "data", *on_cpu, *arguments]
    return parser("seq2seq" if "t5" in file.stem else "sft").parse(given)[-1]


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.stem)
def test_every_yaml_is_read(file):
    recipe = parse(file)
    assert recipe.copilot().num_hidden_layers in (None, 2)
    if recipe.from_config:
        model, tokenizer = build_from_scratch(recipe.from_config, recipe.tokenizer_size, addition(20))
        assert model.config.model_type == recipe.from_config["model_type"] and model.config.vocab_size == len(
            tokenizer
        )


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.stem)
def test_the_page_of_the_recipes_has_every_yaml(file):
    assert f"--config recipes/{file.name}" in (RECIPES / "README.md").read_text(encoding="utf-8")


def test_the_copilot_is_a_dictionary(tmp_path):
    """In a file, or as JSON or YAML on the command line; beside a preset, what differs from it."""
    settings = {"memory": "pilot", "num_hidden_layers": 4}
    texts = (json.dumps(settings), "{memory: pilot, num_hidden_layers: 4}")
    configs = [parse(RECIPES / "mawps_tiny.yaml", "--copilot_config", text).copilot() for text in texts]
    text = (RECIPES / "mawps_tiny.yaml").read_text() + "copilot_config: {memory: pilot, num_hidden_layers: 4}\n"
    (tmp_path / "changed.yaml").write_text(text)
    for config in (*configs, parse(tmp_path / "changed.yaml").copilot()):
        assert (config.memory, config.num_hidden_layers, config.objective) == ("pilot", 4, "cross_entropy")
    assert RecipeArguments(copilot_config='{"rms_norm_eps": 1e-5}').copilot().rms_norm_eps == 1e-5  # no YAML
    paper = RecipeArguments(copilot_preset="paper", copilot_config={"pattern": 2}).copilot()
    assert (paper.objective, paper.pattern) == ("rmse", 2)


def test_the_cost_is_said_in_words():
    assert cost_since(0.0).partition(" min ")[0].isdigit()

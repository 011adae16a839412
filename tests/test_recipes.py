"""The recipes from end to end, short."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import addition

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / script), *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quickstart(tmp_path):
    out = run("quickstart.py", "--output_dir", str(tmp_path), "--max_steps", "40", "--problems", "50")
    assert "Pilot + Copilot" in out and "from_pretrained" in out
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    lines = out[out.index("    from transformers") :].splitlines()
    code = "\n".join(line[4:] for line in lines)
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and "answer" in again.stdout, again.stderr[-3000:]


@pytest.mark.parametrize("launcher", [[], ["--accelerate"]], ids=["plain", "accelerate"])
def test_plain_loop(tmp_path, launcher):
    assert len((ROOT / "recipes" / "plain_loop.py").read_text().splitlines()) <= 110
    out = run("plain_loop.py", "--steps", "61", "--output", str(tmp_path / "copilot"), *launcher)
    last = ast.literal_eval(out.splitlines()[-2].partition(" ")[2])
    assert last["rectified_nll"] < last["pilot_nll"]
    assert "=" in out.splitlines()[-1] and (tmp_path / "copilot" / "model.safetensors").is_file()


def write_sums(folder: Path) -> None:
    rows = [{"question": row["prompt"], "equation": row["completion"]} for row in addition(400)]
    for name, part in (("train", rows[:300]), ("test", rows[300:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def test_seq2seq_copilot(tmp_path):
    write_sums(tmp_path)
    config = str(ROOT / "recipes" / "mawps_t5_tiny.yaml")
    short = ["--num_train_epochs", "1", "--generate_rows", "20", "--max_new_tokens", "8"]
    places = ["--dataset_name", str(tmp_path), "--output_dir", str(tmp_path)]
    out = run("seq2seq_copilot.py", "--config", config, *places, *short)
    assert "Pilot + Copilot" in out and (tmp_path / "copilot" / "config.json").is_file()


@pytest.mark.parametrize("source", ["folder", "file"])
def test_sft_copilot(tmp_path, source):
    write_sums(tmp_path)
    data = tmp_path if source == "folder" else tmp_path / "train.jsonl"
    config = str(ROOT / "recipes" / "mawps_tiny.yaml")
    short = ["--num_train_epochs", "1", "--generate_rows", "20", "--max_new_tokens", "8"]
    out = run("sft_copilot.py", "--config", config, "--dataset_name", str(data), "--output_dir", str(tmp_path), *short)
    assert "Pilot + Copilot" in out and (tmp_path / "copilot" / "config.json").is_file()
    wrong = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "sft_copilot.py"), "--config", config, "--dataset_name", str(data)]
        + ["--prompt", "{nothing}"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert wrong.returncode != 0 and "no field" in wrong.stderr

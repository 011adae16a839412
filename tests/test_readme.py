"""The snippets of README and docs/using.md run as they stand, on a tiny Pilot under another name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from test_learner import padded_batch
from tiny import addition, tiny_pilot, tiny_seq2seq, tiny_tokenizer, trained_like
from transformers import Trainer, TrainingArguments

from hf_copilot import CopilotConfig, CopilotSeq2SeqTrainer

ROOT = Path(__file__).parent.parent
README, USING = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/using.md"))
CPU = 'output_dir="out", use_cpu=True, bf16=False, max_steps=2, report_to=[]'
CHANGES = {
    '"Qwen/Qwen2.5-0.5B"': '"base"',
    '"Qwen/Qwen2.5-0.5B-Instruct"': '"base"',  # TRL knows this template, and not that of Qwen2.5-0.5B
    '"me/qwen2.5-1.5b-tuned"': '"larger"',
    '"google/flan-t5-small"': '"t5"',
    '"me/qwen2.5-0.5b-copilot"': '"portable"',
    'output_dir="out"': CPU,
}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A folder with a Pilot called "base", and no hub."""
    monkeypatch.chdir(tmp_path)
    tiny_pilot().save_pretrained("base")
    tiny_pilot(hidden_size=48, num_attention_heads=6, num_key_value_heads=3).save_pretrained("larger")
    tiny_seq2seq().save_pretrained("t5")
    trained_like(tiny_pilot(), CopilotConfig(memory="tokens")).save_pretrained("portable")
    for pilot in ("base", "larger", "t5"):
        tiny_tokenizer().save_pretrained(pilot)
    parts = {part: addition(16, form="chat") for part in ("train", "test")}
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: parts)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: type("Repo", (), {"repo_id": name}))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: "url")
    return tmp_path


def run(text, namespace):
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    for snippet in snippets:
        for before, after in CHANGES.items():
            snippet = snippet.replace(before, after)
        exec(snippet, namespace)
    return len(snippets)


def test_the_snippets_of_the_readme_run(offline):
    namespace = {}
    assert run(README, namespace) == 2
    assert (offline / "out" / "copilot" / "model.safetensors").is_file()
    assert namespace["copilot"].config.calibration is not None  # λ was chosen, as the page says


def test_the_readme_is_short():
    """A minute to read: few lines, and snippets of at most twelve."""
    assert len(README.splitlines()) <= 127
    assert max(len(snippet.splitlines()) for snippet in re.findall(r"```\w+\n(.*?)```", README, re.S)) <= 12


def test_the_snippets_of_the_first_questions_run(offline):
    pilot, rows = tiny_pilot().eval(), [{"input_ids": [5, 9, 12], "labels": [5, 9, 12]}] * 4
    plain = Trainer(
        model=tiny_pilot(), args=TrainingArguments("plain", use_cpu=True, report_to=[]), train_dataset=rows
    )
    namespace = {"train_dataset": addition(16), "eval_dataset": addition(4), "pilot": pilot, "trainer": plain}
    namespace["valid_rows"] = rows
    namespace |= {"loader": [padded_batch()] * 2, "tokenizer": tiny_tokenizer(), "copilot": trained_like(pilot)}
    sft, *others = re.split(r"(?=\n\*\*My Pilot is trained already)", USING)
    trained = dict(namespace)
    assert run(sft, trained) == 1
    namespace |= {"copilot_trainer": trained["trainer"], "rows_with_text": addition(2)}
    assert run("".join(others), namespace) == 7
    assert isinstance(namespace["trainer"], CopilotSeq2SeqTrainer)
    assert namespace["pilot_alone"] < 0 and namespace["with_copilot"] < 0
    assert CopilotConfig.from_pretrained(offline / "copilot").calibration is not None

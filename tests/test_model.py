"""The Copilot itself: weights taken over, configuration, saving and loading, the check against a Pilot."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from huggingface_hub import HfApi
from peft import IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import SHAPE, VOCAB_SIZE, assert_same, tiny_pilot, tiny_tokenizer, trained_like
from transformers import AutoConfig, AutoModel, BertConfig, BertForMaskedLM

from hf_copilot import CopilotConfig, CopilotLogitsProcessor, CopilotModel, check_pilot, copilot_for
from hf_copilot.model.configuration_copilot import FORMAT_VERSION
from hf_copilot.model.hub import copilot_card
from hf_copilot.model.modeling_copilot import rotation
from hf_copilot.pilot.compatibility import tokenizer_fingerprint
from hf_copilot.pilot.copilot_for import LLAMA_FAMILIES


def no_rotary(hidden):
    """cos = 1, sin = 0: rotary embedding switched off."""
    shape = (*hidden.shape[:2], 8)
    return torch.ones(shape), torch.zeros(shape)


@pytest.mark.parametrize("family", LLAMA_FAMILIES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_taken_over_computes_what_the_pilots_layer_computes(family, biased):
    changes = {"attention_bias": biased, "mlp_bias": biased} if family in ("llama", "smollm3") else {}
    rope = {"rope_theta": 500.0, "rope_type": "default"}
    pilot = tiny_pilot(family, sliding_window=None, rope_parameters=rope, **changes).eval()
    with torch.no_grad():  # biases and norms start as 0 and 1, which would prove nothing
        for parameter in pilot.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    copilot = copilot_for(pilot, CopilotConfig(num_hidden_layers=3)).eval()
    hidden = torch.randn(2, 6, 32)
    causal = torch.ones(2, 6, 6).tril().bool()
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~causal[:, None], -torch.inf)
    positions = torch.arange(6).expand(2, 6)
    rotary = pilot.model.rotary_emb(hidden, positions)
    turned = [rotation(positions, copilot.config.head_dim, copilot.config.rope_theta)] * 2
    for own, theirs in zip(copilot.layers, pilot.model.layers, strict=True):
        for embeddings, rotations in ((no_rotary(hidden), None), (rotary, turned)):
            expected = theirs(hidden, attention_mask=additive, position_embeddings=embeddings, use_cache=False)
            expected = expected[0] if isinstance(expected, tuple) else expected
            # a cross layer over a memory that is the queries' own states is self-attention
            uses_them = getattr(theirs.self_attn, "use_rope", True)  # not in every layer of SmolLM3
            found = own(hidden, hidden, causal, causal, None, rotations if uses_them else None)
            assert torch.allclose(found, expected, atol=1e-5), own.layer_type
    assert torch.equal(copilot.embed_tokens.weight, pilot.get_input_embeddings().weight)
    assert torch.equal(copilot.norm.weight, pilot.model.norm.weight)
    assert not copilot.lm_head.weight.any()


def test_weights_come_through_adapters(pilot):
    plain = copilot_for(pilot)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    wrapped = copilot_for(get_peft_model(pilot, config))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, wrapped.state_dict()[name]) or name == "start.weight", name


def test_layers_are_spread_over_the_source():
    pilot = tiny_pilot(num_hidden_layers=5)
    copilot = copilot_for(pilot, CopilotConfig(num_hidden_layers=3))
    for own, theirs in zip(copilot.layers, (0, 2, 4), strict=True):
        assert torch.equal(own.mlp.up_proj.weight, pilot.model.layers[theirs].mlp.up_proj.weight)
    assert len(copilot_for(pilot, CopilotConfig.paper()).layers) == 5


def test_starts_from_another_checkpoint(tmp_path):
    """A small decoder for a wide Pilot: one linear layer aligns the sizes."""
    small = tiny_pilot(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=VOCAB_SIZE)
    small.save_pretrained(tmp_path)
    copilot = copilot_for(tiny_pilot(), CopilotConfig(init=str(tmp_path), memory="pilot"))
    assert torch.equal(copilot.layers[0].mlp.up_proj.weight, small.model.layers[0].mlp.up_proj.weight)
    assert copilot.memory_proj.weight.shape == (16, 32)
    tiny_pilot(vocab_size=2 * VOCAB_SIZE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another vocabulary"):
        copilot_for(tiny_pilot(), CopilotConfig(init=str(tmp_path)))


@pytest.mark.parametrize("make_config", [IA3Config, VeraConfig, LoHaConfig])
def test_weights_come_through_other_adapters(pilot, make_config):
    weights = copilot_for(pilot).layers.state_dict()
    targets = ["q_proj", "o_proj", "down_proj"] if make_config is not VeraConfig else ["q_proj"]
    more = {"feedforward_modules": ["down_proj"]} if make_config is IA3Config else {}
    wrapped = get_peft_model(pilot, make_config(task_type="CAUSAL_LM", target_modules=targets, **more))
    for name, tensor in copilot_for(wrapped).layers.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_a_block_that_the_source_has_not_raises(pilot):
    with pytest.raises(ValueError, match="hidden_act='gelu'.*has 'silu'.*init='random'"):
        copilot_for(pilot, CopilotConfig(hidden_act="gelu", init="pilot"))
    with pytest.raises(ValueError, match=f"vocab_size=7, but the Pilot has {VOCAB_SIZE}"):
        copilot_for(pilot, CopilotConfig(vocab_size=7))
    with pytest.raises(ValueError, match="pilot_hidden_size=7, but the Pilot has 32"):
        copilot_for(pilot, CopilotConfig(pilot_hidden_size=7))
    assert copilot_for(pilot, CopilotConfig(hidden_act="gelu", init="random")).config.hidden_act == "gelu"
    again = copilot_for(pilot, copilot_for(pilot).config)  # what it was given by the source is no setting of a user's
    assert again.config.attention_bias == copilot_for(pilot).config.attention_bias


def test_the_default_starts_from_the_pilots_layers_where_they_fit(pilot):
    assert copilot_for(pilot).config.init == "pilot"
    assert_same(copilot_for(pilot), copilot_for(pilot, CopilotConfig(init="pilot")))
    for other in ({"hidden_act": "gelu"}, {"hidden_size": 16, "num_attention_heads": 2}):
        copilot = copilot_for(pilot, CopilotConfig(**other))
        assert copilot.config.init == "random" and copilot.config.to_dict().items() >= other.items()
    with pytest.raises(ValueError, match="vocab_size=7"):  # of no Copilot beside this Pilot
        copilot_for(pilot, CopilotConfig(vocab_size=7))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_family_that_cant_be_taken_over_names_the_way_out(family):
    pilot = tiny_pilot(family)
    with pytest.raises(ValueError, match="init='random'"):
        copilot_for(pilot, CopilotConfig(init="pilot"))
    assert copilot_for(pilot).config.init == "random"


def test_other_heads_than_those_of_the_weights_name_the_way_out():
    with pytest.raises(ValueError, match="num_attention_heads=8, but its source.*init='random'"):
        copilot_for(tiny_pilot(num_key_value_heads=4), CopilotConfig(num_attention_heads=8, init="pilot"))


def test_a_width_that_does_not_fit_names_the_way_out():
    with pytest.raises(ValueError, match="init='random'"):
        copilot_for(tiny_pilot(), CopilotConfig(hidden_size=16, num_attention_heads=2, init="pilot"))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(None, 2, 8), (4, 2, 8), (8, 8, 4), (1, 1, 32)])
def test_heads_of_its_own_have_a_size_that_fits(heads, kv_heads, head_dim):
    """Key heads and their size are the Pilot's only with as many heads."""
    pilot = tiny_pilot(num_key_value_heads=2)
    config = copilot_for(pilot, CopilotConfig(init="random", num_attention_heads=heads)).config
    assert (config.num_key_value_heads, config.head_dim) == (kv_heads, head_dim)


def test_padding_rows_need_a_copilot_that_knows_its_tokenizer(tokenizer):
    pilot, padded = tiny_pilot(), tiny_pilot(vocab_size=VOCAB_SIZE + 1)
    check_pilot(copilot_for(pilot, None, tokenizer), padded, tokenizer)
    with pytest.raises(ValueError, match="copilot_for.*tokenizer"):
        check_pilot(copilot_for(pilot), padded, tokenizer)


def test_what_is_left_open_is_chosen_when_a_copilot_is_built():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 20, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    config = CopilotModel(CopilotConfig(**sizes)).config
    assert (config.memory, config.position_embedding) == ("tokens", "rotary")
    before = {"model_type": "copilot", **sizes, "pilot_hidden_size": 16}  # saved when there was no choice
    config = CopilotModel(CopilotConfig.from_dict(before)).config
    assert (config.memory, config.position_embedding) == ("pilot", "none")
    with pytest.raises(ValueError, match="memory='pilot'.*pilot_hidden_size"):
        CopilotModel(CopilotConfig(**sizes, memory="pilot"))


@pytest.mark.parametrize("change", [{"num_attention_heads": 4}, {"hidden_act": "gelu"}, {"rms_norm_eps": 1e-2}])
def test_what_a_copilot_computes_is_compared(change):
    assert CopilotConfig(**change).differences(CopilotConfig()) == list(change)
    assert not CopilotConfig(init="random", strength=0.5, results={}).differences(CopilotConfig())


def test_building_a_copilot_leaves_the_random_state_alone(pilot):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    copilot_for(pilot, CopilotConfig(init="random"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"pattern": 3}, "choose one of"),
        ({"hidden_state_lag": 2}, "choose one of"),
        ({"objective": "rmse"}, "does not go with"),
        ({"fusion": "probability"}, "does not go with"),
        ({"error_feedback": "predicted"}, "paper"),
        ({"num_hidden_layers": 1}, "at least 2"),
        ({"num_attention_heads": 0}, "at least 1"),
        ({"num_attention_heads": 2, "num_key_value_heads": 4}, "must be a multiple"),
        ({"position_embedding": "rotary", "head_dim": 5}, "is odd"),
        ({"top_k": 0}, "at least 1"),
        ({"strength": -1.0}, "finite"),
        ({"strength": float("inf")}, "finite"),
    ],
)
def test_wrong_settings_raise(wrong, match):
    with pytest.raises(ValueError, match=match):
        CopilotConfig(**wrong)


def test_a_field_that_is_spelt_wrong_raises():
    with pytest.raises(ValueError, match="'num_hiden_layers': is 'num_hidden_layers' meant"):
        CopilotConfig(num_hiden_layers=3)
    assert CopilotConfig(of_the_future=1).of_the_future == 1


def test_patterns():
    assert CopilotConfig(num_hidden_layers=4).attention_types == ["self", "cross", "self", "cross"]
    assert CopilotConfig(pattern=2, num_hidden_layers=3).attention_types == ["cross"] * 3
    paper = CopilotConfig.paper(strength=0.3)
    assert (paper.objective, paper.fusion, paper.strength) == ("rmse", "probability", 0.3)


def test_save_and_load_give_the_same_text(pilot, tmp_path):
    copilot = trained_like(pilot)
    copilot.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["CopilotModel"] and config["model_type"] == "copilot"
    prompt = torch.tensor([[5, 15, 6, 17]])
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "eos_token_id": None}
    texts = []
    for model in (copilot, CopilotModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        with CopilotLogitsProcessor(model, pilot) as processor:
            texts.append(pilot.generate(prompt, logits_processor=[processor], pad_token_id=0, **settings))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CopilotConfig)


def test_the_format_is_in_the_files_and_a_newer_one_raises(pilot, tmp_path):
    copilot_for(pilot).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert saved["format_version"] == FORMAT_VERSION
    old = {name: value for name, value in saved.items() if name != "format_version"}
    file.write_text(json.dumps(old))
    assert CopilotModel.from_pretrained(tmp_path).config.format_version == FORMAT_VERSION
    newer = r"reads formats up to .*pip install -U hf_copilot"
    for number, error in ((FORMAT_VERSION + 1, newer), ("2", "damaged"), (None, "damaged"), (True, "damaged")):
        file.write_text(json.dumps(saved | {"format_version": number, "memory": "of the future"}))
        with pytest.raises(ValueError, match=error):
            CopilotModel.from_pretrained(tmp_path)


def test_from_pretrained_takes_dtype_device_map_and_subfolder(pilot, tmp_path):
    trained_like(pilot).save_pretrained(tmp_path / "inner")
    loaded = CopilotModel.from_pretrained(tmp_path, subfolder="inner", dtype=torch.bfloat16, device_map="cpu")
    assert loaded.dtype == torch.bfloat16 and not loaded.training


def test_the_folder_of_the_pilot_names_that_of_the_copilot(pilot, tmp_path):
    pilot.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama', not a Copilot.*subfolder='copilot'"):
        CopilotModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_a_damaged_file_raises(pilot, tmp_path, damage):
    trained_like(pilot).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if damage == "missing":
        del tensors["layers.0.mlp.up_proj.weight"]
    else:
        tensors["surplus"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=damage):
        CopilotModel.from_pretrained(tmp_path)


def test_weights_in_several_files_of_other_sizes_raise(pilot, tmp_path):
    trained_like(pilot).save_pretrained(tmp_path, max_shard_size="20KB")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 24}))
    with pytest.raises(ValueError, match=r"mismatched': \[.*layers.0.mlp"):
        CopilotModel.from_pretrained(tmp_path)


def test_weights_that_are_given_need_no_file(pilot):
    copilot = trained_like(pilot)
    given = CopilotModel.from_pretrained(None, config=copilot.config, state_dict=copilot.state_dict())
    assert_same(given, copilot)


def test_what_is_not_to_be_saved_is_not(pilot, tmp_path):
    copilot = trained_like(pilot)
    copilot.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    copilot.config.quantization_config = {"load_in_8bit": True}
    with pytest.raises(ValueError, match="before it is quantised"):
        copilot.save_pretrained(tmp_path)


def test_push_to_hub_is_one_commit_with_the_card(pilot, monkeypatch):
    copilot, commits = trained_like(pilot), []
    copilot.config.base_model_name_or_path = "Qwen/Qwen2.5-0.5B"
    copilot.config.results = {
        "pilot_nll": 1.5,
        "rectified_nll": 1.25,
        "pilot_token_accuracy": 0.5,
        "rectified_token_accuracy": 0.625,
    }

    class Repo:
        repo_id = "me/copilot"

    def upload_folder(self, folder_path, **kwargs):
        from pathlib import Path

        commits.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir()} | kwargs)
        return "url"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: Repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    branches = []
    monkeypatch.setattr(HfApi, "create_branch", lambda self, repo, *, branch, exist_ok: branches.append(branch))
    copilot.push_to_hub("copilot", revision="v2")
    assert branches == [commits.pop()["revision"]] == ["v2"]
    assert copilot.push_to_hub("copilot", tags=["mine"]) == "url"
    (commit,) = commits
    card = commit["README.md"].decode()
    assert commit["repo_id"] == "me/copilot" and {"config.json", "model.safetensors"} <= commit.keys()
    assert '"<your Pilot, fine-tuned from Qwen/Qwen2.5-0.5B>"' in card
    for text in ("base_model: Qwen/Qwen2.5-0.5B", "base_model_relation: adapter", "- mine", "1.2500", "library_name"):
        assert text in card, text
    assert "null" not in card.split("---")[1]


def test_the_card_loads_from_where_it_is_and_shows_the_folders_picture(pilot, tmp_path):
    copilot = trained_like(pilot)
    copilot.save_pretrained(tmp_path)
    assert "![" not in (tmp_path / "README.md").read_text()
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "curve.png").write_bytes(b"")
    copilot.save_pretrained(tmp_path)
    assert "](assets/curve.png)" in (tmp_path / "README.md").read_text()
    assert 'CopilotModel.from_pretrained("me/copilot")' in copilot_card(copilot.config, "me/copilot").content


def test_a_pinned_revision_is_the_one_that_is_loaded(pilot, tmp_path):
    """From the Hub's own cache, in which two commits of one repository lie."""
    repository, commits = tmp_path / "models--me--copilot", ("a" * 40, "b" * 40)
    copilots = [trained_like(pilot, seed=seed) for seed in (1, 2)]
    for commit, copilot in zip(commits, copilots, strict=True):
        copilot.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[1])
    (repository / "refs" / "v1").write_text(commits[0])
    for revision, expected in ((commits[0], 0), ("v1", 0), (commits[1], 1), ("main", 1)):
        found = CopilotModel.from_pretrained("me/copilot", revision=revision, cache_dir=tmp_path)
        assert_same(found, copilots[expected])
    with pytest.raises(OSError, match="cached files"):
        CopilotModel.from_pretrained("me/copilot", revision="c" * 40, cache_dir=tmp_path)


def test_check_pilot(pilot, tokenizer):
    copilot = copilot_for(pilot, CopilotConfig(memory="pilot"), tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_pilot(copilot, pilot, tokenizer)
    with pytest.raises(ValueError, match="hidden states of size 32"):
        check_pilot(copilot, tiny_pilot(hidden_size=16))
    with pytest.raises(ValueError, match="vocabulary rows"):
        check_pilot(copilot, tiny_pilot(vocab_size=VOCAB_SIZE + 1))
    with pytest.warns(UserWarning, match="qwen3.*hf-copilot calibrate"):
        check_pilot(copilot, tiny_pilot("qwen3"))
    assert copilot_for(pilot).config.tokenizer_fingerprint is None
    with pytest.warns(UserWarning, match="can't be told.*copilot_for"):
        check_pilot(copilot_for(pilot), pilot, tokenizer)
    copilot.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    check_pilot(copilot, pilot, other)
    copilot.config.tokenizer_fingerprint = tokenizer_fingerprint(other)
    with pytest.raises(ValueError, match=r"47 tokens.*48 tokens"):
        check_pilot(copilot, pilot, tokenizer)
    copilot.config.tokenizer_fingerprint = None
    with pytest.raises(ValueError, match="no decoder"):
        check_pilot(copilot, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no decoder"):
        check_pilot(copilot, BertForMaskedLM(BertConfig(**SHAPE)))


@pytest.mark.parametrize("other", [{"num_hidden_layers": 1}, {"hidden_size": 64, "intermediate_size": 96}])
def test_nothing_is_said_where_the_gain_stayed(pilot, tokenizer, other):
    """Another depth and width at home's λ; a Copilot that does not know its Pilot, as older ones."""
    copilot = copilot_for(pilot, None, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_pilot(copilot, tiny_pilot(**other), tokenizer)
        copilot.config.pilot_model_type = None
        check_pilot(copilot, tiny_pilot("qwen3", **other), tokenizer)


def test_modules_that_are_trained_whole_come_from_the_active_adapter(pilot):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    wrapped = get_peft_model(pilot, config, adapter_name="first")
    wrapped.add_adapter("second", config)
    wrapped.set_adapter("second")
    with torch.no_grad():
        for layer in wrapped.get_base_model().model.layers:
            for i, copied in enumerate(layer.mlp.down_proj.modules_to_save.values()):
                copied.weight.fill_(1.0 + i)
    found = copilot_for(wrapped)
    assert found.config.init == "pilot"
    assert all(bool((layer.mlp.down_proj.weight == 2.0).all()) for layer in found.layers)

"""Every family of Pilots that docs/families.md names trains a step, generates, saves and loads.

python tests/test_families.py      # writes the table anew
"""

from __future__ import annotations

from pathlib import Path

import pytest
import test_generation
import test_seq2seq
import torch
import transformers
from test_generation import PROMPT, Recorder, generate
from test_seq2seq import make
from tiny import BART_SHAPE, MEMORIES, QUIET, SHAPE, T5_SHAPE, VOCAB_SIZE, addition, assert_same, tiny_tokenizer
from transformers import PreTrainedModel

from hf_copilot import (
    CopilotConfig,
    CopilotModel,
    CopilotSeq2SeqConfig,
    CopilotSeq2SeqTrainer,
    CopilotSFTConfig,
    CopilotTrainer,
    copilot_for,
)

TABLE = Path(__file__).parent.parent / "docs" / "families.md"
HEAD = """# Families of Pilots

Each of these trains, generates with beams, saves and loads, with a Copilot of each kind that is named. In generation
each step's correction equals the one computed in training. `tests/test_families.py` shows it, and wrote this table.

"Tokens" is a token Copilot, "the Pilot's states" a state Copilot. By default (`CopilotConfig(init=None)`) it starts
from the Pilot's own layers where their block is the Copilot's, and from random weights elsewhere. RecurrentGemma and
MiniMax keep states that do not follow beams: with `num_beams` they need `use_cache=False`, and raise without.

| family | class | the Copilot starts from | and reads |
|---|---|---|---|
"""
GPT = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "eos_token_id": 2}
OLD = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "eos_token_id": 2,
}
PLAIN_3N = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4, "activation_sparsity_pattern": [0.0] * 4}
PLAIN_3N |= {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
MOE = {"num_experts_per_tok": 2}
SSM = {key: OLD[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "eos_token_id")} | {
    "pad_token_id": 0
}
SSM_2 = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA_2 = MAMBA | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR = {"linear_conv_kernel_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
LATENT |= MOE | {"pad_token_id": 0, "num_local_experts": 4, "moe_intermediate_size": 24}
NARROW = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
CONV = {"layer_types": ["conv", "conv", "full_attention"]}
TYPES = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
FAMILIES = {
    "Llama": ("Llama", SHAPE),
    "Mistral": ("Mistral", SHAPE),
    "Qwen2": ("Qwen2", SHAPE),
    "Qwen3": ("Qwen3", SHAPE),
    "SmolLM3": ("SmolLM3", SHAPE),
    "Gemma 2": ("Gemma2", SHAPE),
    "Gemma 3": ("Gemma3", SHAPE),
    "Gemma 3n": ("Gemma3n", SHAPE | PLAIN_3N | {"num_kv_shared_layers": 0}),
    "Phi-3": ("Phi3", SHAPE),
    "OLMo 2": ("Olmo2", SHAPE),
    "GPT-2": ("GPT2", GPT),
    "GPT-NeoX": ("GPTNeoX", OLD | {"intermediate_size": 48}),
    "OPT": ("OPT", OLD | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Falcon": ("Falcon", OLD),
    "Bloom": ("Bloom", OLD | {"n_layer": 3, "n_head": 4}),
    "Mixtral (mixture of experts)": ("Mixtral", SHAPE | MOE | {"num_local_experts": 4}),
    "Qwen3-MoE (mixture of experts)": ("Qwen3Moe", SHAPE | MOE | {"num_experts": 4, "moe_intermediate_size": 24}),
    "Mamba": ("Mamba", SSM | {"state_size": 8}),
    "Mamba 2": ("Mamba2", SSM | SSM_2 | {"state_size": 8}),
    "Falcon Mamba": ("FalconMamba", SSM | {"state_size": 8}),
    "RecurrentGemma": ("RecurrentGemma", SHAPE | {"lru_width": 32, "attention_window_size": 64}),
    "Jamba": ("Jamba", SHAPE | MAMBA | MOE | {"num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1}),
    "Bamba": ("Bamba", SHAPE | MAMBA_2 | {"attn_layer_indices": [1]}),
    "Zamba": ("Zamba", SHAPE | MAMBA | {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]}),
    "Zamba 2": ("Zamba2", SHAPE | MAMBA | {"chunk_size": 8, "layers_block_type": ["mamba", "hybrid", "hybrid"]}),
    "Qwen3-Next": ("Qwen3Next", SHAPE | LINEAR | TYPES | MOE | {"num_experts": 4} | NARROW),
    "Qwen3.5": ("Qwen3_5", SHAPE | LINEAR | TYPES),
    "LFM2": ("Lfm2", SHAPE | {"full_attn_idxs": [2], "block_multiple_of": 8}),
    "LFM2-MoE": ("Lfm2Moe", SHAPE | MOE | {"num_experts": 4, "moe_intermediate_size": 24} | CONV),
    "LFM3": ("Lfm3", SHAPE),
    "Falcon-H1": ("FalconH1", SHAPE | MAMBA_2 | {"mamba_d_ssm": 64}),
    "Nemotron-H": (
        "NemotronH",
        SHAPE
        | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
        | {"hybrid_override_pattern": "M*-"},
    ),
    "MiniMax": (
        "MiniMax",
        SHAPE
        | MOE
        | {"num_local_experts": 4, "layer_types": ["full_attention", "linear_attention", "full_attention"]},
    ),
    "OLMo hybrid": ("OlmoHybrid", SHAPE | LINEAR | TYPES),
    "Kimi Linear": ("KimiLinear", OLD | LATENT | TYPES | {"linear_head_dim": 8, "linear_num_heads": 4}),
    "Bailing (hybrid)": (
        "BailingHybrid",
        OLD | LATENT | TYPES | {"head_dim": 8, "n_group": 1, "topk_group": 1, "num_mtp_layers": 0},
    ),
    "T5": ("T5", T5_SHAPE),
    "FLAN-T5": ("T5", T5_SHAPE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mT5": ("MT5", T5_SHAPE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "BART": ("Bart", BART_SHAPE),
}
CLASSES = {
    "Bloom": "BloomForCausalLM",
    "GPT2": "GPT2LMHeadModel",
    "T5": "T5ForConditionalGeneration",
    "MT5": "MT5ForConditionalGeneration",
    "Bart": "BartForConditionalGeneration",
}
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Gemma3n": "Gemma3nTextConfig", "Qwen3_5": "Qwen3_5TextConfig"}
UNCACHED_BEAMS = ("RecurrentGemma", "MiniMax")  # whose states do not follow beams in transformers
READS = dict.fromkeys(FAMILIES, MEMORIES) | dict.fromkeys(("T5", "FLAN-T5", "mT5", "BART"), ("pilot",))
READS["Gemma 3n"] = ("tokens",)  # its layers' states have another form
CASES = [(name, memory) for name, memories in READS.items() for memory in memories]
QUICK = [("Llama", "tokens"), ("Qwen3", "pilot"), ("GPT-2", "pilot"), ("Mamba", "pilot"), ("T5", "pilot")]


def make_pilot(family: str) -> PreTrainedModel:
    name, shape = FAMILIES[family]
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config)


def start_of(pilot: PreTrainedModel) -> str:
    return {"pilot": "Pilot's layers", "random": "random weights"}[copilot_for(pilot).config.init]


def row_of(family: str) -> str:
    pilot = make_pilot(family)
    reads = " or ".join({"tokens": "tokens", "pilot": "the Pilot's states"}[memory] for memory in READS[family])
    return f"| {family} | `{type(pilot).__name__}` | {start_of(pilot)} | {reads} |"


def trained(pilot: PreTrainedModel, folder: str, config: CopilotConfig):
    settings = {"max_steps": 2, "copilot": config, "copilot_learning_rate": 1e-2}
    if pilot.config.is_encoder_decoder:
        trainer = make(CopilotSeq2SeqTrainer, CopilotSeq2SeqConfig, folder, pilot, **settings)
    else:
        copilot = settings.pop("copilot")
        trainer = CopilotTrainer(
            model=pilot,
            args=CopilotSFTConfig(output_dir=folder, **(QUIET | settings)),
            train_dataset=addition(16),
            processing_class=tiny_tokenizer(),
            copilot=copilot,
        )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("family", "memory"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_family(family, memory, tmp_path):
    row = row_of(family)
    assert row in TABLE.read_text(encoding="utf-8").splitlines(), "python tests/test_families.py writes the table"
    pilot = make_pilot(family)
    trainer = trained(pilot, tmp_path, CopilotConfig(memory=memory))
    assert trainer.learner.skipped_steps == 0 and trainer.copilot.lm_head.weight.abs().sum() > 0
    trainer.save_model()
    loaded = CopilotModel.from_pretrained(tmp_path / "copilot")
    assert_same(loaded, trainer.copilot)
    pilot.eval()
    settings = {"num_beams": 3, "use_cache": family not in UNCACHED_BEAMS}
    texts = []
    for copilot in (trainer.copilot, loaded):
        with Recorder(copilot, pilot, strength=3.0) as processor:
            texts.append(generate(pilot, processor, **settings))
        check_steps(copilot, pilot, processor.calls)
    assert torch.equal(*texts)


def check_steps(copilot: CopilotModel, pilot: PreTrainedModel, calls: list) -> None:
    """f of every step equals the training path's."""
    if pilot.config.is_encoder_decoder:
        test_seq2seq.check_against_training_path(copilot, pilot, calls, PROMPT)
    else:
        test_generation.check_against_training_path(copilot, pilot, calls, PROMPT.shape[1], lambda row: 0)


def test_the_table_names_these_families():
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(FAMILIES)


if __name__ == "__main__":
    TABLE.write_text(HEAD + "\n".join(row_of(family) for family in FAMILIES) + "\n", encoding="utf-8")

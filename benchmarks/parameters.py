"""Parameters of Pilots and of the Copilots that the paper pairs with them, beside its Table 11, and of Copilots of two
layers. Builds no weights.

python -m benchmarks.parameters      # writes benchmarks/results/parameters.md
"""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from benchmarks.common import RESULTS, table
from benchmarks.cost import LLAMA_3, SMALL_DECODER
from hf_copilot import CopilotConfig, CopilotModel
from hf_copilot.training.report import count_parameters

FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
T5_SHAPES = {  # as published on the Hub; the last two numbers are the paper's, Pilot and Pilot + Copilot, in millions
    "T5-small": ({"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}, 61, 92),
    "T5-base": ({"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, 223, 349),
    "FLAN-T5-small": ({"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6} | FLAN, 77, 118),
    "FLAN-T5-base": ({"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12} | FLAN, 248, 385),
}


def t5_pair(shape: dict) -> tuple[torch.nn.Module, CopilotModel]:
    """A Pilot and the Copilot of the paper, which has all its decoder's layers."""
    config = T5Config(**shape)
    copilot = CopilotConfig.paper(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_decoder_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=config.d_kv,
        hidden_act=config.dense_act_fn,
        mlp_gated=config.is_gated_act,
        pilot_hidden_size=config.d_model,
        pilot_is_encoder_decoder=True,
    )
    return T5ForConditionalGeneration(config), CopilotModel(copilot)


def llama_pair() -> tuple[torch.nn.Module, CopilotModel]:
    shape = LLAMA_3 | SMALL_DECODER | {"head_dim": 64, "num_hidden_layers": 16}
    copilot = CopilotConfig.paper(**shape, pilot_hidden_size=2048)
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)), CopilotModel(copilot)


def row(name: str, pair: tuple[torch.nn.Module, CopilotModel], paper: tuple[int, int]) -> dict:
    pilot, copilot = (count_parameters(model)[0] / 1e6 for model in pair)
    vocabulary = 2 * pair[1].lm_head.weight.numel() / 1e6
    own, lent = (two_layers(pair[1], projection) / 1e6 for projection in ("own", "pilot"))
    return {
        "Pilot": name,
        "its parameters (M)": f"{pilot:,.0f}",
        "Copilot (M)": f"{copilot:,.1f}",
        "of these in two vocabulary matrices": f"{vocabulary:,.1f}",
        "paper: Pilot (M)": f"{paper[0]:,}",
        "paper: Copilot (M)": f"{paper[1] - paper[0]:,}",
        "two layers (M)": f"{own:,.1f}",
        "two layers, the Pilot's vocabulary (M)": f"{lent:,.1f} ({lent / pilot:.0%} of the Pilot)",
    }


def two_layers(copilot: CopilotModel, projection: str) -> int:
    """Parameters of the same Copilot with two layers, and its own or the Pilot's vocabulary."""
    config = copy.deepcopy(copilot.config)
    config.num_hidden_layers, config.vocab_projection = 2, projection
    return count_parameters(CopilotModel(config))[0]


def main() -> None:
    with torch.device("meta"):
        rows = [row(name, t5_pair(shape), paper) for name, (shape, *paper) in T5_SHAPES.items()]
        rows.append(row("LLaMA-3.2-1B", llama_pair(), (1300, 2400)))
    text = table(rows)
    (RESULTS / "parameters.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

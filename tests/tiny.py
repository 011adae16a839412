"""Tiny Pilots, tokenizers and data, built in memory: no test touches a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_copilot import CopilotConfig, CopilotLearner, CopilotModel, copilot_for
from hf_copilot.training.teacher_forced import TeacherForced

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]
CHARACTERS = list("0123456789+-=?. abcdefghijklmnopqrstuvwxyz")
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% else %}<assistant>{% generation %}"
    "{{ m.content }}<eos>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# without dropout, whose draws depend on how a batch is cut
OBJECTIVES = {
    "ours": CopilotConfig(dropout=0.0),
    "paper": CopilotConfig.paper(num_hidden_layers=2, dropout=0.0),
}
MEMORIES = ("tokens", "pilot")
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[3:],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_pilot(family: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A random Pilot whose logits are spread enough for its greedy choices not to be ties."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=3, n_head=4, n_positions=256, eos_token_id=2)
            )
        config_class, model_class = FAMILIES[family]
        return model_class(config_class(**(SHAPE | {"initializer_range": 0.2} | changes)))


T5_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 3,
    "relative_attention_num_buckets": 8,
    "dropout_rate": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
BART_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
SEQ2SEQ = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5_SHAPE)),
    "flan_t5": lambda: T5ForConditionalGeneration(
        T5Config(**T5_SHAPE, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART_SHAPE)),
}


def tiny_seq2seq(family: str = "t5", seed: int = 0) -> PreTrainedModel:
    """A random encoder-decoder whose logits are spread enough for its greedy choices not to be ties."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pilot = SEQ2SEQ[family]()
        with torch.no_grad():
            pilot.get_output_embeddings().weight.normal_(std=1.0 if family == "t5" else 0.3)
        return pilot


def sums(count: int, seed: int = 0) -> Dataset:
    """`addition`, tokenised for an encoder-decoder."""
    tokenizer, rows = tiny_tokenizer(), addition(count, seed)
    labels = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    return Dataset.from_dict({"input_ids": [tokenizer(row["prompt"])["input_ids"] for row in rows], "labels": labels})


def addition(count: int, seed: int = 0, form: str = "prompt-completion") -> Dataset:
    """Sums of two small numbers, as prompt and completion, as plain text, or as a chat."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, 50, (count, 2), generator=generator).tolist()
    texts = [(f"{a}+{b}=", f"{a + b}") for a, b in pairs]
    if form == "text":
        return Dataset.from_dict({"text": [prompt + answer for prompt, answer in texts]})
    if form == "chat":
        chats = [[("user", prompt), ("assistant", answer)] for prompt, answer in texts]
        return Dataset.from_dict(
            {"messages": [[{"role": role, "content": content} for role, content in chat] for chat in chats]}
        )
    prompts, answers = zip(*texts, strict=True)
    return Dataset.from_dict({"prompt": list(prompts), "completion": list(answers)})


def trained_like(pilot: PreTrainedModel, config: CopilotConfig | None = None, seed: int = 0) -> CopilotModel:
    """A Copilot whose last map is not zero, so that it changes the text; in eval mode."""
    copilot = copilot_for(pilot, config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        copilot.get_submodule(copilot.last_map).weight.normal_(std=0.3)
        copilot.start.weight.normal_()
    return copilot.eval()


@torch.no_grad()
def teacher_forced(copilot: CopilotModel, pilot: PreTrainedModel, ids: torch.Tensor, prompt_length: int):
    """f of the training path for the tokens after the prompt and the one after `ids` `[n]`: `[n - p + 1, V]`."""
    learner = CopilotLearner(copilot, pilot, log_dtype=torch.float32)
    extended = torch.cat([ids, ids[-1:]])[None]  # the last token only makes position n - 1 a target
    inputs = {"input_ids": extended, "labels": extended.clone()}
    inputs["labels"][:, :prompt_length] = -100
    with learner.observe(inputs):
        pilot(input_ids=extended)
    learner.close()
    (batch,) = learner.forced.batches(learner.round)
    copilot.eval()
    return copilot(**batch.inputs, return_logits=True, lent=learner.forced.lent).logits[0]


def check_every_row(
    copilot: CopilotModel,
    pilot: PreTrainedModel,
    found: list[tuple[int, torch.Tensor, torch.Tensor]],
    labelled: Callable[[int, list[int]], dict[str, list[int]]],
    tolerance: float,
) -> None:
    """Compare f after rows of tokens with that of the training path, where one forward gives it after every beginning
    of a row.

    Args:
        found: Which prompt, a row `[n]` that goes on from it, and f `[V]` after it.
        labelled: A prompt's row for training, with a label after each of its beginnings that is generated.
    """
    keys = {(prompt, *row.tolist()) for prompt, row, _ in found}
    beginnings = {key[:-i] for key in keys for i in range(1, len(key))}
    longest, expected = sorted(keys - beginnings), {}
    with TeacherForced(copilot, pilot) as forced:
        trained = forced.measured([labelled(prompt, row) for prompt, *row in longest], lambda z, f, labels: [f])
    for key, (f,) in zip(longest, trained, strict=True):
        expected |= {key[: len(key) - i]: f[-1 - i] for i in range(len(f))}
    for prompt, row, f in found:
        torch.testing.assert_close(f, expected[prompt, *row.tolist()], rtol=0, atol=tolerance)


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Two models have the same tensors, bit for bit."""
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not different

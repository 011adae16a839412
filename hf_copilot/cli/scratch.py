"""A Pilot from scratch: random weights, and a tokenizer trained on the data."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .chats import AS_TEXT, are_chats


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a padding and an end token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def is_unread(name: str, made: PreTrainedConfig, given: dict[str, Any]) -> bool:
    """Whether a config holds a field that is none of its kind's, and is the same without it."""
    if name not in vars(made) or hasattr(AutoConfig.for_model(given["model_type"]), name):
        return False
    without = AutoConfig.for_model(**{field: value for field, value in given.items() if field != name})
    return made.to_dict() == without.to_dict() | {name: made.to_dict()[name]}


def build_from_scratch(
    config: dict[str, Any], tokenizer_size: int, train: Dataset
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Pilot of a transformers config (with its `model_type`), and a tokenizer trained on prompts and completions."""
    if "model_type" not in config:
        raise ValueError(f"from_config has no model_type ('llama', 't5', ...), only {sorted(config)}.")
    if are_chats(train):
        raise ValueError(f"The rows are chats, and a Pilot from scratch has no chat template: {AS_TEXT}.")
    texts = [prompt + completion for prompt, completion in zip(train["prompt"], train["completion"], strict=True)]
    tokenizer = train_tokenizer(texts, tokenizer_size)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    tokens |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    tokens |= {"decoder_start_token_id": tokenizer.pad_token_id}  # of an encoder-decoder
    if given := tokens.keys() & config.keys():
        raise ValueError(f"from_config has {sorted(given)}, which the tokenizer says; tokenizer_size is its size.")
    try:
        made = AutoConfig.for_model(**config, **tokens)
        unread = [name for name in config if is_unread(name, made, config | tokens)]
    except StrictDataclassError as error:
        raise ValueError(f"from_config makes no {config['model_type']}: {error}") from error
    if unread:
        raise ValueError(f"from_config has what no {config['model_type']} config has: {', '.join(unread)}.")
    auto_class = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_config(made), tokenizer

"""Does this Copilot fit this Pilot, and can it be trained and generate beside it? Rules and error texts, in one place;
those of a whole training are in `training/refusals.py`, of an engine in `serving/refusals.py`."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..model.configuration_copilot import CopilotConfig
from ..model.modeling_copilot import CopilotModel
from ..version import __version__
from .head import PilotHead
from .inspect import find_decoder, find_layers, is_encoder_decoder, is_sharded, unwrap
from .vocabulary import lent_vocabulary

NO_FINGERPRINT = (  # what to do about it
    "set copilot.config.tokenizer_fingerprint = hf_copilot.pilot.compatibility.tokenizer_fingerprint(<the tokenizer "
    "that it was trained with>), which copilot_for(pilot, config, tokenizer) does"
)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> str:
    """`<size>:<SHA-256 of the tokens of the first `size` ids>`, of all by default. Tokens that are added to a
    tokenizer later leave the fingerprint of the first ones as it was."""
    size = len(tokenizer) if size is None else size
    vocabulary = sorted((token, i) for token, i in tokenizer.get_vocab().items() if i < size)
    return f"{size}:{hashlib.sha256(json.dumps(vocabulary, ensure_ascii=False).encode()).hexdigest()}"


def same_vocabulary(tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> bool:
    """Whether the tokens that a fingerprint was taken of have the same ids in this tokenizer."""
    size = int(fingerprint.partition(":")[0])
    return tokenizer_fingerprint(tokenizer, size) == fingerprint


def is_hub_id(name: str) -> bool:
    """Whether a name can be a repository on the Hub, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not os.path.exists(name)


def describe_pilot(config: CopilotConfig, pilot: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write into a Copilot's config what [`check_pilot`] compares and its card names; no folders of this machine."""
    base = unwrap(pilot).config
    if config.init is not None and not is_hub_id(config.init):
        config.init = Path(config.init).name
    config.pilot_model_type = base.get_text_config().model_type
    config.base_model_name_or_path = base.name_or_path if is_hub_id(base.name_or_path) else None
    if tokenizer is not None:
        config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    config.hf_copilot_version = __version__


def check_kind(pilot: nn.Module) -> None:
    """Raise a `NotImplementedError` for a Pilot that is no language model of one piece."""
    base = unwrap(pilot)
    decoder, name = find_decoder(base), type(base).__name__
    if base.main_input_name != "input_ids":
        raise NotImplementedError(
            f"{name} reads {base.main_input_name}, and a Copilot is for models of text: use one that reads input_ids "
            "(T5, FLAN-T5, mT5, BART, or any `...ForCausalLM`)."
        )
    if is_encoder_decoder(base) and decoder.can_generate():
        raise NotImplementedError(
            f"{name} is composed of two models, and its decoder is a whole {type(decoder).__name__} with a head of "
            "its own, which a Copilot can't read: use an encoder-decoder of one piece (T5, FLAN-T5, mT5, BART)."
        )
    if not is_encoder_decoder(base) and base.config.get_text_config() is not base.config:
        raise NotImplementedError(
            f"{name} reads more than text, and gives its decoder embeddings where a Copilot reads token ids: use a "
            "language model alone (AutoModelForCausalLM; for many of these there is a `...ForCausalLM` too)."
        )


def check_pilot(copilot: CopilotModel, pilot: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise if the Copilot can't rectify this Pilot, warn if nobody can tell from here.

    Nothing is said of another depth or fewer bits: there a token Copilot kept its gain at the λ of home
    (docs/moving.md).

    Args:
        copilot: As trained or loaded.
        pilot: The model that it is to rectify; its weights may differ from those that it was trained beside.
        tokenizer: The Pilot's. Needed where the two vocabularies have different numbers of rows (padding rows differ
            within a family); f is 0 in rows that the Copilot does not have.

    Raises:
        ValueError: Another tokenizer, another number of rows without proof that the tokens are the same, another
            hidden size (with `memory="pilot"`), a decoder where it reads an encoder or the other way, a Pilot whose
            decoder, layers or head can't be found, or one that can't lend its vocabulary to a Copilot that uses it
            (`vocab_projection="pilot"`).
        NotImplementedError: If it can't because it is sharded or offloaded, or for a Pilot that is no language model
            of one piece (speech, images, two models in one).

    Warns:
        UserWarning: If the Pilot is of another architecture than the one that the Copilot was trained beside, or the
            Copilot does not know its tokenizer, so that the one given can't be compared with it.
    """
    base = unwrap(pilot)
    check_kind(base)
    check_vocabulary(copilot.config, PilotHead(base).vocab_size, tokenizer)
    if copilot.config.vocab_projection == "pilot":
        lent_vocabulary(base, torch.device("meta"))  # raises where it can't
    _check_states(copilot.config, base)
    check_architecture(copilot.config, base.config.get_text_config().model_type)


def check_architecture(config: CopilotConfig, model_type: str) -> None:
    """Warn if a Pilot is of another architecture than the one that the Copilot was trained beside."""
    if config.pilot_model_type not in (None, model_type):
        warnings.warn(
            f"The Copilot was trained beside a {config.pilot_model_type!r} and the Pilot is a {model_type!r}: choose "
            "λ anew (hf-copilot calibrate), and measure whether it still helps (hf-copilot eval) before you rely on "
            "it.",
            stacklevel=3,
        )


def check_vocabulary(config: CopilotConfig, rows: int, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise a `ValueError` if a Pilot with this many rows of logits, and this tokenizer, gives other ids to tokens
    than the Copilot's, or if nobody can tell; warn if the tokenizer can't be compared."""
    known = config.tokenizer_fingerprint
    same_tokens = tokenizer is not None and known is not None and same_vocabulary(tokenizer, known)
    if tokenizer is not None and known is not None and not same_tokens:
        raise ValueError(
            f"The tokenizer ({len(tokenizer)} tokens) gives other ids than the one that this Copilot was trained with "
            f"({known.partition(':')[0]} tokens), so its corrections would go to the wrong tokens. Use a Pilot of the "
            f"family of {config.base_model_name_or_path or config.pilot_model_type!r}, or train a Copilot beside this "
            "one with CopilotTrainer."
        )
    if rows != config.vocab_size and not same_tokens:
        proof = "prove it with tokenizer=AutoTokenizer.from_pretrained(<the Pilot>)"
        raise ValueError(
            f"The Copilot has {config.vocab_size} vocabulary rows and the Pilot {rows}. If both share one tokenizer, "
            f"{NO_FINGERPRINT + ', and ' if known is None else ''}{proof}; else train a Copilot beside this one."
        )
    if tokenizer is not None and known is None:
        warnings.warn(f"Whether this is the Copilot's tokenizer can't be told: {NO_FINGERPRINT}.", stacklevel=3)


def _check_states(config: CopilotConfig, base: nn.Module) -> None:
    if is_encoder_decoder(base) != config.pilot_is_encoder_decoder:
        kinds = {True: "an encoder-decoder", False: "decoder-only"}
        raise ValueError(
            f"The Pilot is {kinds[is_encoder_decoder(base)]} and the Copilot was trained beside one that is "
            f"{kinds[config.pilot_is_encoder_decoder]}: train a Copilot beside this one."
        )
    if not config.reads_states:
        return
    find_layers(base)  # raises where they can't be found
    hidden_size = base.config.get_text_config().hidden_size
    if hidden_size != config.pilot_hidden_size:
        raise ValueError(
            f"The Copilot reads hidden states of size {config.pilot_hidden_size} and the Pilot's have "
            f"{hidden_size}. Such a Copilot moves between Pilots of one hidden size: train one beside "
            "this one, or one with CopilotConfig(memory='tokens'), which fits every size."
        )


def check_teacher_forced(copilot: CopilotModel, pilot: nn.Module) -> None:
    """[`check_pilot`], and that the Copilot can be trained and scored here.

    Raises:
        NotImplementedError: For a Copilot whose parameters processes share, and for a Pilot whose head is offloaded.
        ValueError: For one with another number of vocabulary rows, be they padding rows of the same tokenizer.
    """
    if is_sharded(copilot):
        raise NotImplementedError(
            "The Copilot is sharded (fully_shard), but each process must hold it whole: where it is too large, "
            "train it with an adapter (copilot_peft_config=LoraConfig(...))."
        )
    head = PilotHead(pilot)
    if head.device.type == "meta":
        raise NotImplementedError(
            "The Pilot's head is offloaded, and its logits can't be recomputed: keep it on a device "
            "(device_map with lm_head on one). Generation works as it is."
        )
    check_rows(copilot.config, head.vocab_size)
    check_pilot(copilot, pilot)


def check_rows(config: CopilotConfig, rows: int) -> None:
    """Raise a `ValueError` where a Copilot has another number of output rows than its Pilot, and can only generate."""
    if config.vocab_size != rows:
        raise ValueError(
            f"The Copilot has {config.vocab_size} output rows and the Pilot {rows}: to learn or be measured it needs "
            "as many. Take a Pilot that has, or build a Copilot with copilot_for(pilot); only generation, "
            "CopilotLogitsProcessor(..., tokenizer=...), takes other padding rows of the same tokenizer. In a trainer "
            "resize the embeddings before it is made."
        )


def check_generation(pilot: nn.Module) -> None:
    """Raise a `NotImplementedError` if a Pilot's `generate` can't be rectified."""
    if has_virtual_tokens(pilot):
        raise NotImplementedError(
            "Rectified generation does not support Pilots with virtual tokens (prompt tuning, prefix tuning, "
            "p-tuning) yet: fine-tune the Pilot with LoRA or in full."
        )


def has_virtual_tokens(pilot: nn.Module) -> bool:
    """Whether the Pilot is trained by prompt, prefix or p-tuning."""
    return isinstance(pilot, PeftModel) and pilot.active_peft_config.is_prompt_learning

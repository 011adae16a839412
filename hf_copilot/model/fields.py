"""Which values each field of a `CopilotConfig` takes: one table, for what a person gives and for what a file holds."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from transformers.activations import ACT2FN

# What is on disk: raised by one when an older hf_copilot could no longer read a Copilot rightly (CONTRIBUTING.md).
FORMAT_VERSION = 1

MOST = sys.float_info.max
LARGEST_SIZE = 2**20  # of a layer, and the number of layers; a product of three stays a number that torch counts to
LARGEST_VOCABULARY = 2**31
QUANTITIES = ("nll", "token_accuracy")  # per labelled token
FIGURES = tuple(f"{who}_{name}" for who in ("pilot", "rectified") for name in QUANTITIES)  # that a card shows
CURVES = ("strengths", *QUANTITIES)  # of a calibration, likewise


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*choices: Any) -> Rule:
    """A value of the same type too: `True` is not 1."""
    return Rule(f"choose one of {choices}", lambda value: any(type(value) is type(c) and value == c for c in choices))


def number(lowest: float = -MOST, highest: float = MOST, words: str = "a finite number") -> Rule:
    return Rule(f"must be {words}", lambda value: is_number(value) and lowest <= value <= highest)


def whole(highest: int, hint: str = "") -> Rule:
    words = f"must be a whole number, at least 1 and at most {highest}{hint}"
    return Rule(words, lambda value: is_whole(value) and 1 <= value <= highest)


def or_none(rule: Rule) -> Rule:
    return Rule(f"{rule.words}, or None", lambda value: value is None or rule.holds(value))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_dtype(value: Any) -> bool:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    return isinstance(found, torch.dtype) and found.is_floating_point


def holds_figures(value: Any) -> bool:
    return isinstance(value, dict) and (not value or all(is_number(value.get(name)) for name in FIGURES))


def holds_curves(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(name), list) for name in CURVES):
        return False
    curves = [value[name] for name in CURVES]
    equal = len({len(curve) for curve in curves}) == 1
    is_named = value.get("metric", "nll") in QUANTITIES and isinstance(value.get("data"), str)
    is_counted = is_whole(value.get("targets")) and is_number(value.get("strength"))
    return equal and is_named and is_counted and all(is_number(figure) for curve in curves for figure in curve)


TEXT = or_none(Rule("must be a text", lambda value: isinstance(value, str)))
FLAG = one_of(False, True)
SIZE = or_none(whole(LARGEST_SIZE))
HEADS = or_none(
    whole(
        LARGEST_SIZE,
        " (where hidden_size is smaller than the number of the Pilot's heads, give num_attention_heads)",
    )
)

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += ("head_dim", "pilot_hidden_size", "vocab_size")

FIELDS: dict[str, Rule] = {
    **dict.fromkeys(SIZES, SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), HEADS),
    "vocab_size": or_none(whole(LARGEST_VOCABULARY)),
    "top_k": whole(LARGEST_VOCABULARY),
    **dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm", "mlp_gated"), FLAG),
    "pilot_is_encoder_decoder": FLAG,
    "tie_word_embeddings": one_of(False),
    "hidden_act": Rule(
        "must be an activation of transformers", lambda value: isinstance(value, str) and value in ACT2FN
    ),
    "rms_norm_eps": number(0.0, 1.0, "a number from 0 to 1"),
    "dropout": number(0.0, 1.0, "a number from 0 to 1"),
    "initializer_range": number(0.0, words="finite and >= 0"),
    "rope_theta": number(sys.float_info.min, words="finite and > 0"),
    "attention_scaling": or_none(number()),
    "strength": number(0.0, words="finite and >= 0 (λ; 0 switches the Copilot off)"),
    "memory": one_of(None, "pilot", "tokens"),
    "position_embedding": one_of(None, "rotary", "none"),
    "pattern": one_of(1, 2),
    "pooled_layers": one_of("all", "first_half", "second_half"),
    "pooling": one_of("mean", "max", "sum"),
    "hidden_state_lag": one_of(0, 1),
    "copilot_input": one_of("both", "discrepancy", "token"),
    "vocab_projection": one_of("own", "pilot"),
    "objective": one_of("cross_entropy", "rmse"),
    "fusion": one_of("logit", "probability"),
    "error_feedback": one_of("realized", "predicted"),
    "format_version": one_of(FORMAT_VERSION),
    **dict.fromkeys(("init", "base_model_name_or_path", "pilot_model_type"), TEXT),
    **dict.fromkeys(("tokenizer_fingerprint", "hf_copilot_version"), TEXT),
    "results": or_none(Rule(f"must hold numbers under the names {FIGURES}", holds_figures)),
    "calibration": or_none(Rule(f"must hold lists of one length under the names {CURVES}", holds_curves)),
    "dtype": or_none(Rule("must be a type of floating-point numbers of torch", is_dtype)),
}


def check_fields(values: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for a value that its field does not take."""
    for name, rule in FIELDS.items():
        if name in values and not rule.holds(values[name]):
            raise ValueError(f"CopilotConfig.{name}={values[name]!r}: {rule.words}.")


def check_spelling(unknown: Iterable[str]) -> None:
    """Raise a `ValueError` for an unknown name that looks like a field's: it would do nothing. Others are of a newer
    hf_copilot or transformers."""
    for name in unknown:
        like = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.75)
        if like:
            raise ValueError(f"CopilotConfig has no field {name!r}: is {like[0]!r} meant?")


def check_names(written: Mapping[str, Any], unknown: Iterable[str]) -> None:
    """Raise a `ValueError` for a field whose name is damaged, so that its value would be lost: one that is lacking,
    and an unknown one that looks like it. Other unknown ones are of a newer hf_copilot or transformers."""
    lacking = [name for name in (*FIELDS, "model_type") if name not in written]
    for name in unknown:
        like = difflib.get_close_matches(name, lacking, n=1, cutoff=0.75)
        if like:
            raise ValueError(f"config.json has no {like[0]!r}, but {name!r}: is the name damaged?")

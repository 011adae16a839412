"""Configuration of a Copilot: its shape, what it reads of the Pilot, how it is trained and fused."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..version import __version__
from .fields import FIELDS, FORMAT_VERSION, check_fields, check_names, check_spelling

# The loss that trains f and the space in which f is added belong together (docs/method.md).
OBJECTIVE_OF_FUSION = {"logit": "cross_entropy", "probability": "rmse"}

STATE_FIELDS = ("pooled_layers", "pooling", "hidden_state_lag")  # which of the Pilot's states are in the memory
PROVENANCE_FIELDS = (  # where a Copilot comes from and how it did; not what it computes or how it is trained
    *("init", "initializer_range", "strength", "results", "calibration"),
    *("base_model_name_or_path", "pilot_model_type", "tokenizer_fingerprint"),
    *("hf_copilot_version", "format_version"),
)


@strict
class CopilotConfig(PreTrainedConfig):
    """Configuration of a [`CopilotModel`].

    Every size that is left at `None` is taken from the decoder whose weights the Copilot starts from (see `init`).
    Any `ValueError` names the field and the values that it takes.

    Parameters:
        init (`str`, *optional*):
            Where the weights come from: `"pilot"` (the Pilot's own decoder), `"random"`, or the path or Hub id of
            another checkpoint of the same vocabulary (a 1B decoder for an 8B Pilot). `None` becomes `"pilot"` where
            the Pilot's block is the Copilot's, and `"random"` elsewhere, when a Copilot is built.
        num_hidden_layers (`int`, *optional*, defaults to `2`):
            Layers of the Copilot, spread evenly over the decoder that it starts from; `None` takes all of them.
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim, hidden_act, rms_norm_eps,
        attention_bias, attention_output_bias, mlp_bias, qk_norm, vocab_size:
            Shape of the decoder block, named as in transformers' Llama family.
        attention_scaling (`float`, *optional*):
            Factor on the scores; `None` is 1 / sqrt(head_dim), T5 has 1.
        mlp_gated (`bool`, defaults to `True`):
            Whether the MLP is W_down (act(W_gate x) * W_up x) or W_down act(W_up x), as in T5.
        dropout (`float`, defaults to `0.1`):
            Dropout on both residual branches of every layer, in training.
        initializer_range (`float`, defaults to `0.02`):
            Standard deviation of random weights.
        memory (`str`, *optional*):
            What cross-attention reads: the `"pilot"`'s states [X̃ ; h] (the paper), or the `"tokens"` so far by the
            Copilot's own embedding. Then it reads nothing of the Pilot but its distribution, and fits every
            decoder-only Pilot of its tokenizer, of whatever size. `None` becomes tokens where they can be, the
            Pilot's states beside an encoder-decoder and with the Pilot's vocabulary, when a Copilot is built.
        position_embedding (`str`, *optional*):
            `"rotary"` turns queries and keys by the positions of their tokens; `"none"` (the paper) leaves positions
            to the Pilot's states, where they are read. `None` becomes rotary beside a decoder, none beside an
            encoder-decoder.
        rope_theta (`float`, defaults to `10000`):
            Base of the rotary angles; where weights are taken over, their source's, without its scaling.
        pilot_hidden_size (`int`, *optional*):
            Width of the Pilot's states in the memory. Where it differs from `hidden_size` one linear layer aligns
            them.
        pilot_is_encoder_decoder (`bool`, defaults to `False`):
            Whether the Pilot has an encoder; set when the Copilot is built for one.
        pattern (`int`, defaults to `1`):
            The paper's Pattern 1 (odd layers self-attention, even layers modified cross-attention; beside an
            encoder-decoder every layer has both) or 2 (modified cross-attention alone in every layer).
        pooled_layers (`str`, defaults to `"all"`):
            Which Pilot layers form h: `"all"`, `"first_half"` or `"second_half"` (the paper's Patterns 3 and 4).
        pooling (`str`, defaults to `"mean"`):
            How these layers are pooled: `"mean"`, `"max"` or `"sum"`.
        hidden_state_lag (`int`, defaults to `1`):
            At position i the Copilot reads h up to i - lag.
        copilot_input (`str`, defaults to `"both"`):
            `"discrepancy"` (the paper's), `"token"` (embedding of the token just read), or the sum of the two.
        vocab_projection (`str`, defaults to `"own"`):
            Whose embedding and output matrix the Copilot uses: its own, or the `"pilot"`'s, with a learned map of
            d_P x d beside each. Then it holds nothing of the size of the vocabulary.
        tie_word_embeddings (`bool`, defaults to `False`):
            No other value: these are two matrices.
        objective, fusion (`str`, default to `"cross_entropy"` and `"logit"`):
            `rmse` (Eq. 7) goes with `probability` (Eq. 8), `cross_entropy` of the fused logits with `logit`.
        error_feedback (`str`, defaults to `"realized"`):
            What the Copilot is fed while generating: the discrepancy of the token really emitted (`"realized"`) or
            its own last prediction (`"predicted"`, Algorithm 2 of the paper; with `objective="rmse"` only).
        top_k (`int`, defaults to `64`):
            Entries of the Pilot's distribution kept in a discrepancy, besides the label. Exact when >= vocabulary.
        strength (`float`, defaults to `1.0`):
            λ, the weight of the correction; finite and >= 0.
        base_model_name_or_path, pilot_model_type, tokenizer_fingerprint, hf_copilot_version:
            What the Copilot was trained beside, and by which version; [`check_pilot`] compares the two in the middle.
        format_version (`int`):
            Of the files that this Copilot is saved as. A Copilot of an older format loads; one of a newer raises.
        results (`dict`, *optional*):
            Last evaluation figures of the run that trained it; shown in the model card.
        calibration (`dict`, *optional*):
            How `strength` was chosen, if it was: NLL and token accuracy at every λ that was tried, and on what.
    """

    model_type = "copilot"

    init: str | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = 2
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scaling: float | None = None
    mlp_gated: bool = True
    dropout: float = 0.1
    initializer_range: float = 0.02

    memory: str | None = None
    position_embedding: str | None = None
    rope_theta: float = 10_000.0
    pilot_hidden_size: int | None = None
    pilot_is_encoder_decoder: bool = False
    pattern: int = 1
    pooled_layers: str = "all"
    pooling: str = "mean"
    hidden_state_lag: int = 1
    copilot_input: str = "both"
    vocab_projection: str = "own"
    objective: str = "cross_entropy"
    fusion: str = "logit"
    error_feedback: str = "realized"
    top_k: int = 64
    strength: float = 1.0

    base_model_name_or_path: str | None = None
    pilot_model_type: str | None = None
    tokenizer_fingerprint: str | None = None
    hf_copilot_version: str | None = None
    format_version: int = FORMAT_VERSION
    results: dict | None = None
    calibration: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        check_spelling(name for name in kwargs if not hasattr(type(self), name))
        super().__post_init__(**kwargs)
        self.check()

    def resolve_defaults(self) -> None:
        """Decide what was left open, by the kind of Pilot, and check all; called when a Copilot is built."""
        if self.memory is None:
            self.memory = "pilot" if self.pilot_is_encoder_decoder or self.vocab_projection == "pilot" else "tokens"
        if self.position_embedding is None:
            self.position_embedding = "none" if self.pilot_is_encoder_decoder else "rotary"
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` for a value that a field does not take, or two that do not go together."""
        check_fields({name: getattr(self, name) for name in FIELDS})
        if OBJECTIVE_OF_FUSION[self.fusion] != self.objective:
            raise ValueError(
                f"objective={self.objective!r} does not go with fusion={self.fusion!r}: train the one that you fuse. "
                "Use objective='cross_entropy' with fusion='logit', or objective='rmse' with fusion='probability'."
            )
        if self.error_feedback == "predicted" and self.objective != "rmse":
            raise ValueError(
                "error_feedback='predicted' feeds f back as a discrepancy, which only objective='rmse' makes of it. "
                "Use error_feedback='realized', or the paper's settings: CopilotConfig.paper()."
            )
        if self.position_embedding == "rotary" and self.pilot_is_encoder_decoder:
            raise ValueError(
                "position_embedding='rotary' has no positions for an encoder's output: use position_embedding='none'."
            )
        if self.memory == "tokens":
            _check_tokens(self)
        _check_heads(self)
        _check_layers(self)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As in transformers; raises a `ValueError` if there is no file, or one that holds no settings."""
        try:
            settings, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, TypeError):
            settings = None
        if not isinstance(settings, dict) or not settings:
            raise ValueError(f"{pretrained_model_name_or_path} has no config.json, or one that holds no settings.")
        return settings, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> CopilotConfig:
        """As in transformers; a Copilot that was built before there was a choice starts from its Pilot, and reads
        states without positions.

        Raises:
            ValueError: If these are the settings of another kind of model, or of a format that is newer than this
                version of hf_copilot, or if a field has a damaged name or a value that makes no sense.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"This is a model of type {kind!r}, not a Copilot. After training the Copilot lies in the run's "
                "folder copilot/: CopilotModel.from_pretrained('<run>/copilot'), or on the Hub "
                "CopilotModel.from_pretrained('<run>', subfolder='copilot')."
            )
        written = config_dict.get("format_version", 0)  # before there was a number
        if type(written) is not int or written < 0:
            raise ValueError(f"format_version={written!r}: no whole number, so config.json is damaged.")
        if written > FORMAT_VERSION:
            raise ValueError(
                f"This Copilot is saved in format {written}, and hf_copilot {__version__} reads formats up to "
                f"{FORMAT_VERSION}: pip install -U hf_copilot."
            )
        is_built = config_dict.get("vocab_size") is not None
        before = {"init": "pilot", "memory": "pilot", "position_embedding": "none"} if is_built else {}
        unknown = {name: value for name, value in before.items() if config_dict.get(name) is None}
        settings = config_dict | unknown | {"format_version": FORMAT_VERSION}
        check_names(config_dict, [name for name in config_dict if not hasattr(cls, name)])
        check_fields(settings)
        return super().from_dict(settings, **kwargs)

    @classmethod
    def paper(cls, **kwargs: Any) -> CopilotConfig:
        """The settings of the paper: all layers of its source, ℓ alone as input, RMSE, Eq. 8, Algorithm 2; Algorithm
        1 is `copilot_steps_per_round=1`.

        The paper's source is a small decoder of the Pilot's family, for a large Pilot too: pass it as `init` (the
        default is the Pilot's own decoder, with all of its layers)."""
        settings: dict[str, Any] = {
            "num_hidden_layers": None,
            "memory": "pilot",
            "position_embedding": "none",
            "copilot_input": "discrepancy",
            "objective": "rmse",
            "fusion": "probability",
            "error_feedback": "predicted",
        }
        return cls(**(settings | kwargs))

    def forget_results(self) -> None:
        """Drop what was measured of weights that are to be trained further, and a λ that was chosen for them."""
        self.results = None
        if self.calibration is not None:
            self.strength, self.calibration = type(self).strength, None

    def differences(self, other: CopilotConfig) -> list[str]:
        """The fields in which two Copilots differ in shape, in what they read or in how they are trained and fused."""
        fields = [name for name in CopilotConfig.__annotations__ if name not in PROVENANCE_FIELDS]
        return [name for name in fields if getattr(self, name) != getattr(other, name)]

    def strength_or_own(self, given: float | None) -> float:
        """λ: the one that is given, or the Copilot's own; raises as [`check_strength`]."""
        return check_strength(self.strength if given is None else given)

    @property
    def reads_states(self) -> bool:
        """Whether the memory is the Pilot's states."""
        return self.memory == "pilot"

    @property
    def attention_types(self) -> list[str]:
        """`"self"`, `"cross"` or `"both"` for every layer: Pattern 1 alternates from `"self"`, or has both in every
        layer beside an encoder-decoder; in Pattern 2 all are `"cross"`."""
        if self.pattern == 2:
            return ["cross"] * self.num_hidden_layers
        if self.pilot_is_encoder_decoder:
            return ["both"] * self.num_hidden_layers
        return ["self" if i % 2 == 0 else "cross" for i in range(self.num_hidden_layers)]


def check_strength(strength: float) -> float:
    """Return λ, or raise a `ValueError` if it is negative or not finite."""
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength={strength}: λ must be finite and >= 0 (0 switches the Copilot off).")
    return strength


def _check_heads(config: CopilotConfig) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise ValueError(
            f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}: every key head "
            "serves as many query heads."
        )
    if config.position_embedding == "rotary" and config.head_dim is not None and config.head_dim % 2:
        raise ValueError(
            f"position_embedding='rotary' turns pairs of dimensions, and head_dim={config.head_dim} is odd: choose "
            "an even one, or position_embedding='none'."
        )


def _check_layers(config: CopilotConfig) -> None:
    minimum = 2 if config.pattern == 1 and not config.pilot_is_encoder_decoder else 1
    if config.num_hidden_layers is not None and config.num_hidden_layers < minimum:
        raise ValueError(
            f"num_hidden_layers={config.num_hidden_layers}: pattern {config.pattern} needs at least {minimum} "
            "(one of self-attention and one of the modified cross-attention; beside an encoder-decoder, with "
            "pilot_is_encoder_decoder=True, one layer has both)."
        )


def _check_tokens(config: CopilotConfig) -> None:
    if config.pilot_is_encoder_decoder:
        raise ValueError(
            "memory='tokens' reads the tokens of one decoder, and the Pilot is an encoder-decoder: use memory='pilot'."
        )
    if config.vocab_projection == "pilot":
        raise ValueError(
            "memory='tokens' reads nothing inside the Pilot, and vocab_projection='pilot' uses its embedding and "
            "head: use vocab_projection='own', or memory='pilot'."
        )
    idle = [name for name in STATE_FIELDS if getattr(config, name) != getattr(CopilotConfig, name)]
    if idle:
        raise ValueError(
            f"{idle} choose the Pilot's states, which memory='tokens', the default, does not read: leave them "
            "out, or use memory='pilot'."
        )

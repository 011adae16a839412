"""What is read of the Pilot: its states through hooks, and its logits through its own head.

The one place with hooks, for training, generation and scoring. Shapes: B rows, T positions of one forward of the
decoder, S of the encoder, d_P the Pilot's hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from .configuration_copilot import CopilotConfig
from .forward_arguments import OF_CROSS_ATTENTION, OF_DECODERS, ForwardArguments

# A compiled forward must look whether there are hooks now: a static cache compiles the Pilot, with or without ours.
torch._dynamo.config.skip_nnmodule_hook_guards = False


@dataclass
class PilotStates:
    """What one forward of the Pilot's decoder showed; every tensor is detached."""

    input_ids: torch.Tensor | None  # [B, T]; None if the forward was given embeddings
    attention_mask: Any  # as the decoder was given it: 2D, 4D, a mapping of these, or None
    past_length: int  # positions that were in the Pilot's cache before
    # X̃ and h, None where the tap reads no layers
    embeddings: torch.Tensor | None = None  # X̃, [B, T, d_P], the input of layer 0; or [B, S, d_P], of the encoder
    encoder_length: int | None = None  # S; None without an encoder
    encoder_attention_mask: torch.Tensor | None = None  # [B, S]; None without an encoder, or without padding
    hidden_states: torch.Tensor | None = None  # h, [B, T, d_P], the pooled outputs of the layers
    last_hidden_state: torch.Tensor | None = None  # [B, T, d_P], the decoder's output
    next_logits: torch.Tensor | None = None  # [B, V], the model's logits at the last position, where it made any

    @property
    def length(self) -> int:
        """T, the positions of this forward."""
        return self.last_hidden_state.shape[1]

    @property
    def positions(self) -> int:
        """B x T, and with an encoder B x S beside it."""
        encoder = 0 if self.encoder_length is None else self.encoder_length
        return len(self.last_hidden_state) * (self.length + encoder)


def unwrap(pilot: nn.Module) -> nn.Module:
    """The language model inside DDP, `torch.compile` and PEFT wrappers."""
    pilot = extract_model_from_parallel(pilot, keep_torch_compile=False)
    return unwrap(pilot.get_base_model()) if isinstance(pilot, PeftModel) else pilot


@contextmanager
def isolated_rng(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Leave the global random state (CPU and every accelerator) as it was; inside, start from `seed` if given."""
    kind = "cuda" if device.type == "cpu" else device.type
    backend = getattr(torch, kind)
    devices = list(range(backend.device_count())) if backend.is_available() else []  # manual_seed seeds them all
    with torch.random.fork_rng(devices, device_type=kind):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def eval_mode(pilot: nn.Module) -> Iterator[None]:
    """The Pilot in eval mode inside, each module as it was afterwards. A quantised one is put into training mode, its
    dropout with it: bitsandbytes repacks it on a CPU for inference, and it could not be trained any more."""
    modes = [(module, module.training) for module in pilot.modules()]
    pilot.train(getattr(unwrap(pilot), "is_quantized", False))
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def is_encoder_decoder(pilot: nn.Module) -> bool:
    """Whether the Pilot, wrapped or not, has an encoder whose output its decoder reads."""
    return getattr(unwrap(pilot).config, "is_encoder_decoder", False)


def find_decoder(pilot: nn.Module) -> nn.Module:
    """The Pilot's decoder, or a `ValueError` if it has none."""
    base = unwrap(pilot)
    if not (hasattr(base, "get_decoder") and base.can_generate()):
        raise ValueError(
            f"{type(base).__name__} has no decoder that generates: use a Pilot that transformers ships as "
            "`...ForCausalLM` or `...ForConditionalGeneration`."
        )
    return base.get_decoder()


def find_layers(pilot: nn.Module) -> nn.ModuleList:
    """The layers of the Pilot's decoder, or a `ValueError` if they can't be found."""
    lists = [child for child in find_decoder(pilot).children() if isinstance(child, nn.ModuleList) and len(child)]
    if len(lists) != 1:
        raise ValueError(
            f"The decoder layers of {type(unwrap(pilot)).__name__} can't be found: expected one non-empty ModuleList "
            f"that holds them, found {len(lists)}. A Copilot that reads tokens does not look for them: "
            "CopilotConfig(memory='tokens', init='random'), with num_hidden_layers of its own."
        )
    return lists[0]


class PilotTap:
    """Reads every forward of the Pilot's decoder while `listen()` is true and hands it to `sink`.

    Hooks on the decoder open and close a window, hooks on its layers collect only inside it, so recomputation under
    gradient checkpointing adds nothing. `open()` and `close()`, or a `with`; removes its own
    handles and no others.

    Args:
        pilot: Any causal LM of transformers, wrapped or not.
        config: Of the Copilot: with `memory="pilot"` its `pooled_layers` form h by its `pooling`; with `"tokens"` no
            layer is read, and no hook is on one.
        sink: Called with the [`PilotStates`] at the end of each forward.
        listen: Asked at the start of each forward.
    """

    def __init__(
        self,
        pilot: nn.Module,
        config: CopilotConfig,
        sink: Callable[[PilotStates], None],
        listen: Callable[[], bool],
    ):
        self.model = unwrap(pilot)
        self.decoder = find_decoder(pilot)
        self.layers = find_layers(pilot) if config.reads_states else nn.ModuleList()
        half = (len(self.layers) + 1) // 2
        parts = {"all": self.layers, "first_half": self.layers[:half], "second_half": self.layers[-half:]}
        self.pooled = parts[config.pooled_layers]
        self.pooling, self.sink, self.listen = config.pooling, sink, listen
        self.handles: list[RemovableHandle] = []
        self.states: PilotStates | None = None  # not None only while a forward that we listen to runs
        self.latest: PilotStates | None = None  # of the forward whose logits are still to come

    def open(self) -> None:
        """Register the hooks, unless they are there.

        Raises:
            NotImplementedError: If the decoder's forward lacks an argument that they read.
        """
        if self.handles:
            return
        self.arguments = ForwardArguments(self.decoder)
        self.arguments.require(OF_DECODERS)
        self.arguments.require_cache()
        if is_encoder_decoder(self.model):
            self.arguments.require(OF_CROSS_ATTENTION)
        first = self.layers[:1] if self.pooled else []
        self.layer_arguments = ForwardArguments(first[0]) if first else None
        self.handles = [
            self.decoder.register_forward_pre_hook(self._open, with_kwargs=True),
            *(layer.register_forward_pre_hook(self._read_embeddings, with_kwargs=True) for layer in first),
            *(layer.register_forward_hook(self._pool) for layer in self.pooled),
            self.decoder.register_forward_hook(self._close, always_call=True),
            self.model.register_forward_hook(self._read_logits),
        ]

    def close(self) -> None:
        """Remove the hooks; the Pilot is as it was. May be called again."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.states, self.latest = [], None, None

    def __enter__(self) -> PilotTap:
        self.open()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __deepcopy__(self, memo: dict) -> PilotTap:
        """A copy of the Pilot (for a moving average, say) has its hooks: there they stay silent, and hold nothing."""
        silent = memo[id(self)] = copy.copy(self)
        silent.listen, silent.sink, silent.states, silent.latest = (lambda: False), None, None, None
        silent.model = silent.decoder = silent.layers = silent.pooled = None
        silent.handles = []
        return silent

    def _open(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        self.states = None
        if not self.listen():
            return
        given = self.arguments.named(args, kwargs)
        past_length = self.arguments.past_length(given)
        self.states = PilotStates(given.get("input_ids"), given.get("attention_mask"), past_length)
        if given.get("encoder_hidden_states") is not None:
            self.states.embeddings = given["encoder_hidden_states"].detach()
            self.states.encoder_length = self.states.embeddings.shape[1]
            self.states.encoder_attention_mask = given.get("encoder_attention_mask")

    def _read_embeddings(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.states is not None and self.states.embeddings is None:
            self.states.embeddings = self.layer_arguments.first(args, kwargs).detach()

    def _pool(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if self.states is None:
            return
        hidden = (output[0] if isinstance(output, tuple) else output).detach()  # [B, T, d_P]
        pooled = self.states.hidden_states
        if pooled is None:
            self.states.hidden_states = hidden.to(torch.float32, copy=True)
        elif self.pooling == "max":
            torch.maximum(pooled, hidden.to(pooled), out=pooled)
        else:
            pooled += hidden.to(pooled.device)

    def _close(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        states, self.states = self.states, None
        if states is None or output is None or (self.pooled and states.hidden_states is None):
            return  # not listening, or the forward failed
        if self.pooled and self.pooling == "mean":
            states.hidden_states /= len(self.pooled)
        states.last_hidden_state = output[0].detach()
        self.latest = states
        self.sink(states)

    def _read_logits(self, model: nn.Module, args: tuple, output: Any) -> None:
        states, self.latest = self.latest, None
        logits = getattr(output, "logits", None)
        if states is not None and logits is not None:
            states.next_logits = logits[:, -1].detach().clone()


def is_sharded(pilot: nn.Module) -> bool:
    """Whether processes share its parameters (FSDP2, `fully_shard`)."""
    return any(isinstance(module, FSDPModule) for module in pilot.modules())


class PilotEmbedding:
    """X̃ from token ids, for a Pilot whose embedding matrix is frozen: then the log need not hold X̃."""

    def __init__(self, pilot: nn.Module):
        self.pilot = unwrap(pilot)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[...]` int64 -> `[..., d_P]`, past every hook of the module (NEFTune's noise, for one)."""
        weight = self.pilot.get_input_embeddings().weight.detach()
        return F.embedding(input_ids.to(weight.device), weight)

    def gives(self, embeddings: torch.Tensor, input_ids: torch.Tensor) -> bool:
        """Whether these token ids will give exactly this X̃ from now on: nothing trains the matrix, and layer 0 is fed
        its rows as they are (no positions, scale or noise on top). Never where the Pilot is sharded: the matrix would
        have to be gathered for every draw."""
        module = self.pilot.get_input_embeddings()
        if not isinstance(module, nn.Embedding) or module.weight.requires_grad or is_sharded(self.pilot):
            return False
        own = self(input_ids)
        return own.shape == embeddings.shape and torch.equal(own.to(embeddings.device), embeddings)


class PilotHead:
    """z = softcap(scale * (W_P x + b)) + c: the Pilot's logits from its decoder's output, as the model makes them.

    Knows the scalings that TRL's fused head knows, T5's, and BART's bias c; [`check`] compares with the model's own
    logits.
    """

    def __init__(self, pilot: nn.Module):
        self.trained, self.pilot = extract_model_from_parallel(pilot, keep_torch_compile=False), unwrap(pilot)
        if self.pilot.get_output_embeddings() is None:
            raise ValueError(f"{type(self.pilot).__name__} has no output head (`get_output_embeddings()` is None).")
        config = self.pilot.config.get_text_config()
        self.scale = _logit_scale(config)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.whole: dict[str, torch.Tensor] = {}  # the head's parameters inside `gathered`

    @property
    def device(self) -> torch.device:
        return self.pilot.get_output_embeddings().weight.device

    @property
    def vocab_size(self) -> int:
        return self.pilot.get_output_embeddings().weight.shape[0]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., d_P]` -> z `[..., V]` float32, without gradient."""
        head, device = self.pilot.get_output_embeddings(), hidden.device
        weight = self.whole.get("weight", head.weight)  # [V, d_P]
        with torch.no_grad():
            hidden = hidden.to(weight.device, weight.dtype)
            sharded = isinstance(head, FSDPModule) or self.whole  # a call would open its group without a backward
            logits = (F.linear(hidden, weight, self.whole.get("bias", head.bias)) if sharded else head(hidden)).float()
            if self.scale != 1.0:
                logits = logits * self.scale
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            bias = getattr(self.pilot, "final_logits_bias", None)  # [1, V]
            if bias is not None:
                logits = logits + bias.to(logits)
        return logits.to(device)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold the whole head inside the block where processes share it (FSDP2): every process must enter. Right
        after a forward it usually is whole, and nothing is sent.

        Raises:
            NotImplementedError: For a sharded head with an adapter.
        """
        parameters = dict(self.pilot.get_output_embeddings().named_parameters())
        if not parameters.keys() <= {"weight", "bias"} and is_sharded(self.pilot):
            raise NotImplementedError(
                "The Pilot is sharded and its head has an adapter, which can't be gathered: leave lm_head out of "
                "target_modules and modules_to_save, or use DDP."
            )
        self.whole = {name: value.full_tensor() for name, value in parameters.items() if isinstance(value, DTensor)}
        try:
            yield
        finally:
            self.whole = {}

    def check(self) -> None:
        """Compare with the model's own logits on a few tokens: forked random state; eval mode, unless quantised.

        Raises:
            ValueError: If they differ by more than 2 % of the largest logit.
        """
        pilot, caught = self.trained, []
        device = self.pilot.get_input_embeddings().weight.device
        input_ids = torch.arange(8, device=device)[None] % self.vocab_size  # [1, 8]
        inputs = {"input_ids": input_ids}
        if is_encoder_decoder(pilot):
            inputs["decoder_input_ids"] = input_ids
        handle = find_decoder(pilot).register_forward_hook(lambda module, args, output: caught.append(output[0]))
        try:
            with torch.no_grad(), isolated_rng(device), eval_mode(pilot):
                expected = pilot(**inputs, use_cache=False).logits.float()  # [1, 8, V]
        finally:
            handle.remove()
        with self.gathered():
            found = self(caught[0]).to(expected.device)  # [1, 8, V]
        error, largest = (found - expected).abs().max().item(), expected.abs().max().item()
        if not error <= 0.02 * largest + 1e-6:
            raise ValueError(
                f"The logits of {type(self.pilot).__name__} can't be recomputed from its decoder's output and head: "
                f"they differ by {error:.3g} (largest logit {largest:.3g}). It scales or caps them in a way that "
                "hf_copilot does not know; please report the model."
            )


def _logit_scale(config: Any) -> float:
    """The factor on the head's output: T5 by its width; Cohere, MPT, Muse Glimmer, Falcon-H1; Granite and MiniCPM3
    divide by theirs."""
    if getattr(config, "scale_decoder_outputs", False):
        return config.d_model**-0.5
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return scale
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling

"""What a user is told: five lines when training starts, one after its first rounds, a table when it ends."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..model.configuration_copilot import CopilotConfig
from ..model.fields import FIGURES
from .learner import CopilotLearner
from .metrics import results_at_chosen
from .preflight import MEASURED, Stopwatch, checkpoint_bytes, in_words, log_bytes, memory_bytes

logger = logging.get_logger(__name__)

SHOWN = {"nll": ("NLL per token", ".4f"), "token_accuracy": ("token accuracy", ".1%")}  # of `QUANTITIES`


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    return model.num_parameters(), model.num_parameters(only_trainable=True)


def size_of(parameter: nn.Parameter) -> int:
    """Its numbers, counted as by `num_parameters`, which is of whole models alone: bitsandbytes packs two of 4 bits
    into a byte of its storage."""
    packed = 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else 1
    return parameter.numel() * packed


def in_idle_experts(model: PreTrainedModel) -> int:
    """Parameters of the experts that a token is not sent to."""
    active = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or math.inf
    experts = [p for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]  # [experts, ...] each
    return sum(size_of(p) - size_of(p) * active // len(p) for p in experts if active < len(p))


def multiplied_parameters(model: PreTrainedModel) -> int:
    """Parameters that a generated token is multiplied with: all but the encoder, the other experts, and the input
    embedding, unless the head shares it; of a Copilot that uses its Pilot's head, that head too."""
    if model.get_output_embeddings() is None:
        return count_parameters(model)[0] + model.config.vocab_size * model.config.pilot_hidden_size
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    count = count_parameters(model)[0] - (0 if head is embedding else embedding.numel()) - in_idle_experts(model)
    if getattr(model.config, "is_encoder_decoder", False):
        own = {id(parameter) for parameter in model.get_decoder().parameters()} | {id(head)}
        count -= sum(size_of(p) for p in model.get_encoder().parameters() if id(p) not in own)
    return count


def show(renderable: Any) -> None:
    """Print it. No run ends for a failure to print."""
    try:
        _print(renderable)
    except (OSError, ValueError) as error:  # a closed pipe or file
        logger.warning(f"What the Copilot has to say could not be printed: {error}.")


def _print(renderable: Any) -> None:
    """With a question mark for what the encoding lacks."""
    console = Console()
    try:
        console.print(renderable, highlight=False, markup=False)
    except UnicodeEncodeError:
        with console.capture() as text:
            console.print(renderable, highlight=False, markup=False)
        console.file.write(text.get().encode(console.encoding, "replace").decode(console.encoding))


def describe_start(learner: CopilotLearner) -> str:
    """Sizes of both models, in memory and on disk, the log's bounds, and the cost to expect by the weights."""
    pilot, copilot, log = learner.head.pilot, learner.copilot, learner.log
    (pilot_all, pilot_trained), (own_all, own_trained) = count_parameters(pilot), count_parameters(copilot)
    share = multiplied_parameters(copilot) / multiplied_parameters(pilot)
    return "\n".join(
        [
            f"Pilot: {pilot_all / 1e6:,.1f}M parameters, {pilot_trained / 1e6:,.1f}M trained.",
            f"Copilot: {own_all / 1e6:,.1f}M parameters, {own_trained / 1e6:,.1f}M trained; first weights: "
            f"{first_weights(copilot.config)}.",
            f"Mistake Log: {log.max_rounds} rounds, at most {log.max_bytes / 1e6:,.0f} MB.",
            f"Memory of the Copilot: {in_words(memory_bytes(copilot))} (weights, gradients, AdamW), and activations. "
            f"In each checkpoint: {in_words(checkpoint_bytes(learner))}, and the Mistake Log.",
            f"Expected extra time: {share:.0%} of the Pilot's per generated token, {share:.0%} times the share of "
            "labelled tokens per training step.",
        ]
    )


def describe_rounds(learner: CopilotLearner, watch: Stopwatch) -> str:
    """What the first rounds took, and the log's size to expect from them."""
    return (
        f"Measured in {MEASURED} rounds: the Copilot takes {watch.share:.0%} of the Pilot's time on top. The Mistake "
        f"Log will take {in_words(log_bytes(learner))} when it is full, in memory and in each checkpoint."
    )


def first_weights(config: CopilotConfig) -> str:
    """What they were taken from."""
    if config.init == "pilot":
        return "the Pilot's own layers"
    if config.init in (None, "random"):
        return "random weights"
    return config.init


def table_of_training(
    log_history: Sequence[dict[str, float]], log_megabytes: float, calibration: dict[str, Any] | None = None
) -> Table | None:
    """The last figures of Pilot and Pilot + Copilot, in training and in evaluation, and at the λ that was chosen; None
    if there are none."""
    table = Table(title=f"Pilot and Copilot, last figures (Mistake Log: {log_megabytes:,.0f} MB)")
    for column in ("", "Pilot", "Pilot + Copilot"):
        table.add_column(column, justify="right" if column else "left")
    for where, prefix in prefixes_of(log_history).items():
        last = [entry for entry in log_history if f"{prefix}rectified_nll" in entry][-1]
        add_figures(table, where, {name: last[prefix + name] for name in FIGURES})
    if calibration is not None:
        on = f"{calibration['targets']:,} tokens of {calibration['data']}"
        add_figures(table, f"λ = {calibration['strength']:g}, chosen on {on}", results_at_chosen(calibration))
    return table if table.row_count else None


def prefixes_of(log_history: Sequence[dict[str, float]]) -> dict[str, str]:
    """Where figures were measured, and what stands before their names: in training, on the evaluation set, or on each
    of several."""
    names = {name for entry in log_history for name in entry if name.endswith("rectified_nll")}
    found = {}
    for prefix in sorted(name.removesuffix("rectified_nll") for name in names):
        if not prefix:
            found["training, before learning"] = prefix
        elif prefix == "eval_":
            found["evaluation"] = prefix
        elif prefix.startswith("eval_"):
            found[f"evaluation, {prefix[len('eval_') : -1]}"] = prefix
    return found


def add_figures(table: Table, where: str, found: Mapping[str, float]) -> None:
    for quantity, (title, form) in SHOWN.items():
        figures = (format(found[f"{who}_{quantity}"], form) for who in ("pilot", "rectified"))
        table.add_row(f"{title} ({where})", *figures)


def cost_since(start: float) -> str:
    """The time since `perf_counter()` was `start`, and the most memory that was in use: of the GPU, or of the process
    (where the system is Linux)."""
    minutes, seconds = divmod(round(perf_counter() - start), 60)
    text = f"{minutes} min {seconds} s"
    if torch.cuda.is_available():
        return f"{text}, at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of the GPU's memory"
    if sys.platform != "linux":
        return text
    import resource  # not on Windows

    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{text}, at most {1024 * kibibytes / 1e9:.1f} GB of memory"

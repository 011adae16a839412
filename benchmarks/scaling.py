"""What a Copilot would cost beside large Pilots, on paper: counted operators, FLOPs and bytes, at a GPU's speeds.

    python -m benchmarks.scaling      # writes benchmarks/results/scaling.json and docs/scaling.png

A part of a step takes the longest of three times: launching its operators, its FLOPs, its bytes. Operators are counted
on small models of two and of four layers, and are a line in the layers. What launching takes is from one measured run
of the Pilot alone (H100, shape of Llama-3.2-1B); the Copilot of that run is what the model is checked by. Nothing here
is measured on a Pilot of more than 1B parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from trl.trainer.utils import add_fused_lm_head

from benchmarks.common import RESULTS, table
from benchmarks.cost import PAPER, SHAPES, SMALL_DECODER
from benchmarks.counting import SHAPE, Count, documents, token
from hf_copilot import CopilotConfig, CopilotLearner, copilot_for

# one H100, as measured with benchmarks/cost.py (docs/costs.md), and launches counted by a profiler
STEP_S, TOKEN_S = 0.26, 0.0188  # of the Pilot alone: 4 micro-batches of 4 x 256 tokens; batch 1
THEN = {"launches of a step": 16_700, "step_s": 1.88 * STEP_S, "launches of a token": 964, "token_s": 0.0341 - 0.0198}
MEASURED = {"llama-3.2-1b": {"training": 3.05, "generation": 1.73}}  # by the code of then, see THEN
PEAK, BANDWIDTH, GATHERED = 989e12 * 0.4, 3.35e12 * 0.8, 50e9  # FLOP/s in bf16, bytes/s of memory and between nodes
IN_GRAPH_S = 2e-6  # of one operator among the launches of a CUDA graph
ROWS, LENGTH, MICRO_BATCHES, LABELLED, STEPS = 4, 256, 4, 10, 4

SHAPES = {name: shape for name, shape in SHAPES.items() if name != "cpu"} | {
    "llama-3.1-70b": SHAPES["llama-3.1-8b"]
    | {"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "num_hidden_layers": 80}
}
PAPERS_COPILOT = SMALL_DECODER | {"head_dim": 64, "num_hidden_layers": 16}


class Kind(NamedTuple):
    """A Copilot: the paper's small decoder with LoRA and one step in a round, or the default."""

    title: str
    is_papers: bool
    memory: str
    steps: int


KINDS = (
    Kind("the paper's 1B, states, one step", True, "pilot", 1),
    Kind("default, two layers, four steps", False, "tokens", STEPS),
)


# ---- operators ------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A count at any number of layers."""

    base: float
    slope: float

    def at(self, layers: int) -> float:
        return self.base + self.slope * layers


def line(count: Callable[[int], float]) -> Line:
    few, more = count(2), count(4)
    return Line(few - (more - few), (more - few) / 2)


def small_pilot(layers: int) -> PeftModel:
    torch.manual_seed(0)
    pilot = LlamaForCausalLM(LlamaConfig(**(SHAPE | {"num_hidden_layers": layers})))
    add_fused_lm_head(pilot, outputs=("log_probs", "entropy", "is_top1"))
    return get_peft_model(pilot.to(torch.bfloat16), LoraConfig(task_type="CAUSAL_LM", r=4))


def of_pilot(layers: int) -> int:
    """Forward and backward of one micro-batch."""
    pilot, batch = small_pilot(layers).train(), documents(4)
    with Count() as count:
        with torch.autocast("cpu", torch.bfloat16):
            loss = pilot(**batch, fused_lm_head=True).loss
        loss.backward()
    return count.operators


def small_learner(kind: Kind, pilot_layers: int, layers: int) -> tuple[PeftModel, CopilotLearner]:
    pilot = small_pilot(pilot_layers).train()
    config = CopilotConfig(memory=kind.memory, init="random", num_hidden_layers=layers)
    adapter = LoraConfig(r=4, target_modules="all-linear") if kind.is_papers else None
    settings = {"steps_per_round": 1, "autocast_dtype": torch.bfloat16, "peft_config": adapter}
    return pilot, CopilotLearner(copilot_for(pilot, config), pilot, 4, **settings)


def of_copilot(kind: Kind, pilot_layers: int, layers: int) -> tuple[int, int]:
    """The learner's look at one micro-batch, and one step."""
    pilot, learner = small_learner(kind, pilot_layers, layers)
    for _ in range(2):  # a second step has what the first one makes
        batch = documents(4)  # autocast keeps casts until its block ends
        with torch.autocast("cpu", torch.bfloat16), Count() as alone:
            pilot(**batch, fused_lm_head=True)
        with torch.autocast("cpu", torch.bfloat16), Count() as look, learner.observe(batch):
            pilot(**batch, fused_lm_head=True)
        with Count() as step:
            learner.step()
    learner.close()
    return look.operators - alone.operators, step.operators


def of_token(kind: Kind | None, layers: int, recorded: bool = False) -> float:
    """One more token: of a Pilot with so many layers, or what a Copilot with so many adds, beside its CUDA graph where
    that is recorded."""
    pilot = small_pilot(layers if kind is None else 2).eval()
    alone = token(pilot, None, rows=1)[0]
    if kind is None:
        return alone
    copilot = copilot_for(pilot, CopilotConfig(memory=kind.memory, init="random", num_hidden_layers=layers))
    return token(pilot, copilot.to(torch.bfloat16), rows=1, recorded=recorded)[0] - alone


@cache
def lines(kind: Kind | None) -> dict[str, Line]:
    if kind is None:
        return {"step": line(of_pilot), "token": line(lambda layers: of_token(None, layers))}
    return {
        "look": line(lambda layers: of_copilot(kind, layers, 2)[0]),
        "step": line(lambda layers: of_copilot(kind, 2, layers)[1]),
        "token": line(lambda layers: of_token(kind, layers)),
        "token beside a graph": line(lambda layers: of_token(kind, layers, recorded=True)),
    }


# ---- FLOPs and bytes ------------------------------------------------------------------------------------------------


def block_parameters(shape: dict[str, Any]) -> int:
    """Of all layers."""
    size, head = shape["hidden_size"], shape.get("head_dim", 128)
    attention = size * head * 2 * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    return shape["num_hidden_layers"] * (attention + 3 * size * shape["intermediate_size"])


def copilot_shape(kind: Kind, pilot: dict[str, Any]) -> dict[str, Any]:
    return PAPERS_COPILOT if kind.is_papers else pilot | {"num_hidden_layers": 2}


def copilot_flops(kind: Kind, pilot: dict[str, Any], documents: int, length: int, labelled: int) -> float:
    """One step, forward and backward: blocks and head at the queries, keys and values of the memory, attention; z."""
    shape, vocabulary = copilot_shape(kind, pilot), pilot["vocab_size"]
    queries, entries = documents * labelled, documents * length * (2 if kind.memory == "pilot" else 1)
    size, heads = shape["hidden_size"], shape["num_key_value_heads"] * shape.get("head_dim", 128)
    crosses = shape["num_hidden_layers"] // 2
    blocks = 6 * block_parameters(shape) * queries
    memory = 6 * crosses * ((entries - queries) * 2 * heads * size + 2 * queries * entries / documents * size)
    return blocks + memory + (6 * size + 2 * pilot["hidden_size"]) * queries * vocabulary


def trained_parameters(kind: Kind, pilot: dict[str, Any]) -> float:
    """Two vocabulary matrices, and the blocks or their adapters of rank 32."""
    shape = copilot_shape(kind, pilot)
    matrices = 2 * pilot["vocab_size"] * shape["hidden_size"]
    return matrices + (0.02 if kind.is_papers else 1.0) * block_parameters(shape)


# ---- times ----------------------------------------------------------------------------------------------------------


@cache
def launch_s() -> dict[str, float]:
    """Of one operator, from what the Pilot alone took."""
    layers, counted = SHAPES["llama-3.2-1b"]["num_hidden_layers"], lines(None)
    return {
        "step": STEP_S / (MICRO_BATCHES * counted["step"].at(layers)),
        "token": TOKEN_S / counted["token"].at(layers),
    }


def pilot_step(shape: dict[str, Any], length: int = LENGTH) -> float:
    return max(launches_and_work(shape, length))


def launches_and_work(shape: dict[str, Any], length: int = LENGTH) -> tuple[float, float]:
    """With an adapter there is no gradient of the weights: four FLOPs for each of them and token, and attention."""
    layers, positions = shape["num_hidden_layers"], ROWS * MICRO_BATCHES * length
    launched = MICRO_BATCHES * lines(None)["step"].at(layers) * launch_s()["step"]
    head = shape["vocab_size"] * shape["hidden_size"]
    attention = 6 * positions * length * layers * shape["num_attention_heads"] * shape.get("head_dim", 128)
    return launched, (4 * positions * (block_parameters(shape) + head) + attention) / PEAK


def copilot_step(
    kind: Kind, pilot: dict[str, Any], compiled: bool, length: int = LENGTH, labelled: int = LABELLED
) -> dict[str, float]:
    """Of a whole round: the log, forward and backward, AdamW (weights, gradients, two moments: seven float32)."""
    counted, layers = lines(kind), copilot_shape(kind, pilot)["num_hidden_layers"]
    documents = ROWS * MICRO_BATCHES
    look = MICRO_BATCHES * counted["look"].at(pilot["num_hidden_layers"]) * launch_s()["step"]
    inside, outside = counted["step"].slope * layers, counted["step"].base
    launched = outside * launch_s()["step"] + inside * (IN_GRAPH_S if compiled else launch_s()["step"])
    work = copilot_flops(kind, pilot, documents, length, labelled) / PEAK
    return {
        "log": look,
        "forward and backward": kind.steps * max(launched, work),
        "optimizer": kind.steps * 7 * 4 * trained_parameters(kind, pilot) / BANDWIDTH,
    }


def step_beside(kind: Kind, pilot: dict[str, Any]) -> float:
    """Pilot and compiled Copilot, whose round has a stream of its own, at best: no launch waits for the GPU, and what
    it does of both takes as long as one after the other."""
    launched, work = launches_and_work(pilot)
    counted, compiled = lines(kind)["step"], copilot_step(kind, pilot, compiled=True)
    graph = counted.slope * copilot_shape(kind, pilot)["num_hidden_layers"] * IN_GRAPH_S
    flops = copilot_flops(kind, pilot, ROWS * MICRO_BATCHES, LENGTH, LABELLED)
    launched += compiled["log"] + kind.steps * counted.base * launch_s()["step"]
    work += kind.steps * max(graph, flops / PEAK) + compiled["optimizer"]
    return max(launched, work)


def pilot_token(shape: dict[str, Any]) -> float:
    """Batch 1: every weight is read, in bf16."""
    launched = lines(None)["token"].at(shape["num_hidden_layers"]) * launch_s()["token"]
    weights = block_parameters(shape) + shape["vocab_size"] * shape["hidden_size"]
    return max(launched, 2 * weights / BANDWIDTH)


def copilot_token(kind: Kind, pilot: dict[str, Any], compiled: bool) -> float:
    shape, counted = copilot_shape(kind, pilot), lines(kind)
    operators = counted["token"].at(shape["num_hidden_layers"])
    launches = counted["token beside a graph"].at(shape["num_hidden_layers"]) if compiled else operators
    launched, in_graph = launches * launch_s()["token"], (operators - launches) * IN_GRAPH_S
    read = 2 * (block_parameters(shape) + pilot["vocab_size"] * shape["hidden_size"]) / BANDWIDTH
    is_beside = compiled and kind.memory == "tokens"  # replayed while the Pilot's operators are launched
    return max(launched + (0 if is_beside else in_graph), read)


# ---- tables ---------------------------------------------------------------------------------------------------------


def overheads() -> Iterator[dict[str, Any]]:
    for name, shape in SHAPES.items():
        alone, one = pilot_step(shape), pilot_token(shape)
        for kind in KINDS:
            eager, graphs = (sum(copilot_step(kind, shape, compiled).values()) for compiled in (False, True))
            paper = PAPER.get(name, {}) if kind.is_papers else {}
            yield {
                "pilot": name,
                "copilot": kind.title,
                "pilot_step_s": alone,
                "training": 1 + eager / alone,
                "training_compiled": 1 + graphs / alone,
                "training_beside": step_beside(kind, shape) / alone,
                "training_paper": paper.get("training"),
                "pilot_token_ms": 1e3 * one,
                "generation": 1 + copilot_token(kind, shape, False) / one,
                "generation_compiled": 1 + copilot_token(kind, shape, True) / one,
                "generation_paper": paper.get("generation"),
                "trained_gb": 16 * trained_parameters(kind, shape) / 1e9,
                "exchange_s": 2 * 4 * trained_parameters(kind, shape) * kind.steps / GATHERED,
            }


def long_documents(name: str = "llama-3.1-8b") -> Iterator[dict[str, Any]]:
    """16 documents in a step, ten tokens of each labelled, or all, compiled; and the rounds that the log holds within
    its default bound: h in bf16, since with an adapter the tokens give X̃, or token ids."""
    shape = SHAPES[name]
    for length in (256, 2048, 16_384, 131_072):
        alone = pilot_step(shape, length)
        for kind in KINDS:
            some, whole = (
                sum(copilot_step(kind, shape, True, length, labelled).values()) for labelled in (LABELLED, length)
            )
            width = 2 * shape["hidden_size"] if kind.memory == "pilot" else 8
            yield {
                "length": length,
                "copilot": kind.title,
                "training_some_labelled": 1 + some / alone,
                "training_all_labelled": 1 + whole / alone,
                "rounds_in_log": min(128.0, 2**30 / (ROWS * MICRO_BATCHES * length * width)),
            }


def check() -> dict[str, float]:
    """The measured Copilot of then, by what launching takes the Pilot."""
    return {
        "launch_us_step": 1e6 * launch_s()["step"],
        "launch_us_token": 1e6 * launch_s()["token"],
        "step_s_predicted": THEN["launches of a step"] * launch_s()["step"],
        "step_s_measured": THEN["step_s"],
        "token_ms_predicted": 1e3 * THEN["launches of a token"] * launch_s()["token"],
        "token_ms_measured": 1e3 * THEN["token_s"],
    }


def picture(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    billions = {name: block_parameters(shape) / 1e9 for name, shape in SHAPES.items()}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, work in zip(axes, ("training", "generation"), strict=True):
        for kind, color in zip(KINDS, ("tab:orange", "tab:blue"), strict=True):
            own = [row for row in rows if row["copilot"] == kind.title]
            sizes = [billions[row["pilot"]] for row in own]
            for suffix, style, title in (("", "--", "eager"), ("_compiled", "-", "compiled")):
                values = [row[work + suffix] - 1 for row in own]
                axis.plot(sizes, values, style, color=color, label=f"{kind.title}: {title}, predicted")
        papers = {billions[name]: found[work] - 1 for name, found in PAPER.items()}
        axis.plot(papers.keys(), papers.values(), "k^", label="the paper, A100")
        ours = {billions[name]: found[work] - 1 for name, found in MEASURED.items()}
        axis.plot(ours.keys(), ours.values(), "ro", label="the paper's 1B: measured on an H100, earlier code")
        axis.set(
            ylim=(1e-3, 4), xscale="log", yscale="log", title=work, xlabel="the Pilot's layers, billions of parameters"
        )
    axes[0].set_ylabel("time beyond the Pilot's own")
    axes[1].legend(frameon=False, fontsize=7, loc="lower left")
    figure.savefig(RESULTS.parent.parent / "docs" / "scaling.png", dpi=120)
    plt.close(figure)


def main() -> None:
    logging.set_verbosity_error()
    rows, documents_rows, checked = list(overheads()), list(long_documents()), check()
    counted = {"pilot": lines(None)} | {kind.title: lines(kind) for kind in KINDS}
    counts = {name: {part: found._asdict() for part, found in parts.items()} for name, parts in counted.items()}
    found = {"check": checked, "operators": counts, "overheads": rows, "long_documents": documents_rows}
    (RESULTS / "scaling.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    picture(rows)
    print(table([checked]), table(rows), table(documents_rows), sep="\n\n")


if __name__ == "__main__":
    main()

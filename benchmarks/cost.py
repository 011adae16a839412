"""What a Copilot costs: training step and generated token, as ratios to the Pilot alone, all arms on the same work.

    python -m benchmarks.cost                                  # CPU shape, writes benchmarks/results/cost_cpu.json
    python -m benchmarks.cost --device cuda --shape llama-3.2-1b
    python -m benchmarks.cost --device cuda --shape llama-3.2-1b --quick eager  # within two minutes: compiles nothing
    python -m benchmarks.cost --device cuda --shape llama-3.2-1b --quick        # what is compiled as well

Random weights in the exact shapes: timing needs no pretrained ones. Each repetition times the one Pilot alone and with
every Copilot, in turn from the first and from the last, so that a slow minute of the machine hits all; ratios are
medians over the repetitions' ratios, beside the least and the largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging
from trl.trainer.utils import add_fused_lm_head

from benchmarks.common import RESULTS, Stopwatch, device_name, table
from benchmarks.counting import Count
from hf_copilot import CopilotArguments, CopilotConfig, CopilotLearner, CopilotLogitsProcessor, copilot_for
from hf_copilot.pilot.inspect import unwrap
from hf_copilot.training.report import multiplied_parameters

LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "head_dim": 128}
SMALL_DECODER = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES = {
    "cpu": {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "llama-3.2-1b": LLAMA_3 | SMALL_DECODER | {"head_dim": 64, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "llama-3.2-3b": LLAMA_3
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
MEMORIES = ("tokens", "pilot")  # the token Copilot, which is the default, and the state Copilot
PAPER = {  # Figure 5: whole fine-tuning and inference time with a 1B Copilot, A100
    "llama-3.2-1b": {"training": 1.065, "generation": 1.079},
    "llama-3.2-3b": {"training": 1.033, "generation": 1.047},
    "llama-3.1-8b": {"training": 1.019, "generation": 1.022},
}


Batch = dict[str, torch.Tensor]


class Copilot(NamedTuple):
    """One that is timed: its steps in a round, what it reads, and its size: two layers that are trained in full, as
    `CopilotConfig()` has, or the paper's small decoder with LoRA; whether it is compiled: in training its blocks, in
    generation its step, as a CUDA graph; and whether its rounds have a CUDA stream of their own."""

    steps: int
    memory: str
    size: str = "default"
    compiled: bool = False
    own_stream: bool = False


STEPS = CopilotArguments.copilot_steps_per_round
PAPERS = Copilot(1, "pilot", "decoder")  # the paper takes one step
DEFAULTS = tuple(Copilot(STEPS, memory) for memory in MEMORIES)
COMPILED = tuple(copilot._replace(compiled=True) for copilot in (PAPERS, *DEFAULTS))
BESIDE = tuple(copilot._replace(own_stream=True) for copilot in COMPILED[:2])
QUICK = {"eager": (PAPERS, DEFAULTS[0]), "compiled": (PAPERS, COMPILED[0], BESIDE[0], DEFAULTS[0], COMPILED[1])}
COPILOTS = (PAPERS, *DEFAULTS, *COMPILED, *BESIDE, Copilot(STEPS, "tokens", "decoder"))
COPILOTS_OF_CPU = (Copilot(1, "pilot"), *DEFAULTS)


@dataclass(frozen=True)
class Work:
    """One optimizer step: `accumulate` micro-batches of `rows` sequences; the last `labelled` tokens have labels."""

    labelled: int
    rows: int
    accumulate: int
    length: int = 256

    def batches(self, vocab_size: int, device: str) -> list[Batch]:
        sizes = (vocab_size, self.rows, self.length, self.labelled, device)
        return [make_batch(*sizes) for _ in range(self.accumulate)]


def make_pilot(shape: str, device: str) -> PreTrainedModel:
    """The Pilot: a small one in full, or with the paper's LoRA r 32 in bf16."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device(device):
        pilot = LlamaForCausalLM(config)
    add_fused_lm_head(pilot, outputs=("log_probs", "entropy", "is_top1"))  # the Pilot's loss as SFTTrainer has it
    if shape == "cpu":
        return pilot
    return get_peft_model(pilot.to(torch.bfloat16), LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64))


def copilot_config(memory: str, size: str) -> CopilotConfig:
    if size == "default":
        return CopilotConfig(memory=memory)
    decoder = SMALL_DECODER | {"head_dim": 64, "hidden_act": "silu", "num_hidden_layers": 16}
    return CopilotConfig(init="random", memory=memory, **decoder)


def make_batch(vocab_size: int, rows: int, length: int, labelled: int, device: str) -> Batch:
    """Random tokens; the last `labelled` of every row carry labels."""
    ids = torch.randint(3, vocab_size, (rows, length), device=device)
    labels = ids.clone()
    labels[:, : length - labelled] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


class TrainingArms:
    """Optimizer steps of one Pilot, alone and with each of several Copilots; hooks are there in its turn alone."""

    def __init__(self, shape: str, device: str, copilots: Sequence[Copilot]):
        self.pilot = make_pilot(shape, device)
        self.pilot.train()
        self.watch, self.device = Stopwatch(device), device
        trained = [parameter for parameter in self.pilot.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
        self.learners = {copilot: self._learner(copilot) for copilot in copilots}
        print(f"{device_name(device)}, {shape}: {len(copilots)} Copilots are made", flush=True)
        self.counts: dict[Copilot, dict[str, int | None]] = {}
        self.first: dict[Copilot, float] = {}  # seconds of the first step, which compiles

    def _learner(self, copilot: Copilot) -> CopilotLearner:
        adapter = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear") if copilot.size == "decoder" else None
        with torch.device(self.device):  # random weights are made there
            model = copilot_for(self.pilot, copilot_config(copilot.memory, copilot.size))
        learner = CopilotLearner(
            model,
            self.pilot,
            num_training_steps=1000,
            steps_per_round=copilot.steps,
            autocast_dtype=torch.bfloat16 if self.device == "cuda" else None,
            compile_backend="inductor" if copilot.compiled else None,
            own_stream=copilot.own_stream,
            peft_config=adapter,
        )
        learner.close()
        if copilot.own_stream:
            return learner
        adamw, name = learner.optimizer.adamw, (copilot, "optimizer")
        adamw.register_step_pre_hook(lambda *_: self.watch.start(name))
        adamw.register_step_post_hook(lambda *_: self.watch.stop(name))
        return learner

    def alone(self, batches: list[Batch]) -> None:
        with self.watch.time("pilot"):
            self._update(batches, lambda batch: nullcontext())

    def beside(self, copilot: Copilot, batches: list[Batch]) -> None:
        learner = self.learners[copilot]

        @contextmanager
        def observe(batch: Batch) -> Iterator[None]:
            with learner.observe(batch):
                yield
                self.watch.start((copilot, "log"))
            self.watch.stop((copilot, "log"))

        with self.watch.time((copilot, "all")):
            if copilot.own_stream:
                self._beside_next(learner, batches)
            else:
                self._update(batches, observe)
                with self.watch.time((copilot, "step")):
                    learner.step()
        if copilot not in self.first:
            self.first[copilot] = self.watch.seconds[copilot, "all"][-1]
            print(f"first step of {copilot}: {self.first[copilot]:.1f} s", flush=True)
        learner.close()

    def _beside_next(self, learner: CopilotLearner, batches: list[Batch]) -> None:
        """The same work, but that the step is that of the turn before; no part of it is timed, which would wait."""
        if learner.has_observed:
            learner.step()
        self._update(batches, learner.observe)

    def count(self, copilot: Copilot, batches: list[Batch]) -> None:
        """Operators and waits of one step in a round, untimed; what is compiled can't be counted."""
        self.counts[copilot] = {"operators": None, "waits": None}
        if copilot.compiled:
            return
        learner = self.learners[copilot]
        self._update(batches, learner.observe)
        with Count() as count:
            learner.step()
        learner.close()
        self.counts[copilot] = {name: getattr(count, name) // copilot.steps for name in ("operators", "waits")}

    def _update(self, batches: list[Batch], observe: Callable[[Batch], AbstractContextManager]) -> None:
        for batch in batches:
            with observe(batch), torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                loss = self.pilot(**batch, fused_lm_head=True).loss / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.pilot.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def row(self, copilot: Copilot, work: Work) -> dict[str, Any]:
        """What one Copilot takes, whole and by part."""
        watch = self.watch
        return {
            "memory": copilot.memory,
            "size": copilot.size,
            "compiled": copilot.compiled,
            "own_stream": copilot.own_stream,
            "labelled_share": work.labelled / work.length,
            "steps_per_round": copilot.steps,
            "pilot_s": watch.median("pilot"),
            "pilot_and_copilot_s": watch.median((copilot, "all")),
            **spread(watch.ratios((copilot, "all"), "pilot")),
            **self._parts(copilot, work),
            "first_s": self.first[copilot],
            **self.counts[copilot],
            "log_mb": self.learners[copilot].log.nbytes / 1e6,
        }

    def _parts(self, copilot: Copilot, work: Work) -> dict[str, float | None]:
        """Of the Pilot's time; of what runs beside it there are none."""
        if copilot.own_stream:
            return dict.fromkeys(("share_log", "share_forward_backward", "share_optimizer"))
        pilot, step = self.watch.median("pilot"), self.watch.median((copilot, "step"))
        updates = copilot.steps * self.watch.median((copilot, "optimizer"))
        return {
            "share_log": work.accumulate * self.watch.median((copilot, "log")) / pilot,
            "share_forward_backward": (step - updates) / pilot,
            "share_optimizer": updates / pilot,
        }


def measure_training(
    shape: str, device: str, work: Work, reps: int, copilots: Sequence[Copilot] = COPILOTS_OF_CPU
) -> list[dict[str, Any]]:
    """Seconds of one optimizer step: the Pilot alone, and with each Copilot."""
    arms = TrainingArms(shape, device, copilots)

    def turn() -> list[Callable[[], None]]:
        batches = work.batches(SHAPES[shape]["vocab_size"], device)
        return [partial(arms.alone, batches), *(partial(arms.beside, copilot, batches) for copilot in copilots)]

    arms.watch.repeat(reps, 2, turn)
    for copilot in copilots:
        arms.count(copilot, work.batches(SHAPES[shape]["vocab_size"], device))
    return [arms.row(copilot, work) for copilot in copilots]


@torch.no_grad()
def measure_generation(
    shape: str, device: str, rows: int, prompt: int, tokens: int, reps: int, copilots: Sequence[Copilot] = DEFAULTS
) -> list[dict[str, Any]]:
    """Seconds of `generate`: greedy, the Pilot alone and with each Copilot; all make the same number of tokens. A
    processor is timed at its second call, when its step has been recorded."""
    pilot = make_pilot(shape, device).eval()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kinds = {(copilot.memory, copilot.size) for copilot in copilots}
    with torch.device(device):  # random weights are made there
        made = {kind: copilot_for(pilot, copilot_config(*kind)).to(device, dtype).eval() for kind in kinds}
    models = {copilot: made[copilot.memory, copilot.size] for copilot in copilots}
    watch = Stopwatch(device)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def generate(name: Hashable, inputs: dict, processors: list) -> None:
        with watch.time(name):
            pilot.generate(**inputs, logits_processor=processors, **settings)

    def rectified(copilot: Copilot, inputs: dict) -> None:
        with CopilotLogitsProcessor(models[copilot], pilot, cuda_graphs=copilot.compiled) as processor:
            generate((copilot, "first"), inputs, [processor])
            generate(copilot, inputs, [processor])

    def turn() -> list[Callable[[], None]]:
        inputs = make_batch(SHAPES[shape]["vocab_size"], rows, prompt, 1, device)
        del inputs["labels"]
        return [partial(generate, "alone", inputs, []), *(partial(rectified, copilot, inputs) for copilot in copilots)]

    watch.repeat(reps, 1, turn)
    whole = multiplied_parameters(unwrap(pilot))
    return [
        {
            "memory": copilot.memory,
            "size": copilot.size,
            "compiled": copilot.compiled,
            "batch": rows,
            "pilot_ms_per_token": 1e3 * watch.median("alone") / tokens,
            "rectified_ms_per_token": 1e3 * watch.median(copilot) / tokens,
            **spread(watch.ratios(copilot, "alone")),
            "share_of_weights": multiplied_parameters(model) / whole,
        }
        for copilot, model in models.items()
    ]


def spread(ratios: list[float]) -> dict[str, float]:
    """The median over the repetitions, and the least and the largest."""
    return {"ratio": statistics.median(ratios), "ratio_least": ratios[0], "ratio_largest": ratios[-1]}


def arms_of(shape: str, quick: str | None) -> tuple[Sequence[Copilot], Sequence[Copilot]]:
    """Those that are timed in training, and in generation, where a stream of their own is none."""
    if shape == "cpu":
        return COPILOTS_OF_CPU[:2] if quick else COPILOTS_OF_CPU, DEFAULTS
    trained = QUICK[quick] if quick else COPILOTS
    return trained, [copilot for copilot in trained if not copilot.own_stream]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--reps", type=int, default=7)
    quick = {"nargs": "?", "choices": list(QUICK), "const": "compiled"}
    parser.add_argument("--quick", **quick, help="Three repetitions of the first arms, or of those that are eager.")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/cost_<shape>.json")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    shape, device, reps = arguments.shape, arguments.device, arguments.reps
    works = [Work(labelled, 8, 1) for labelled in (26, 128, 255)] if shape == "cpu" else [Work(10, 4, 4)]
    (trained, generating), sizes = arms_of(shape, arguments.quick), (1, 8)
    if arguments.quick:
        reps, works, sizes = 3, works[:1], sizes[:1]
    training = [row for work in works for row in measure_training(shape, device, work, reps, trained)]
    print(f"{device_name(device)}, {shape}\n\n{table(training)}\n", flush=True)
    generation = [
        row
        for rows in sizes
        for row in measure_generation(shape, device, rows, 64, arguments.tokens, reps, generating)
    ]
    result = {
        "shape": shape,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repetitions": reps,
        "paper": PAPER.get(shape),
        "training_step": training,
        "generated_token": generation,
    }
    path = arguments.output or RESULTS / f"cost_{shape}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{table(generation)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()

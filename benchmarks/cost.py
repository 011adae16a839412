"""What a Copilot costs: training step and generated token, as ratios to the Pilot alone, both arms on the same work.

    python benchmarks/cost.py                                  # CPU shape, writes benchmarks/results/cost_cpu.json
    python benchmarks/cost.py --device cuda --shape llama-3.2-1b

Random weights in the exact shapes: timing needs no pretrained ones. Each repetition times both arms, in turn the one
and the other first, so that a slow minute of the machine hits both; ratios are medians over the repetitions' ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from trl.trainer.utils import add_fused_lm_head

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
MEMORIES = ("tokens", "pilot")  # the default, and a Copilot that reads the Pilot's states
STEPS = CopilotArguments.copilot_steps_per_round
COPILOTS = ((1, "pilot"), *((STEPS, memory) for memory in MEMORIES))  # steps in a round (1: the paper's), memory
PAPER = {  # Figure 5: whole fine-tuning and inference time with a 1B Copilot, A100
    "llama-3.2-1b": {"training": 1.065, "generation": 1.079},
    "llama-3.2-3b": {"training": 1.033, "generation": 1.047},
    "llama-3.1-8b": {"training": 1.019, "generation": 1.022},
}


class Stopwatch:
    """Seconds by name, with the device's work done."""

    def __init__(self, device: str):
        self.device, self.started, self.seconds = device, {}, {}

    @contextmanager
    def time(self, name: str):
        self.start(name)
        yield
        self.stop(name)

    def start(self, name: str) -> None:
        self.wait()
        self.started[name] = time.perf_counter()

    def stop(self, name: str) -> None:
        self.wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - self.started[name])

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median of the paired ratios."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))

    def repeat(self, repetitions: int, warm_up: int, arms: Callable) -> None:
        """Run the functions that `arms()` returns, every second time in reverse order; forget the warm-up's times."""
        for repetition in range(-warm_up, repetitions):
            if repetition == 0:
                self.seconds.clear()
            for arm in arms()[:: 1 if repetition % 2 else -1]:
                arm()


def make_pair(shape: str, device: str, memory: str):
    """The Pilot, its Copilot's config and LoRA: a small CPU pair in full, or the paper's LoRA r 32 in bf16."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device(device):
        pilot = LlamaForCausalLM(config)
    add_fused_lm_head(pilot, outputs=("log_probs", "entropy", "is_top1"))  # the Pilot's loss as SFTTrainer has it
    if shape == "cpu":
        return pilot, CopilotConfig(num_hidden_layers=2, memory=memory), None
    pilot = pilot.to(torch.bfloat16)
    lora = LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64)
    head_dim = {"head_dim": 64, "hidden_act": "silu"}
    decoder = CopilotConfig(init="random", memory=memory, num_hidden_layers=16, **SMALL_DECODER, **head_dim)
    return get_peft_model(pilot, lora), decoder, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")


def make_batch(vocab_size: int, rows: int, length: int, labelled: int, device: str) -> dict[str, torch.Tensor]:
    """Random tokens; the last `labelled` of every row carry labels."""
    ids = torch.randint(3, vocab_size, (rows, length), device=device)
    labels = ids.clone()
    labels[:, : length - labelled] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def measure_training(
    shape: str, device: str, labelled: int, rows: int, accumulate: int, reps: int, steps_per_round: int, memory: str
) -> dict:
    """Seconds of one optimizer step: the Pilot alone, and with a Copilot, by part. `accumulate` micro-batches of
    `rows` x 256 tokens, of which the last `labelled` of every row carry labels; `steps_per_round` of a Copilot with
    this `memory`."""
    length = 256
    pilot, config, lora = make_pair(shape, device, memory)
    pilot.train()
    learner = CopilotLearner(
        copilot_for(pilot, config),
        pilot,
        num_training_steps=1000,
        steps_per_round=steps_per_round,
        autocast_dtype=torch.bfloat16 if device == "cuda" else None,
        peft_config=lora,
    )
    learner.close()
    optimizer = torch.optim.AdamW([p for p in pilot.parameters() if p.requires_grad], 1e-4, fused=True)
    vocab_size, watch = SHAPES[shape]["vocab_size"], Stopwatch(device)

    def autocast():
        return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()

    def update(batches: list, observe: Callable) -> None:
        for batch in batches:
            with observe(batch), autocast():
                loss = pilot(**batch, fused_lm_head=True).loss / accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(pilot.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @contextmanager
    def timed_observe(batch: dict):
        with learner.observe(batch):
            yield
            watch.start("log_part")
        watch.stop("log_part")

    def pilot_alone(batches: list) -> None:
        with watch.time("pilot"):
            update(batches, lambda batch: nullcontext())

    def with_copilot(batches: list) -> None:
        with watch.time("pilot_and_copilot"):
            update(batches, timed_observe)
            with watch.time("copilot_step"):
                learner.step()
        learner.close()

    def arms() -> list[Callable]:
        batches = [make_batch(vocab_size, rows, length, labelled, device) for _ in range(accumulate)]
        return [partial(pilot_alone, batches), partial(with_copilot, batches)]

    learner.optimizer.adamw.register_step_pre_hook(lambda *_: watch.start("copilot_optimizer"))
    learner.optimizer.adamw.register_step_post_hook(lambda *_: watch.stop("copilot_optimizer"))
    watch.repeat(reps, 2, arms)
    whole, updates = watch.median("copilot_step"), steps_per_round * watch.median("copilot_optimizer")
    log = accumulate * watch.median("log_part")
    pilot_seconds = watch.median("pilot")
    return {
        "memory": memory,
        "labelled_share": labelled / length,
        "steps_per_round": steps_per_round,
        "pilot_s": pilot_seconds,
        "pilot_and_copilot_s": watch.median("pilot_and_copilot"),
        "ratio": watch.ratio("pilot_and_copilot", "pilot"),
        "share_log": log / pilot_seconds,
        "share_forward_backward": (whole - updates) / pilot_seconds,
        "share_optimizer": updates / pilot_seconds,
        "log_mb": learner.log.nbytes / 1e6,
    }


@torch.no_grad()
def measure_generation(shape: str, device: str, rows: int, prompt: int, tokens: int, reps: int, memory: str) -> dict:
    """Seconds of `generate`: greedy, the Pilot alone and rectified; both make the same number of tokens."""
    pilot, config, _ = make_pair(shape, device, memory)
    pilot = pilot.eval()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    copilot = copilot_for(pilot, config).to(device, dtype).eval()
    watch = Stopwatch(device)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def generate(name: str, inputs: dict, processors: list) -> None:
        with watch.time(name):
            pilot.generate(**inputs, logits_processor=processors, **settings)

    def rectified(inputs: dict) -> None:
        with CopilotLogitsProcessor(copilot, pilot) as processor:
            generate("rectified", inputs, [processor])

    def arms() -> list[Callable]:
        inputs = make_batch(SHAPES[shape]["vocab_size"], rows, prompt, 1, device)
        del inputs["labels"]
        return [partial(generate, "pilot", inputs, []), partial(rectified, inputs)]

    watch.repeat(reps, 1, arms)
    share = multiplied_parameters(copilot) / multiplied_parameters(unwrap(pilot))
    overhead = watch.ratio("rectified", "pilot") - 1
    return {
        "memory": memory,
        "batch": rows,
        "pilot_ms_per_token": 1e3 * watch.median("pilot") / tokens,
        "rectified_ms_per_token": 1e3 * watch.median("rectified") / tokens,
        "ratio": 1 + overhead,
        "share_of_weights": share,
        "overhead_over_share": overhead / share,
    }


def table(rows: list[dict]) -> str:
    """A Markdown table of dictionaries with the same keys."""
    head = "| " + " | ".join(rows[0]) + " |"
    lines = [
        "| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()) + " |" for r in rows
    ]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", help="JSON file; default benchmarks/results/cost_<shape>.json")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    shape, device, reps = arguments.shape, arguments.device, arguments.reps
    if shape == "cpu":
        shapes = [(labelled, 8, 1) for labelled in (26, 128, 255)]
    else:
        shapes = [(10, 4, 4)]
    training = [measure_training(shape, device, *sizes, reps, *copilot) for copilot in COPILOTS for sizes in shapes]
    sizes = [(rows, 64, arguments.tokens, reps, memory) for memory in MEMORIES for rows in (1, 8)]
    generation = [measure_generation(shape, device, *size) for size in sizes]
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    result = {
        "shape": shape,
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "paper": PAPER.get(shape),
        "training_step": training,
        "generated_token": generation,
    }
    path = Path(arguments.output or Path(__file__).parent / "results" / f"cost_{shape}.json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{name}, {shape}\n\n{table(training)}\n\n{table(generation)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()

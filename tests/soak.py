"""Generate and train thousands of times, and see whether anything grows.

    python tests/soak.py --rounds 2000

Prints what is alive after the warm-up, half-way and at the end: objects and tensors that Python knows, hooks on the
Pilots, threads, and the memory of the process. Ends with an error if any of it has grown.
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil
import torch
from tiny import VOCAB_SIZE, tiny_pilot, tiny_seq2seq, trained_like
from transformers import DynamicCache
from versions import CACHE

from hf_copilot import CopilotConfig, CopilotLearner, CopilotLogitsProcessor, MistakeLog, copilot_for

WAYS = [
    {},
    {"num_beams": 3},
    {"do_sample": True, "num_return_sequences": 2},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 2},
    {"prompt_lookup_num_tokens": 2},  # raises
]
LOG_ROUNDS = 4  # full before the warm-up ends
MOST_BYTES = 8 << 20  # by which the memory of the process may grow: allocators keep some


class Alive(NamedTuple):
    """What is there after all that can go has gone."""

    objects: int
    tensors: int
    hooks: int
    threads: int
    megabytes: float


def alive(pilots: list[torch.nn.Module]) -> Alive:
    gc.collect()
    objects = [each for each in gc.get_objects() if type(each) is not Alive]
    tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
    modules = [module for pilot in pilots for module in pilot.modules()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    memory = psutil.Process().memory_info().rss / (1 << 20)
    return Alive(len(objects), tensors, hooks, threading.active_count(), memory)


def random_ids(round_: int, rows: int = 2) -> torch.Tensor:
    """Other tokens in every round, of one of four lengths: `[rows, n]`."""
    generator = torch.Generator().manual_seed(round_)
    return torch.randint(5, VOCAB_SIZE, (rows, 4 + round_ % 4), generator=generator)


def generating() -> tuple[list[torch.nn.Module], Callable[[int], None]]:
    """Processors that stay and processors that go, a chat on a kept cache, and calls that raise."""
    pilots = [tiny_pilot().eval(), tiny_seq2seq().eval()]
    configs = [None, CopilotConfig(memory="pilot"), None]
    copilots = [trained_like(pilots[i == 2], config) for i, config in enumerate(configs)]
    staying = CopilotLogitsProcessor(copilots[1], pilots[0])
    settings = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}

    def one(round_: int) -> None:
        ids, way = random_ids(round_), settings | WAYS[round_ % len(WAYS)]
        pilot, copilot = (pilots[round_ % 3 == 2], copilots[round_ % 3])
        try:
            if round_ % 2:
                pilots[0].generate(ids, logits_processor=[staying], **way)
            else:
                way.pop("prefill_chunk_size", None)
                pilot.generate(ids, logits_processor=[CopilotLogitsProcessor(copilot, pilot)], **way)
        except ValueError:
            assert "prompt_lookup_num_tokens" in way
        if round_ % 10 == 0:
            cache = DynamicCache(config=pilots[0].config)
            for _ in range(2):
                ids = pilots[0].generate(ids, logits_processor=[staying], **settings, **{CACHE: cache})
                ids = torch.cat([ids, ids[:, :1]], dim=1)

    return pilots, one


def training() -> tuple[list[torch.nn.Module], Callable[[int], None]]:
    """Rounds of three learners, with metrics, an evaluation now and then, and a learner that is made anew."""
    pilots = [tiny_pilot(), tiny_pilot("gpt2"), tiny_seq2seq()]
    learners = [CopilotLearner(copilot_for(pilot), pilot, 10_000, log=MistakeLog(LOG_ROUNDS)) for pilot in pilots]
    optimizers = [torch.optim.AdamW(pilot.parameters(), lr=1e-4) for pilot in pilots]

    def one(round_: int) -> None:
        i = round_ % len(pilots)
        if round_ % 30 == 0:
            learners[i].close()
            learners[i] = CopilotLearner(learners[i].copilot, pilots[i], 10_000, log=MistakeLog(LOG_ROUNDS))
        batch = {"input_ids": random_ids(round_), "labels": random_ids(round_)}
        with learners[i].observe(batch):
            loss = pilots[i](**batch).loss
        loss.backward()
        optimizers[i].step()
        optimizers[i].zero_grad()
        learners[i].step(measure=True)
        if round_ % 10 == 0:
            with torch.no_grad(), learners[i].evaluate(batch):
                pilots[i](**batch)
            learners[i].pop_metrics(), learners[i].pop_metrics("eval")

    return pilots, one


KINDS = {"generate calls": generating, "training rounds": training}


def soak(kind: str, warm_up: int, rounds: int, looks: int = 2) -> Iterator[Alive]:
    """What is alive after the warm-up, and `looks` times while there are `rounds` more; each time after the same
    round, of which some is kept for the next."""
    pilots, one = KINDS[kind]()
    for round_ in range(warm_up + rounds + 1):
        if round_ >= warm_up and (round_ - warm_up) % (rounds // looks) == 0:
            one(0)
            yield alive(pilots)
        one(round_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=100)
    arguments = parser.parse_args()
    for kind in KINDS:
        start = time.time()
        seen = list(soak(kind, arguments.warm_up, arguments.rounds))
        print(f"{arguments.rounds} {kind} in {time.time() - start:.0f} s, after {arguments.warm_up} to warm up")  # noqa: T201
        for each in seen:
            print("   ", ", ".join(f"{value:.0f} {name}" for name, value in each._asdict().items()))  # noqa: T201
        if any(b > a for a, b in zip(seen[0][:4], seen[-1][:4], strict=True)):
            raise SystemExit(f"Something has grown with the {kind}.")
        if (seen[-1].megabytes - seen[0].megabytes) * (1 << 20) > MOST_BYTES:
            raise SystemExit(f"The memory has grown with the {kind}.")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    main()

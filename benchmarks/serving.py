"""What a Copilot costs in vLLM: requests with it and without, in turn, in one engine.

    python -m benchmarks.serving      # in the environment of .ci/serving; writes benchmarks/results/serving_cpu.json

Random weights in the exact shapes of `benchmarks.cost`. `copilot_strength` 0 is "without". Each repetition serves as
many requests at once with and without, every second time in the other order; ratios are medians over repetitions.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, Stopwatch, table
from benchmarks.cost import make_pilot
from hf_copilot import CopilotConfig, copilot_for

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

PROMPT, NEW = 32, 24  # tokens
AT_ONCE = (1, 8, 32)  # requests
INPUTS = ("both", "token")
STRENGTHS = {"without": 0.0, "with": 1.0}


def run(fed: str, repetitions: int) -> list[dict[str, Any]]:
    """One engine, whose Copilot is fed so."""
    from vllm import LLM, SamplingParams

    pilot = make_pilot("cpu", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        pilot.save_pretrained(folder)
        copilot_for(pilot, CopilotConfig(copilot_input=fed)).save_pretrained(Path(folder, "copilot"))
        settings = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True}
        name = "hf_copilot.serving.vllm:CopilotProcessor"
        llm = LLM(folder, logits_processors=[name], max_num_seqs=max(AT_ONCE), enable_prefix_caching=False, **settings)
    found, watch, draw = [], Stopwatch("cpu"), torch.Generator().manual_seed(0)
    prompts = torch.randint(3, pilot.config.vocab_size, (max(AT_ONCE), PROMPT), generator=draw).tolist()

    def serve(requests: int, arm: str) -> None:
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        params.extra_args = {"copilot_strength": STRENGTHS[arm]}
        with watch.time((requests, arm)):
            llm.generate([{"prompt_token_ids": ids} for ids in prompts[:requests]], params, use_tqdm=False)

    for requests in AT_ONCE:
        watch.repeat(repetitions, 1, lambda of=requests: [partial(serve, of, arm) for arm in STRENGTHS])
        print(f"{fed}, {requests} requests: {watch.ratio((requests, 'with'), (requests, 'without')):.2f}", flush=True)
        found.append(figures(fed, requests, watch))
    llm.llm_engine.engine_core.shutdown()
    return found


def figures(fed: str, requests: int, watch: Stopwatch) -> dict[str, Any]:
    """Medians, prompts included."""
    row: dict[str, Any] = {"copilot_input": fed, "requests": requests}
    for arm in STRENGTHS:
        seconds = watch.median((requests, arm))
        row |= {f"tokens_per_s_{arm}": requests * NEW / seconds, f"ms_per_token_{arm}": 1000 * seconds / NEW}
    ratios = watch.ratios((requests, "with"), (requests, "without"))
    return row | {"ratio": statistics.median(ratios), "least": ratios[0], "largest": ratios[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    rows = []
    for fed in INPUTS:
        rows += run(fed, args.repetitions)
        gc.collect()  # the engine, before what it stands on
        cleanup_dist_env_and_memory()
    settings = {"prompt": PROMPT, "new": NEW, "threads": torch.get_num_threads(), "repetitions": args.repetitions}
    found = settings | {"torch": torch.__version__, "vllm": vllm.__version__, "served": rows}
    (args.results / "serving_cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

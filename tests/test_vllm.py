"""A Copilot in a real vLLM engine, in an environment of its own: `.ci/serving`, or `pytest -n 0 -rP -m serving`.

What the engine writes is compared with `model.generate` and a CopilotLogitsProcessor, token by token. Its memory is so
small that requests are pushed out and come back, its steps so short that prompts are read in chunks.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from tiny import teacher_forced, tiny_pilot, tiny_tokenizer, trained_like
from transformers import AutoModelForCausalLM

from hf_copilot import CopilotConfig, CopilotLogitsProcessor, CopilotModel
from hf_copilot.pilot.compatibility import describe_pilot

pytestmark = [pytest.mark.serving, pytest.mark.filterwarnings("ignore::FutureWarning")]  # vLLM's own
pytest.importorskip("vllm")
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # so that f can be looked at
    VLLM_NO_USAGE_STATS="1",
)

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402

from hf_copilot.serving.vllm import CopilotProcessor  # noqa: E402

SHAPE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads that it has
NAME = "hf_copilot.serving.vllm:CopilotProcessor"
NARROW = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "block_size": 32, "num_gpu_blocks_override": 18}
NEW = 24  # tokens of an answer


class Recording(CopilotProcessor):
    """Keeps f by the tokens that it comes after."""

    seen: dict[tuple[int, ...], torch.Tensor] = {}

    def __init__(self, *args):
        super().__init__(*args)
        inner = self.rectifier.correction

        def correction(turns):
            found = inner(turns)
            for turn, f in zip(turns, found, strict=True):
                self.seen[tuple(turn.request.source.read(0, turn.length))] = f.clone()
            return found

        self.rectifier.correction = correction


@pytest.fixture(scope="module", params=["both", "token", "discrepancy"])
def folder(request, tmp_path_factory):
    """What a run leaves: a Pilot, and in copilot/ its Copilot."""
    return save_pair(tmp_path_factory.mktemp(request.param), request.param)


def save_pair(folder, copilot_input: str):
    pilot, tokenizer = tiny_pilot(**SHAPE).eval(), tiny_tokenizer()
    copilot = trained_like(pilot, CopilotConfig(copilot_input=copilot_input))
    with torch.no_grad():
        copilot.lm_head.weight.mul_(0.3)  # f of a few nats, as trained Copilots have
    describe_pilot(copilot.config, pilot, tokenizer)
    for saved in (pilot, tokenizer):
        saved.save_pretrained(folder)
    copilot.save_pretrained(folder / "copilot")
    return folder


@pytest.fixture
def engine():
    """Makes an engine; the one before and the last go, which share what is one in a process."""
    made = []

    def close():
        for llm in made:
            llm.llm_engine.engine_core.shutdown()
        made.clear()
        gc.collect()
        cleanup_dist_env_and_memory()

    def make(folder, processor: type | str = NAME, **changes):
        close()
        settings = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "disable_log_stats": False}
        made.append(LLM(str(folder), logits_processors=[processor], **(settings | changes)))
        return made[-1]

    yield make
    close()


def prompts(count: int, vocabulary: range, longest: int = 90) -> list[list[int]]:
    """Of other lengths; every second one begins as the one before does, for the prefix cache."""
    draw, found = torch.Generator().manual_seed(0), []
    for length in torch.randint(3, longest, (count // 2,), generator=draw).tolist():
        first = torch.randint(vocabulary.start, vocabulary.stop, (length,), generator=draw).tolist()
        found += [first, [*first[: max(2, length - 5)], vocabulary.start]]
    return found


def answers(llm: LLM, asked: list[list[int]], params) -> list[list[int]]:
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in found]


def count(llm: LLM, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def pair(folder):
    pilot = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return pilot, CopilotModel.from_pretrained(folder / "copilot").eval()


def generated(folder, asked: list[list[int]], strength: float | None = None, new: int = NEW) -> list[list[int]]:
    """By transformers, one after the other."""
    pilot, copilot = pair(folder)
    with CopilotLogitsProcessor(copilot, pilot, strength) as processor:
        settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return [
            pilot.generate(torch.tensor([prompt]), logits_processor=[processor], **settings)[0, len(prompt) :].tolist()
            for prompt in asked
        ]


def test_the_engine_writes_what_generate_writes(folder, engine):
    """200 prompts, mixed batches, preempted, in chunks, with a prefix cache."""
    Recording.seen.clear()
    llm, asked = engine(folder, Recording, **NARROW), prompts(200, range(5, 46))
    found = answers(llm, asked, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
    preemptions, hits = count(llm, "num_preemptions"), count(llm, "prefix_cache_hits")
    pilot, copilot = pair(folder)
    errors = []
    for prompt, answer in zip(asked, found, strict=True):
        f = teacher_forced(copilot, pilot, torch.tensor(prompt + answer), len(prompt))  # [n - p + 1, V]
        seen = [Recording.seen[tuple(prompt + answer[:i])] for i in range(NEW)]
        errors.append(float((torch.stack(seen) - f[:NEW]).abs().max()))
    sys.stdout.write(f"{preemptions} preemptions, {hits} prompt tokens cached, f within {max(errors):.1e}\n")
    assert found == generated(folder, asked)
    assert preemptions > 20 and hits > 100
    assert max(errors) < 1e-4


def test_each_request_has_its_strength(folder, engine):
    """0 is the bare Pilot."""
    asked, sizes = prompts(12, range(5, 46)), [0.0, 0.5, None] * 4
    llm = engine(folder, **NARROW)

    def params(strength, **changes):
        extra = None if strength is None else {"copilot_strength": strength}
        return SamplingParams(
            **({"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "extra_args": extra} | changes)
        )

    found = answers(llm, asked, [params(strength) for strength in sizes])
    with pytest.raises(VLLMValidationError, match="finite and >= 0"):
        answers(llm, asked[:1], params(-1.0))
    with pytest.raises(VLLMValidationError, match="copilot_strenght"):
        answers(llm, asked[:1], SamplingParams(extra_args={"copilot_strenght": 1.0}))
    for strength in set(sizes):
        of = [i for i, other in enumerate(sizes) if other == strength]
        assert [found[i] for i in of] == generated(folder, [asked[i] for i in of], strength)
    assert generated(folder, asked[:3], 0.0) != generated(folder, asked[:3], 0.5) != generated(folder, asked[:3])


def test_it_samples_from_the_rectified_distribution_and_bans_stay(folder, engine):
    llm = engine(folder, logprobs_mode="processed_logprobs", max_logprobs=-1)
    prompt, allowed = prompts(2, range(5, 46))[0], list(range(5, 25))
    params = SamplingParams(temperature=1.0, max_tokens=NEW, ignore_eos=True, allowed_token_ids=allowed, logprobs=-1)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    ids = list(output.outputs[0].token_ids)
    assert set(ids) <= set(allowed)
    pilot, copilot = pair(folder)
    if copilot.config.copilot_input != "token":
        return  # whose p̂ is that of the tokens that are allowed
    with torch.no_grad():
        z = pilot(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]  # [NEW, V]
    f = teacher_forced(copilot, pilot, torch.tensor(prompt + ids), len(prompt))[:-1]  # [NEW, V]
    expected = (z + f)[:, allowed].log_softmax(-1)  # [NEW, allowed]
    said = [[step[token].logprob for token in allowed] for step in output.outputs[0].logprobs]
    torch.testing.assert_close(torch.tensor(said), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (CopilotConfig(memory="pilot"), {}, "state Copilot"),
        (CopilotConfig(vocab_projection="pilot"), {}, "vocabulary matrices"),
        (CopilotConfig(), {"scheduling_policy": "priority"}, "copilot_input='token'"),
        (CopilotConfig(), {"additional_config": {"copilot": "nowhere"}}, "No Copilot in nowhere"),
        # the last: it loads numba, and vLLM can't look through that for the next engine
        (CopilotConfig(), {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative"),
    ],
)
def test_what_can_not_be_served_is_refused_at_load(tmp_path, engine, config, changes, message):
    pilot, tokenizer = tiny_pilot(**SHAPE).eval(), tiny_tokenizer()
    for saved in (pilot, tokenizer):
        saved.save_pretrained(tmp_path)
    trained_like(pilot, config).save_pretrained(tmp_path / "copilot")
    with pytest.raises((NotImplementedError, ValueError), match=message):
        engine(tmp_path, **changes)


def test_the_server(tmp_path):
    """`vllm serve` and what a client of OpenAI's API sends."""
    folder, port = save_pair(tmp_path, "both"), 8317
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]  # as `vllm serve`
    settings = [
        "--logits-processors",
        NAME,
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--enforce-eager",
        "--port",
        str(port),
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONWARNINGS": "ignore"}
    asked = prompts(8, range(5, 46))
    with subprocess.Popen(command + settings, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for(server, f"http://localhost:{port}/health")
            for strength in (None, 0.5, 0):
                body = {"model": str(folder), "prompt": asked, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
                body |= {"return_token_ids": True} | (
                    {} if strength is None else {"vllm_xargs": {"copilot_strength": strength}}
                )
                found = [
                    choice["token_ids"] for choice in post(f"http://localhost:{port}/v1/completions", body)["choices"]
                ]
                assert found == generated(folder, asked, strength)
            with pytest.raises(urllib.error.HTTPError, match="400"):
                post(f"http://localhost:{port}/v1/completions", body | {"vllm_xargs": {"copilot_strength": -1}})
        finally:
            server.terminate()


def wait_for(server: subprocess.Popen, address: str) -> None:
    while server.poll() is None:
        try:
            return urllib.request.urlopen(address).close()
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"The server ended with {server.returncode}.")


def post(address: str, body: dict) -> dict:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)

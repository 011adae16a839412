"""A Copilot in an engine, against a stub of both of vLLM's interfaces; tests/test_vllm.py has the real one."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
import vllm_stub
from tiny import VOCAB_SIZE, teacher_forced, tiny_pilot, tiny_tokenizer, trained_like
from vllm_stub import FirstRunner, Job, SecondRunner, request_states, vllm_config

from hf_copilot import CopilotConfig, CopilotLogitsProcessor
from hf_copilot.pilot.compatibility import describe_pilot
from hf_copilot.serving.batch_rectifier import BatchRectifier
from hf_copilot.serving.paged_cache import BLOCK, PagedCache
from hf_copilot.serving.refusals import strength_of
from hf_copilot.serving.requests import Lists, Request, Slots, Turn

SLOTS = 4
RUNNERS = [(runner, fed) for runner in ("first", "async") for fed in ("both", "token", "discrepancy")]


@pytest.fixture
def module(monkeypatch):
    """`hf_copilot.serving.vllm`, on the stub."""
    vllm_stub.install(monkeypatch)
    yield importlib.import_module("hf_copilot.serving.vllm")
    sys.modules.pop("hf_copilot.serving.vllm", None)


def saved(folder, copilot, pilot=None):
    if pilot is not None:
        describe_pilot(copilot.config, pilot, tiny_tokenizer())
    copilot.save_pretrained(folder / "copilot")
    return folder


def make(module, folder, kind: str, pilot, seed: int = 0, **changes):
    """A runner with a processor of the Copilot that lies in a folder."""
    config = vllm_config(folder, tiny_tokenizer(), SLOTS, **changes)
    if kind == "second":
        states = request_states(SLOTS)
        return SecondRunner(module.CopilotProcessor(config, states), pilot, SLOTS, states, seed)
    runner = FirstRunner(module.CopilotProcessor(config, torch.device("cpu"), False), pilot, SLOTS, seed)
    runner.is_async = kind == "async"
    return runner


def jobs(count: int = 12, new: int = 8, **extra) -> list[Job]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 24, (count,), generator=draw).tolist()
    prompts = [torch.randint(5, VOCAB_SIZE, (length,), generator=draw).tolist() for length in lengths]
    prompts[1] = prompts[0]  # the same twice
    return [Job(prompt, new - i % 3, extra or None) for i, prompt in enumerate(prompts)]


def generated(pilot, copilot, asked: list[Job], strength: float | None = None) -> list[list[int]]:
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with CopilotLogitsProcessor(copilot, pilot, strength, tokenizer=tiny_tokenizer()) as processor:
        settings["logits_processor"] = [processor]
        return [
            pilot.generate(torch.tensor([job.prompt]), max_new_tokens=job.new, **settings)[
                0, len(job.prompt) :
            ].tolist()
            for job in asked
        ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "fed"), [*RUNNERS, ("second", "token")])
def test_requests_get_what_generate_gives(module, tmp_path, pilot, kind, fed, seed):
    """However they come and go; f is that of training."""
    copilot = trained_like(pilot, CopilotConfig(copilot_input=fed))
    runner = make(module, saved(tmp_path, copilot), kind, pilot, seed)
    seen, inner = {}, runner.processor.rectifier.correction

    def correction(turns):
        found = inner(turns)
        ids = [runner.processor.rectifier.read([turn.request], [0], turn.length)[0].tolist() for turn in turns]
        seen.update({tuple(tokens): f for tokens, f in zip(ids, found, strict=True)})
        return found

    runner.processor.rectifier.correction = correction
    asked = jobs()
    assert runner.serve(asked) == generated(pilot, copilot, asked)
    assert runner.preemptions > 3
    for job in asked:
        expected = teacher_forced(copilot, pilot, torch.tensor(job.tokens), len(job.prompt))[: job.new]
        f = torch.stack([seen[tuple(job.prompt + job.output[:i])] for i in range(job.new)])
        torch.testing.assert_close(f, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_tokens_that_an_engine_takes_back_are_forgotten(pilot):
    """And their discrepancies: another token is in their place."""
    copilot, prompt = trained_like(pilot), [5, 15, 6, 17]

    def last(*texts):
        def read(requests, starts, size):
            return torch.tensor([text[starts[0] : starts[0] + size]])

        rectifier, request = BatchRectifier(copilot, read, 1, 32), Request(len(prompt), 1.0, None)
        for text in texts:
            logits = pilot(torch.tensor([text])).logits[:, -1].float()
            found = rectifier.rectify(logits, [Turn(0, request, len(text))])
        return found

    path = [prompt, [*prompt, 7], [*prompt, 7, 8], [*prompt, 7], [*prompt, 7, 9]]
    torch.testing.assert_close(last(*path), last(*path[:2], path[-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["first", "second"])
def test_each_request_has_its_strength(module, tmp_path, pilot, kind):
    copilot = trained_like(pilot, CopilotConfig(copilot_input="token"))
    runner, asked = make(module, saved(tmp_path, copilot), kind, pilot), jobs()
    strengths = [0.0, 0.5, 2.0]
    for i, job in enumerate(asked):
        job.extra = {"copilot_strength": strengths[i % 3]}
    found = runner.serve(asked)
    for i, strength in enumerate(strengths):
        assert found[i::3] == generated(pilot, copilot, asked[i::3], strength)


@pytest.mark.parametrize("kind", ["first", "second"])
def test_at_strength_0_logits_are_untouched(module, tmp_path, pilot, kind, monkeypatch):
    runner = make(module, saved(tmp_path, trained_like(pilot, CopilotConfig(copilot_input="token"))), kind, pilot)
    monkeypatch.setattr(runner.processor.rectifier, "correction", None)
    before, apply = [], runner.processor.apply

    def compared(logits, *context):
        before.append(logits.clone())
        assert torch.equal(apply(logits, *context), before[-1])
        return logits

    monkeypatch.setattr(runner.processor, "apply", compared)
    runner.serve(jobs(copilot_strength=0))
    assert len(before) > 8


def test_the_servers_strength_is_that_of_requests_without_one(module, tmp_path, pilot):
    copilot = trained_like(pilot)
    settings = {"additional_config": {"copilot_strength": 0.25, "other": 1}}
    runner, asked = make(module, saved(tmp_path, copilot), "first", pilot, **settings), jobs()
    assert runner.serve(asked) == generated(pilot, copilot, asked, 0.25)


@pytest.mark.parametrize("config", [CopilotConfig(), CopilotConfig(objective="rmse", fusion="probability")])
def test_banned_tokens_stay_banned(module, tmp_path, pilot, config):
    runner = make(module, saved(tmp_path, trained_like(pilot, config)), "first", pilot)
    banned = torch.arange(VOCAB_SIZE) % 2 == 0
    runner.logits = lambda job: FirstRunner.logits(runner, job).masked_fill(banned, -torch.inf)
    apply = runner.processor.apply
    runner.processor.apply = lambda logits: checked(apply(logits))

    def checked(logits):
        assert torch.equal(logits == -torch.inf, banned.expand_as(logits)) and not logits.isnan().any()
        return logits

    assert {token % 2 for answer in runner.serve(jobs()) for token in answer} == {1}


def test_a_pilot_with_padding_rows(module, tmp_path):
    """A token that the Copilot has no row for is read as `generate` reads it."""
    pilot = tiny_pilot(vocab_size=VOCAB_SIZE + 4).eval()
    rows = {"model_config__get_vocab_size": lambda: VOCAB_SIZE + 4}
    copilot = trained_like(tiny_pilot().eval())
    describe_pilot(copilot.config, pilot, tiny_tokenizer())
    runner, asked = make(module, saved(tmp_path, copilot), "first", pilot, **rows), jobs()
    for job in asked:
        job.prompt[-1] = VOCAB_SIZE + 1
    assert runner.serve(asked) == generated(pilot, copilot, asked)


def test_a_pilot_with_fewer_padding_rows(module, tmp_path, pilot):
    """And a Copilot whose discrepancies are whole: what is pushed out, and computed again, is as wide as the rest."""
    larger = tiny_pilot(vocab_size=VOCAB_SIZE + 4).eval()
    copilot = trained_like(larger, CopilotConfig(copilot_input="both", top_k=VOCAB_SIZE + 4))
    runner, asked = make(module, saved(tmp_path, copilot, larger), "first", pilot), jobs()
    assert runner.serve(asked) == generated(pilot, copilot, asked) and runner.preemptions > 3


# ---- what is held --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "fed"), [("first", "both"), ("first", "token"), ("second", "token")])
def test_keys_and_values_go_with_their_request(module, tmp_path, pilot, kind, fed):
    runner = make(module, saved(tmp_path, trained_like(pilot, CopilotConfig(copilot_input=fed))), kind, pilot)
    processor, most = runner.processor, 0
    apply = processor.apply

    def counted(logits, *context):
        nonlocal most
        logits = apply(logits, *context)
        tables = [cache.tables for cache in processor.rectifier.caches]
        assert all(len(table) <= len(logits) for table in tables)
        most = max(most, len(tables[0]))
        return logits

    processor.apply = counted
    runner.serve(jobs(40))
    assert most == SLOTS
    if kind == "second":  # which is not told that the last ones are done
        runner.serve(jobs(2, new=4, copilot_strength=0))
    else:
        runner.step()
    assert not any(cache.tables or cache.pools for cache in processor.rectifier.caches)
    assert len(processor.slots.left) == (2 * SLOTS if fed == "both" else 0)


def test_discrepancies_that_are_gone_are_missed(module, tmp_path, pilot):
    runner = make(module, saved(tmp_path, trained_like(pilot, DISCREPANCIES)), "first", pilot)
    runner.processor.slots.kept = 0
    with pytest.raises(RuntimeError, match="discrepancies of its tokens"):
        runner.serve(jobs())


def test_a_request_has_its_own_discrepancies_again():
    """And not those of another with the same tokens, whose bans were others."""
    slots = Slots(lambda request: None, kept=4)
    requests = [Request(3, 1.0, Lists([5, 6, 7], [8])) for _ in range(2)]
    for request in requests:
        request.mistakes, request.logits = [], torch.randn(9)
    slots.update([], enumerate(requests))
    slots.update([0, 1], [])
    again = Request(3, 1.0, Lists(requests[0].source.prompt, [8]))
    slots.update([], [(0, again)])
    assert again.logits.equal(requests[0].logits) and [left for _, left in slots.left] == [requests[1]]


def test_pages_are_rows_of_a_cache_and_what_is_not_finite_stays_where_it_is():
    cache, draw = PagedCache(3, 2 * BLOCK + 5), torch.Generator().manual_seed(0)
    expected = {row: torch.zeros(2, 0, 4) for row in "abc"}  # [kv_heads, entries, head_dim]

    def write(rows, new):
        starts = [expected[row].shape[1] for row in rows]
        keys = torch.randn(len(rows), 2, new, 4, generator=draw)
        cache.open(rows, starts, new, torch.device("cpu"))
        held, values = cache.update(keys, keys + 1, 0)
        for row, own, key, value in zip(rows, keys, held, values, strict=True):
            expected[row] = torch.cat([expected[row], own], dim=1)
            length = expected[row].shape[1]
            assert torch.equal(key[:, :length], expected[row]) and torch.equal(value[:, :length], expected[row] + 1)
            assert held.isfinite().all() and values.isfinite().all()

    for rows, new in [("a", 3), ("b", BLOCK + 2), ("ab", 1), ("c", BLOCK), ("cab", 1), ("b", BLOCK)]:
        write(rows, new)
    cache.open("a", [0], 4, torch.device("cpu"))
    cache.update(torch.full((1, 2, 4, 4), torch.nan), torch.full((1, 2, 4, 4), torch.inf), 0)
    cache.free("a")
    expected["a"] = torch.zeros(2, 0, 4)
    write("a", 1)  # in the same block
    write("cb", 1)
    with pytest.raises(RuntimeError, match="asked for"):
        cache.open(["d"], [0], 6 * BLOCK, torch.device("cpu"))
    for row in "abcd":
        cache.free(row)
    assert cache.entries == BLOCK and not cache.pools


# ---- what is refused -----------------------------------------------------------------------------------------------

STATES, DISCREPANCIES = CopilotConfig(memory="pilot"), CopilotConfig(copilot_input="both")
PREDICTED = CopilotConfig(objective="rmse", fusion="probability", error_feedback="predicted")


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (STATES, {}, "none of the Pilot's hidden states"),
        (CopilotConfig(vocab_projection="pilot"), {}, "vocabulary matrices"),
        (PREDICTED, {}, "error_feedback='predicted'"),
        (DISCREPANCIES, {"speculative_config": object()}, "speculative decoding"),
        (DISCREPANCIES, {"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        (DISCREPANCIES, {"parallel_config__tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        (DISCREPANCIES, {"model_config__is_multimodal_model": True}, "more than text"),
        (DISCREPANCIES, {"model_config__enable_prompt_embeds": True}, "enable_prompt_embeds"),
        (DISCREPANCIES, {"scheduler_config__policy": "priority"}, "copilot_input='token'"),
        (DISCREPANCIES, {"lora_config": object()}, "copilot_input='token'"),
        (DISCREPANCIES, {"kv_transfer_config": object()}, "copilot_input='token'"),
    ],
)
def test_what_can_not_be_served_is_refused_at_load(module, tmp_path, pilot, config, changes, message):
    folder = saved(tmp_path, trained_like(pilot, config))
    with pytest.raises(NotImplementedError, match=message):
        make(module, folder, "first", pilot, **changes)


def test_the_second_runner_serves_copilots_that_read_tokens_alone(module, tmp_path, pilot):
    with pytest.raises(NotImplementedError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        make(module, saved(tmp_path, trained_like(pilot, DISCREPANCIES)), "second", pilot)


def test_what_hangs_on_tokens_alone_is_served_with_any_schedule(module, tmp_path, pilot):
    folder = saved(tmp_path, trained_like(pilot, CopilotConfig(copilot_input="token")))
    make(module, folder, "first", pilot, scheduler_config__policy="priority", lora_config=object())


def test_another_tokenizer_or_vocabulary_is_refused(module, tmp_path, pilot):
    copilot = trained_like(pilot)
    copilot.config.tokenizer_fingerprint = "47:of another"
    with pytest.raises(ValueError, match="gives other ids"):
        make(module, saved(tmp_path, copilot), "first", pilot)
    copilot.config.tokenizer_fingerprint = None
    with pytest.raises(ValueError, match="47 vocabulary rows and the Pilot 50"):
        make(module, saved(tmp_path, copilot), "first", pilot, model_config__get_vocab_size=lambda: 50)


def test_a_copilot_is_found_beside_the_pilot_or_by_name(module, tmp_path, pilot):
    with pytest.raises(ValueError, match="No Copilot in copilot/ beside"):
        make(module, tmp_path, "first", pilot)
    copilot = trained_like(pilot)
    copilot.config.strength = 0.5
    copilot.save_pretrained(tmp_path / "elsewhere")
    runner = make(module, tmp_path, "first", pilot, additional_config={"copilot": str(tmp_path / "elsewhere")})
    assert runner.processor.strength == 0.5


def test_a_strength_that_is_none_is_refused(module):
    for wrong in (-1.0, float("nan"), float("inf"), "0.5", True):
        with pytest.raises(ValueError, match="λ"):
            module.CopilotProcessor.validate_params(Job([1], 1, {"copilot_strength": wrong}).params)
    with pytest.raises(ValueError, match="copilot_strenght"):
        module.CopilotProcessor.validate_params(Job([1], 1, {"copilot_strenght": 1.0}).params)
    for right in (None, {}, {"copilot_strength": 0}, {"another": "x"}):
        module.CopilotProcessor.validate_params(Job([1], 1, right).params)
    with pytest.raises(ValueError, match="copilots"):
        strength_of({"copilots": 1}, 1.0)


def test_the_package_does_not_import_vllm():
    code = (
        "import sys, hf_copilot.serving.batch_rectifier, hf_copilot.serving.refusals; assert 'vllm' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The Copilot's step, recorded: what a CUDA graph asks for is acted out on a tape, and f is that of steps that are
run. `test_fuzz.py` does so with every kind of Copilot and Pilot, `benchmarks/check_device.py` on a GPU.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_generation import CONFIGS, DECODINGS, NEW_TOKENS, PROMPT, STATES, Recorder, generate, left_padded
from tiny import VOCAB_SIZE, tiny_pilot, tiny_seq2seq, trained_like
from transformers import DynamicCache
from versions import CACHE

from benchmarks import taped
from hf_copilot import CopilotConfig, CopilotLogitsProcessor
from hf_copilot.generation.cuda_graphs import RecordedStep
from hf_copilot.generation.follower import Follower
from hf_copilot.generation.growing_cache import LEAST, GrowingCache


@pytest.fixture(autouse=True)
def tapes(monkeypatch) -> list[torch.Tensor]:
    """The output of every step that is recorded."""
    outputs = []

    def record(run):
        graph = taped.TapedGraph(run)
        outputs.append(graph.output)
        return graph

    monkeypatch.setattr("hf_copilot.generation.logits_processor.recorder", lambda device: record)
    return outputs


def calls(pilot, copilot, recorded, *prompt, **settings):
    torch.manual_seed(0)
    with Recorder(copilot, pilot, cuda_graphs=recorded) as processor:
        generate(pilot, processor, *prompt, **settings)
    return processor.calls


def check(pilot, copilot, *prompt, **settings):
    """Each call is that of steps that are run."""
    found, expected = (calls(pilot, copilot, recorded, *prompt, **settings) for recorded in (True, False))
    assert len(found) == len(expected)
    for (ids, f), (expected_ids, expected_f) in zip(found, expected, strict=True):
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(f, expected_f, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("config", [{}, STATES], ids=["ours", "states"])
def test_every_decoding(pilot, decoding, padded, config, tapes):
    check(
        pilot, trained_like(pilot, CopilotConfig(**config)), *(left_padded() if padded else ()), **DECODINGS[decoding]
    )
    reads_anew = config == STATES and "no_cache" in decoding  # all states at each step, which none is recorded of
    assert len(tapes) == (0 if reads_anew else 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration(pilot, name, tapes):
    check(pilot, trained_like(pilot, CONFIGS[name]), num_beams=3)
    assert len(tapes) == 1


@pytest.mark.parametrize("decoding", ["greedy", "beams"])
def test_an_encoder_decoder(decoding, tapes):
    pilot = tiny_seq2seq().eval()
    check(pilot, trained_like(pilot), *left_padded(), **DECODINGS[decoding])
    assert len(tapes) == 1


def test_one_recording_for_all_runs_of_a_number_of_rows(pilot, tapes):
    copilot = trained_like(pilot)
    with CopilotLogitsProcessor(copilot, pilot, cuda_graphs=True) as processor:
        for prompt in (PROMPT, PROMPT.flip(0), torch.randint(5, VOCAB_SIZE, (3, 7))):
            generate(pilot, processor, prompt)
        assert len(tapes) == 1
        generate(pilot, processor, PROMPT[:2])
    assert [len(output) for output in tapes] == [3, 2]


@pytest.mark.parametrize("config", [{}, STATES], ids=["ours", "states"])
def test_a_long_text_is_recorded_anew_when_it_has_grown(pilot, config, tapes):
    check(pilot, trained_like(pilot, CopilotConfig(**config)), max_new_tokens=LEAST + 6)
    assert len(tapes) == 3  # the memory has no more room, and then the run


def test_weights_that_lie_elsewhere_are_recorded_anew(pilot, tapes):
    """Those that were changed where they lie are not."""
    copilot, other = trained_like(pilot), trained_like(pilot, seed=5)
    with Recorder(copilot, pilot, cuda_graphs=True) as processor:
        generate(pilot, processor)
        copilot.load_state_dict(other.state_dict())
        generate(pilot, processor)
        assert len(tapes) == 1
        copilot.layers[0] = trained_like(pilot).layers[0]
        generate(pilot, processor)
    assert len(tapes) == 2
    expected = calls(pilot, copilot, False)[1:], calls(pilot, other, False)[1:]
    for found, (_, f) in zip(processor.calls[-NEW_TOKENS + 1 :], expected[0], strict=True):
        torch.testing.assert_close(found[1], f, rtol=1e-4, atol=1e-4)
    for found, (_, f) in zip(processor.calls[NEW_TOKENS + 1 : 2 * NEW_TOKENS], expected[1], strict=True):
        torch.testing.assert_close(found[1], f, rtol=1e-4, atol=1e-4)


def test_a_pilot_that_lends_other_matrices_is_recorded_anew(pilot, tapes):
    copilot = trained_like(pilot, CopilotConfig(vocab_projection="pilot"))
    with Recorder(copilot, pilot, cuda_graphs=True) as processor:
        generate(pilot, processor)
        for module in (pilot.model.embed_tokens, pilot.lm_head):
            module.weight = torch.nn.Parameter(module.weight.flip(0))
        generate(pilot, processor)
    assert len(tapes) == 2
    for found, (_, f) in zip(processor.calls[NEW_TOKENS:], calls(pilot, copilot, False), strict=True):
        torch.testing.assert_close(found[1], f, rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_reaches_no_later_run(pilot):
    copilot = trained_like(pilot, CopilotConfig(**STATES))
    weight = copilot.layers[0].attention.v_proj.weight
    with Recorder(copilot, pilot, cuda_graphs=True) as processor:
        before = weight.clone()
        weight.data.fill_(torch.nan)
        generate(pilot, processor, max_new_tokens=3 * NEW_TOKENS)
        assert processor.calls[-1][1].isnan().all()
        weight.data.copy_(before)
        generate(pilot, processor)
    assert all(f.isfinite().all() for _, f in processor.calls[-NEW_TOKENS:])


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("config", [{}, STATES], ids=["ours", "states"])
def test_a_run_that_goes_on_outside_of_inference_mode(pilot, config, recorded):
    """What it keeps is written to again."""
    copilot, cache = trained_like(pilot, CopilotConfig(**config)), DynamicCache(config=pilot.config)
    with Recorder(copilot, pilot, cuda_graphs=recorded) as processor:
        with torch.inference_mode():
            text = generate(pilot, processor, cache=cache)
        text = generate(pilot, processor, text.clone(), cache=cache)
    whole = calls(pilot, copilot, False, max_new_tokens=2 * NEW_TOKENS)
    torch.testing.assert_close(processor.calls[-1][1], whole[-1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "decoding", "begins"),
    [
        ({}, "greedy", True),
        ({}, "sampling", True),
        ({}, "static_cache", True),
        ({}, "beams", False),
        ({}, "several", False),
        (STATES, "greedy", False),
    ],
    ids=["greedy", "sampling", "static_cache", "beams", "several", "states"],
)
def test_it_begins_beside_the_pilots_forward(pilot, config, decoding, begins, monkeypatch):
    """As on an accelerator. Where rows may change their places, or the Pilot's states are read, it can't."""
    monkeypatch.setattr(Follower, "waits", False)
    copilot, begun, settings = trained_like(pilot, CopilotConfig(**config)), [], DECODINGS[decoding]
    torch.manual_seed(0)
    with Recorder(copilot, pilot, cuda_graphs=True) as processor:
        pilot.lm_head.register_forward_hook(lambda *_: begun.append(processor.rectifier.begun is not None))
        generate(pilot, processor, *left_padded(), **settings, disable_compile=True)
    assert begun == [False] + [begins] * (NEW_TOKENS - 1)
    monkeypatch.undo()
    for found, expected in zip(processor.calls, calls(pilot, copilot, False, *left_padded(), **settings), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


PREDICTED = {"objective": "rmse", "fusion": "probability", "error_feedback": "predicted"}


class Loop:
    """A decoding loop of one's own, as on an accelerator."""

    def __init__(self, pilot, processor):
        self.pilot, self.processor, self.cache = pilot, processor, DynamicCache(config=pilot.config)

    def forward(self, *tokens):
        ids = torch.tensor([tokens])
        return self.pilot(ids, use_cache=True, **{CACHE: self.cache}).logits[:, -1].float()

    def call(self, ids):
        """On the tokens that are not in the cache yet."""
        return self.processor(torch.tensor([ids]), self.forward(*ids[self.cache.get_seq_length() :]))


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, PREDICTED], ids=["ours", "predicted"])
@pytest.mark.parametrize("in_vain", ["cropped", "failed", "in another thread"])
def test_what_was_begun_beside_another_forward_is_dropped(pilot, config, in_vain, monkeypatch):
    """One that nobody asked about, whose token was taken out of the cache again, or that failed; also where another
    thread goes on. f of the last call is not what it left."""
    monkeypatch.setattr(Follower, "waits", False)
    copilot, begin = trained_like(pilot, CopilotConfig(**config)), PROMPT[0].tolist()
    with CopilotLogitsProcessor(copilot, pilot, cuda_graphs=True) as processor:
        loop = Loop(pilot, processor)
        loop.call(begin), loop.call([*begin, 7])
        if in_vain != "failed":
            loop.forward(8)
            loop.cache.crop(-1)
        else:
            handle = pilot.model.layers[0].register_forward_pre_hook(fails)
            with pytest.raises(torch.OutOfMemoryError):
                loop.forward(8)
            handle.remove()
        assert processor.rectifier.begun is not None
        with ThreadPoolExecutor(1) as other:
            go_on = torch.no_grad()(loop.call)
            found = other.submit(go_on, [*begin, 7, 9]).result() if "thread" in in_vain else go_on([*begin, 7, 9])
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        loop = Loop(pilot, processor)
        loop.call(begin), loop.call([*begin, 7])
        torch.testing.assert_close(found, loop.call([*begin, 7, 9]), rtol=1e-4, atol=1e-4)


def fails(module, args):
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("config", [{}, PREDICTED], ids=["ours", "predicted"])
def test_forwards_of_another_thread_leave_alone_what_was_begun(pilot, config, monkeypatch):
    """Two threads on one Pilot, each with its processor."""
    monkeypatch.setattr(Follower, "waits", False)
    copilot = trained_like(pilot, CopilotConfig(**config))
    texts, starts = {}, []
    start = RecordedStep.start
    monkeypatch.setattr(RecordedStep, "start", lambda self, *args: starts.append(1) or start(self, *args))

    def write(i):
        with CopilotLogitsProcessor(copilot, pilot, cuda_graphs=True) as processor:
            texts[i] = generate(pilot, processor, PROMPT[i : i + 1], max_new_tokens=20)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(starts) == 2 * 19
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        for i in range(2):
            assert torch.equal(texts[i], generate(pilot, processor, PROMPT[i : i + 1], max_new_tokens=20))


def test_another_tensor_in_the_same_place_is_recorded_anew():
    """A cache that was freed, and one of another size."""
    recorded, held = RecordedStep(lambda inputs: inputs["x"] * 2, taped.TapedGraph), torch.zeros(4, 4)
    for written, count in ((held, 1), (held, 1), (held[:2], 1), (held.T, 1)):
        recorded.start({"x": torch.ones(2)}, [written])
        recorded.join()
        assert len(recorded.recordings) == count
        kept = recorded.recordings
        recorded.start({"x": torch.ones(2)}, [written])
        recorded.join()
        assert recorded.recordings is kept
    assert recorded.addresses[0][2] == (1, 4)  # strides


def test_a_step_that_is_recorded_under_autocast_sees_weights_that_change(pilot):
    """Not the casts that autocast kept of them."""
    copilot, other = trained_like(pilot), trained_like(pilot, seed=5)
    with torch.autocast("cpu", torch.bfloat16):
        with Recorder(copilot, pilot, cuda_graphs=True) as processor:
            generate(pilot, processor)
            copilot.load_state_dict(other.state_dict())
            generate(pilot, processor)
        assert_close(processor.calls[NEW_TOKENS:], calls(pilot, other, True))


@pytest.mark.parametrize("recorded", [False, True])
def test_runs_of_another_type_and_under_autocast(pilot, recorded):
    copilot, other = trained_like(pilot), trained_like(pilot, seed=5)
    with Recorder(copilot, pilot, cuda_graphs=recorded) as processor:
        with torch.autocast("cpu", torch.bfloat16):
            generate(pilot, processor)
        copilot.load_state_dict(other.state_dict())
        processor.calls.clear()
        generate(pilot, processor)
        assert_close(processor.calls, calls(pilot, other, False))
        copilot.to(torch.bfloat16)
        processor.calls.clear()
        generate(pilot, processor)
        assert_close(processor.calls, calls(pilot, copilot, False), atol=0.1)


def assert_close(found, expected, atol=1e-4):
    for one, another in zip(found, expected, strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, STATES], ids=["ours", "states"])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_row_that_becomes_several_may_move(pilot, config, recorded, monkeypatch):
    """As on an accelerator: copies of a row change places later."""
    copilot, found = trained_like(pilot, CopilotConfig(**config)), []
    for waits in (False, None):
        monkeypatch.setattr(Follower, "waits", waits)
        with CopilotLogitsProcessor(copilot, pilot, cuda_graphs=recorded) as processor:
            cache, ids = DynamicCache(config=pilot.config), PROMPT[:1]
            processor(ids, pilot(ids, use_cache=True, **{CACHE: cache}).logits[:, -1].float())
            cache.batch_repeat_interleave(3)
            for rows, new in (([0, 0, 0], [7, 8, 9]), ([0, 1, 2], [5, 6, 7]), ([2, 0, 0], [4, 3, 9])):
                if len(ids) == 3:
                    cache.reorder_cache(torch.tensor(rows))
                ids = torch.cat([ids[rows], torch.tensor(new)[:, None]], dim=1)
                logits = pilot(ids[:, -1:], use_cache=True, **{CACHE: cache}).logits[:, -1].float()
                last = processor(ids, logits)
        found.append(last)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_call_that_did_not_end_is_not_gone_on_from():
    cache = GrowingCache(1)
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    cache.length = 3
    with pytest.raises(RuntimeError, match="did not end"):
        cache.keep(4)
    cache.update(torch.full((1, 1, 1, 2), torch.nan), torch.ones(1, 1, 1, 2), 0)  # of a step that was dropped
    cache.keep(0)
    assert not cache.held.any()


def test_without_a_gpu_it_is_refused(pilot, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="asks for a Copilot on a GPU"):
        CopilotLogitsProcessor(trained_like(pilot), pilot, cuda_graphs=True)


def test_a_value_that_the_cpu_asks_for_is_seen(pilot, monkeypatch):
    """A step that could not be recorded raises on the tape too."""
    copilot = trained_like(pilot)
    forward = copilot.norm.forward
    monkeypatch.setattr(copilot.norm, "forward", lambda x: forward(x) if x.sum().item() else x)
    with pytest.raises(RuntimeError, match="asks for a value"):
        calls(tiny_pilot().eval(), copilot, True)

"""The Copilot's step, recorded: what a CUDA graph asks for is acted out on a tape, and f is that of steps that are
run. `test_fuzz.py` does so with every kind of Copilot and Pilot, `benchmarks/check_device.py` on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from test_generation import CONFIGS, DECODINGS, NEW_TOKENS, PROMPT, STATES, Recorder, generate, left_padded
from tiny import VOCAB_SIZE, tiny_pilot, tiny_seq2seq, trained_like
from transformers import DynamicCache
from versions import CACHE

from benchmarks import taped
from hf_copilot import CopilotConfig, CopilotLogitsProcessor
from hf_copilot.generation.follower import Follower
from hf_copilot.generation.static_cache import LEAST


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
        pilot.lm_head.register_forward_hook(lambda *_: begun.append(processor.rectifier.started is not None))
        generate(pilot, processor, *left_padded(), **settings, disable_compile=True)
    assert begun == [False] + [begins] * (NEW_TOKENS - 1)
    monkeypatch.undo()
    for found, expected in zip(processor.calls, calls(pilot, copilot, False, *left_padded(), **settings), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_was_begun_beside_another_forward_is_dropped(pilot, monkeypatch):
    """One that nobody asked about, whose token was taken out of the cache again."""
    monkeypatch.setattr(Follower, "waits", False)
    copilot, cache = trained_like(pilot), DynamicCache(config=pilot.config)

    def call(processor, ids):
        past = cache.get_seq_length()
        logits = pilot(ids[:, past:], use_cache=True, **{CACHE: cache}).logits[:, -1]
        return processor(ids, logits.float())

    texts = [torch.cat([PROMPT[:1], torch.tensor([[token]])], dim=1) for token in (7, 9)]
    with CopilotLogitsProcessor(copilot, pilot, cuda_graphs=True) as processor:
        call(processor, PROMPT[:1])
        pilot(texts[0][:, -1:], use_cache=True, **{CACHE: cache})
        assert processor.rectifier.started is not None
        cache.crop(-1)
        found = call(processor, texts[1])
        cache = DynamicCache(config=pilot.config)
        with CopilotLogitsProcessor(copilot, pilot) as fresh:
            call(fresh, PROMPT[:1])
            torch.testing.assert_close(found, call(fresh, texts[1]), rtol=1e-4, atol=1e-4)


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

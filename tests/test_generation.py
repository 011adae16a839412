"""The Copilot inside `model.generate`: the incremental path equals the training path, whatever the decoding."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from tiny import VOCAB_SIZE, check_every_row, teacher_forced, tiny_pilot, trained_like
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    LogitsProcessor,
    StaticCache,
    TextStreamer,
    pipeline,
)
from versions import CACHE

from hf_copilot import CopilotConfig, CopilotLogitsProcessor
from hf_copilot.generation import logits_processor
from hf_copilot.pilot import tap

NEW_TOKENS = 8
PROMPT = torch.tensor([[5, 15, 6, 17], [8, 15, 9, 17], [7, 15, 11, 17]])


STATES = {"memory": "pilot"}


@pytest.fixture(params=[{}, STATES, STATES | {"position_embedding": "none"}], ids=["ours", "states", "unplaced"])
def config(request):
    """Of a Copilot that reads tokens alone, of one that reads the Pilot's states, and of one without positions."""
    return CopilotConfig(**request.param)


class Recorder(CopilotLogitsProcessor):
    """Keeps the tokens and f of every call."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []
        follow = self.rectifier.correction

        def correction(input_ids):
            f = follow(input_ids)
            self.calls.append((input_ids.clone(), f.clone()))
            return f

        self.rectifier.correction = correction


def left_padded():
    """Three prompts of different lengths, left-padded with 0."""
    ids = torch.tensor([[0, 0, 5, 15, 6, 17], [5, 6, 15, 9, 9, 17], [0, 7, 15, 11, 6, 17]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    return ids, mask


def generate(pilot, processor, ids=PROMPT, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    if "cache" in kwargs:
        kwargs[CACHE] = kwargs.pop("cache")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | kwargs
    processors = [] if processor is None else [processor]
    return pilot.generate(input_ids=ids, attention_mask=mask, logits_processor=processors, **settings)


def check_against_training_path(copilot, pilot, calls, prompt_length, padding):
    """f of every row of every call equals f of the same tokens, teacher-forced, without the padding."""
    rows = [(padding(row), row, row_f) for ids, f in calls for row, row_f in zip(ids, f, strict=True)]
    found = [(prompt_length - pads, row[pads:], row_f) for pads, row, row_f in rows]

    def labelled(prompt: int, row: list[int]) -> dict[str, list[int]]:
        ids = [*row, row[-1]]  # the last makes the one before it a target
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}

    check_every_row(copilot, pilot, found, labelled, 1e-4)


DECODINGS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "beam_sample": {"num_beams": 3, "do_sample": True},
    "returned_beams": {"num_beams": 4, "num_return_sequences": 3},
    "no_cache": {"use_cache": False},
    "no_cache_beams": {"use_cache": False, "num_beams": 3},
    "chunked_prefill": {"prefill_chunk_size": 2},
    "static_cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_incremental_equals_teacher_forced(pilot, decoding, padded, config):
    copilot = trained_like(pilot, config)
    ids, mask = left_padded() if padded else (PROMPT, None)
    torch.manual_seed(0)
    with Recorder(copilot, pilot) as processor:
        generate(pilot, processor, ids, mask, **DECODINGS[decoding])
    assert len(processor.calls) == NEW_TOKENS
    pads = (lambda row: int((row != 0).int().argmax())) if padded else (lambda row: 0)
    check_against_training_path(copilot, pilot, processor.calls, ids.shape[1], pads)


CONFIGS = {
    "paper": CopilotConfig.paper(num_hidden_layers=2, error_feedback="realized", top_k=VOCAB_SIZE),
    "states_pattern2_lag0": CopilotConfig(**STATES, pattern=2, num_hidden_layers=1, hidden_state_lag=0),
    "token_max_half": CopilotConfig(**STATES, copilot_input="token", pooling="max", pooled_layers="second_half"),
    "pilot_vocabulary": CopilotConfig(vocab_projection="pilot"),
    "fed_tokens": CopilotConfig(copilot_input="token"),
    "pattern2": CopilotConfig(pattern=2, num_hidden_layers=1),
    "tokens_unplaced": CopilotConfig(position_embedding="none"),
    "tokens_paper": CopilotConfig.paper(memory="tokens", num_hidden_layers=2, error_feedback="realized"),
    "narrow_pilot_vocabulary": CopilotConfig(
        init="random", hidden_size=16, num_attention_heads=2, vocab_projection="pilot"
    ),
    "narrow_random": CopilotConfig(init="random", hidden_size=16, num_attention_heads=2, num_hidden_layers=3, top_k=5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_incremental_equals_teacher_forced(pilot, name):
    copilot = trained_like(pilot, CONFIGS[name])
    with Recorder(copilot, pilot, strength=0.3) as processor:
        generate(pilot, processor, num_beams=3)
    check_against_training_path(copilot, pilot, processor.calls, PROMPT.shape[1], lambda row: 0)


def test_beams_really_reorder(pilot):
    """The beam tests above would prove nothing if no row ever changed its place."""
    copilot, steps = trained_like(pilot), []
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        follow = processor.rectifier.follower.follow
        processor.rectifier.follower.follow = lambda ids: steps.append(follow(ids)) or steps[-1]
        generate(pilot, processor, num_beams=4)
    assert sum(step.rows is not None for step in steps) >= 3


@pytest.mark.parametrize("decoding", ["greedy", "sampling", "beams", "returned_beams"])
@pytest.mark.parametrize("fusion", ["logit", "probability"])
def test_zero_strength_is_the_bare_pilot(pilot, decoding, fusion):
    config = CopilotConfig() if fusion == "logit" else CopilotConfig.paper(num_hidden_layers=2)
    outputs = []
    for processor in (None, CopilotLogitsProcessor(trained_like(pilot, config), pilot, strength=0.0)):
        torch.manual_seed(1)
        settings = {"output_scores": True, "return_dict_in_generate": True}
        outputs.append(generate(pilot, processor, **DECODINGS[decoding], **settings))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert all(torch.equal(*pair) for pair in zip(outputs[0].scores, outputs[1].scores, strict=True))
    assert count_hooks(pilot) == 0 and processor.rectifier is None


@pytest.mark.parametrize("decoding", ["greedy", "beams"])
def test_fresh_copilot_changes_nothing(pilot, decoding):
    from hf_copilot import copilot_for

    settings = {"output_scores": True, "return_dict_in_generate": True} | DECODINGS[decoding]
    bare = generate(pilot, None, **settings)
    with CopilotLogitsProcessor(copilot_for(pilot), pilot) as processor:
        fresh = generate(pilot, processor, **settings)
    assert all(torch.equal(*pair) for pair in zip(bare.scores, fresh.scores, strict=True))
    with CopilotLogitsProcessor(copilot_for(pilot, CopilotConfig.paper(num_hidden_layers=2)), pilot) as processor:
        fresh = generate(pilot, processor, **settings)
    for a, b in zip(bare.scores, fresh.scores, strict=True):
        assert (a.softmax(-1) - b.softmax(-1)).abs().max() < 1e-6


def test_the_copilot_changes_the_text(pilot):
    with CopilotLogitsProcessor(trained_like(pilot), pilot) as processor:
        assert not torch.equal(generate(pilot, processor), generate(pilot, None))


@pytest.mark.parametrize("decoding", ["greedy", "beams"])
def test_batch_equals_single(pilot, decoding, config):
    copilot = trained_like(pilot, config)
    ids, mask = left_padded()
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        together = generate(pilot, processor, ids, mask, **DECODINGS[decoding])
        for row, row_mask, expected in zip(ids, mask, together, strict=True):
            alone = generate(pilot, processor, row[None, row_mask.bool()], **DECODINGS[decoding])
            assert torch.equal(alone[0, -NEW_TOKENS:], expected[-NEW_TOKENS:])


@pytest.mark.parametrize("decoding", ["greedy", "beams"])
def test_rows_of_equal_ids_and_other_padding_are_not_confused(pilot, decoding, config):
    """Pad tokens are ordinary tokens in one row and padding in the other."""
    copilot = trained_like(pilot, config)
    ids = torch.tensor([[0, 0, 5, 15, 6, 17]] * 2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        together = generate(pilot, processor, ids, mask, **DECODINGS[decoding])
        for row in range(2):
            alone = generate(pilot, processor, ids[row : row + 1], mask[row : row + 1], **DECODINGS[decoding])
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("decoding", ["greedy", "beams", "static_cache"])
def test_a_sliding_window(decoding, config):
    """Masks and caches that are narrower than the text."""
    pilot = tiny_pilot("mistral", sliding_window=4).eval()
    copilot = trained_like(pilot, config)
    ids, mask = left_padded()
    with Recorder(copilot, pilot) as processor:
        generate(pilot, processor, ids, mask, **DECODINGS[decoding])
    pads = lambda row: int((row != 0).int().argmax())  # noqa: E731
    check_against_training_path(copilot, pilot, processor.calls, ids.shape[1], pads)


def test_generating_on_continues_the_text(pilot):
    """Documented: 3 tokens and then 5 more are the 8 of one call."""
    with CopilotLogitsProcessor(trained_like(pilot), pilot) as processor:
        whole = generate(pilot, processor)
        part = generate(pilot, processor, max_new_tokens=3)
        assert torch.equal(generate(pilot, processor, part, max_new_tokens=5), whole)


def test_all_caches_give_the_same_text(pilot):
    copilot, texts = trained_like(pilot), []
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        for decoding in ("greedy", "no_cache", "chunked_prefill", "static_cache"):
            texts.append(generate(pilot, processor, **DECODINGS[decoding]))
    assert all(torch.equal(texts[0], text) for text in texts[1:])


def test_a_prompt_again_in_chunks_after_the_pilot_has_changed(pilot, config):
    """As when generating between the steps of its training: nothing is kept of what it was."""
    copilot = trained_like(pilot, config)
    with Recorder(copilot, pilot) as processor:
        generate(pilot, processor, prefill_chunk_size=2)
        with torch.no_grad():
            pilot.model.layers[0].mlp.up_proj.weight.neg_()
        processor.calls.clear()
        generate(pilot, processor, prefill_chunk_size=2)
    check_against_training_path(copilot, pilot, processor.calls, PROMPT.shape[1], lambda row: 0)


@pytest.mark.parametrize("window", [None, 4])
def test_chat_on_a_kept_cache(pilot, window, config):
    """Two turns on one cache: the second turn is a new run over the memory of the whole chat. A static cache with a
    window shows a mask of the window alone."""
    cache = DynamicCache(config=pilot.config)
    if window is not None:
        pilot = tiny_pilot("mistral", sliding_window=window).eval()
        cache = StaticCache(config=pilot.config, max_cache_len=64)
    copilot = trained_like(pilot, config)
    with Recorder(copilot, pilot) as processor:
        first = generate(pilot, processor, cache=cache)
        turn = torch.cat([first, PROMPT], dim=1)
        kept_length = cache.get_seq_length()
        processor.calls.clear()
        generate(pilot, processor, turn, cache=cache)
    assert kept_length == first.shape[1] - 1
    check_against_training_path(copilot, pilot, processor.calls, turn.shape[1], lambda row: 0)


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_a_chat_in_which_a_row_ended_early(pilot, cache, config):
    """The second turn masks what stands behind that row's end; kept cache equals none and no hole."""
    copilot, turns = trained_like(pilot, config), {}
    for name in ("kept", "none"):
        kept = cache(config=pilot.config, max_cache_len=64) if cache is StaticCache else cache(config=pilot.config)
        with Recorder(copilot, pilot) as processor:
            end = generate(pilot, processor)[0, PROMPT.shape[1] + 1].item()  # the first row's second new token
            first = generate(pilot, processor, eos_token_id=end, cache=kept)
            turn, new = torch.cat([first, PROMPT], dim=1), first[:, PROMPT.shape[1] :]
            mask = torch.ones_like(turn)
            mask[:, PROMPT.shape[1] : first.shape[1]] = ((new == end).cumsum(1) - (new == end).int()) == 0
            processor.calls.clear()
            cached = {"cache": kept} if name == "kept" else {}
            turns[name] = generate(pilot, processor, turn, mask, **cached), processor.calls
    assert (mask == 0).any() and (mask[1:] == 1).any(0).all()
    assert torch.equal(turns["kept"][0], turns["none"][0])
    for (ids, f), (_, expected) in zip(turns["kept"][1], turns["none"][1], strict=True):
        torch.testing.assert_close(f, expected, atol=1e-4, rtol=0)
        for row, row_f, row_mask in zip(ids, f, mask, strict=True):
            whole = torch.cat([row[: len(row_mask)][row_mask.bool()], row[len(row_mask) :]])
            alone = teacher_forced(copilot, pilot, whole, int(row_mask.sum()))[-1]
            torch.testing.assert_close(row_f, alone, atol=1e-4, rtol=0)


def test_a_cropped_cache_is_followed(pilot, config):
    copilot, cache = trained_like(pilot, config), DynamicCache(config=pilot.config)
    with Recorder(copilot, pilot) as processor:
        first = generate(pilot, processor, cache=cache)
        cache.crop(-4)
        turn = torch.cat([first[:, : cache.get_seq_length()], PROMPT], dim=1)
        processor.calls.clear()
        generate(pilot, processor, turn, cache=cache)
    check_against_training_path(copilot, pilot, processor.calls, turn.shape[1], lambda row: 0)


def test_other_forwards_between_the_turns_of_a_chat(pilot, config):
    """A bare forward, a bare text and another processor's, on a kept cache: none of them disturbs it."""
    copilot, cache = trained_like(pilot, config), DynamicCache(config=pilot.config)
    with Recorder(copilot, pilot) as processor, CopilotLogitsProcessor(copilot, pilot) as another:
        first = generate(pilot, processor, cache=cache)
        with torch.no_grad():
            pilot(PROMPT[:1])
        generate(pilot, None)
        assert len(processor.rectifier.follower.pending) < 2 * NEW_TOKENS
        generate(pilot, another, num_beams=2)
        turn = torch.cat([first, PROMPT], dim=1)
        processor.calls.clear()
        generate(pilot, processor, turn, cache=cache)
    check_against_training_path(copilot, pilot, processor.calls, turn.shape[1], lambda row: 0)


def test_going_on_with_beams(pilot, config):
    """The number of rows changes in a text that goes on."""
    copilot = trained_like(pilot, config)
    with Recorder(copilot, pilot) as processor:
        part = generate(pilot, processor, max_new_tokens=3)
        processor.calls.clear()
        generate(pilot, processor, part, num_beams=3)
    check_against_training_path(copilot, pilot, processor.calls, PROMPT.shape[1], lambda row: 0)


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=True)  # nobody has opened a tap yet
def test_a_compiled_static_cache(pilot, config, monkeypatch):
    """As on a GPU, where transformers compiles the forward: before there is a processor, and with several of them."""
    monkeypatch.setattr(tap, "compiled_without_guards", True)
    compiling = CompileConfig(mode="default", backend="eager")
    compiling._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": compiling}
    copilot = trained_like(pilot, config)
    generate(pilot, None, **settings)
    for _ in range(2):
        with CopilotLogitsProcessor(copilot, pilot) as processor:
            compiled = generate(pilot, processor, **settings)
            assert torch.equal(compiled, generate(pilot, processor))
        bare = generate(pilot, None, **settings)
        assert torch.equal(bare, generate(pilot, None)) and not torch.equal(bare, compiled)


@pytest.mark.parametrize("cache", [None, "static"])
@torch.compiler.set_stance("force_eager")
def test_the_masks_of_flex_attention(config, cache):
    """They are functions; with a static cache every forward is given one."""
    sizes = {"head_dim": 16, "hidden_size": 64, "intermediate_size": 64}
    pilot, flex = tiny_pilot(**sizes).eval(), tiny_pilot(**sizes).eval()
    flex.set_attn_implementation("flex_attention")
    copilot, (ids, mask) = trained_like(pilot, config), left_padded()
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        expected = generate(pilot, processor, ids, mask)
    with CopilotLogitsProcessor(copilot, flex) as processor:
        assert torch.equal(generate(flex, processor, ids, mask, cache_implementation=cache), expected)


@pytest.fixture(params=[{}, STATES], ids=["tokens", "states"])
def unseen(request, pilot):
    """A Copilot, and what becomes of a cache with tokens that its processor has not seen: states are lost, tokens are
    read anew."""
    refused = contextlib.nullcontext() if not request.param else pytest.raises(ValueError, match="not seen")
    return trained_like(pilot, CopilotConfig(**request.param)), refused


def test_a_cache_filled_before_the_processor(pilot, unseen):
    (copilot, refused), cache = unseen, DynamicCache(config=pilot.config)
    ids, mask = left_padded()
    first = generate(pilot, None, ids, mask, cache=cache)
    turn = torch.cat([first, PROMPT], dim=1)
    mask = torch.cat([mask, torch.ones(len(ids), turn.shape[1] - ids.shape[1], dtype=mask.dtype)], dim=1)
    with Recorder(copilot, pilot) as processor, refused:
        generate(pilot, processor, turn, mask, cache=cache)
    check_against_training_path(
        copilot, pilot, processor.calls, turn.shape[1], lambda row: int(row.bool().int().argmax())
    )
    assert len(processor.calls) == (0 if copilot.config.reads_states else NEW_TOKENS)


def test_chats_that_take_turns_on_one_processor(pilot, unseen):
    copilot, refused = unseen
    caches, turns = [DynamicCache(config=pilot.config) for _ in range(2)], [PROMPT[:1], PROMPT[1:]]
    with Recorder(copilot, pilot) as processor, refused:
        for chat in (0, 1, 0, 1):
            processor.calls.clear()
            text = generate(pilot, processor, turns[chat], cache=caches[chat])
            check_against_training_path(copilot, pilot, processor.calls, turns[chat].shape[1], lambda row: 0)
            turns[chat] = torch.cat([text, PROMPT[:1].expand(len(text), -1)], dim=1)


@pytest.mark.parametrize("window", [None, 4])
def test_a_prefix_cache_that_is_repeated(pilot, unseen, window):
    """One system prompt for a batch."""
    copilot, refused = unseen
    if window is not None:
        pilot = tiny_pilot("mistral", sliding_window=window).eval()
        copilot = trained_like(pilot, copilot.config)
    cache = DynamicCache(config=pilot.config)
    with torch.no_grad():
        pilot(PROMPT[:1], **{CACHE: cache})
    cache.batch_repeat_interleave(len(PROMPT))
    turn = torch.cat([PROMPT[:1].expand(len(PROMPT), -1), PROMPT], dim=1)
    with Recorder(copilot, pilot) as processor, refused:
        generate(pilot, processor, turn, cache=cache)
    check_against_training_path(copilot, pilot, processor.calls, turn.shape[1], lambda row: 0)


@pytest.mark.parametrize("rows", [[0, 1], [2, 0]], ids=["first", "others"])
def test_a_batch_of_which_some_rows_go_on(pilot, unseen, rows):
    copilot, refused = unseen
    cache, selected = DynamicCache(config=pilot.config), torch.tensor(rows)
    with Recorder(copilot, pilot) as processor:
        text = generate(pilot, processor, cache=cache)
        cache.batch_select_indices(selected)
        text = torch.cat([text[selected], torch.tensor([[6], [9]])], dim=1)
        processor.calls.clear()
        generate(pilot, processor, text, cache=cache)
    check_against_training_path(copilot, pilot, processor.calls, text.shape[1], lambda row: 0)


def test_a_static_window_that_hides_an_unseen_cache_raises():
    """Which of the hidden tokens are padding nobody can tell."""
    pilot = tiny_pilot("mistral", sliding_window=4).eval()
    cache = StaticCache(config=pilot.config, max_cache_len=64)
    first = generate(pilot, None, cache=cache)
    with CopilotLogitsProcessor(trained_like(pilot), pilot) as processor, pytest.raises(ValueError, match="not seen"):
        generate(pilot, processor, torch.cat([first, PROMPT], dim=1), cache=cache)


def test_several_calls_in_a_row_and_between_other_forwards(pilot):
    copilot = trained_like(pilot)
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        first = generate(pilot, processor)
        pilot(input_ids=PROMPT[:, :3], labels=PROMPT[:, :3]).loss.backward()  # a training step in between
        pilot.zero_grad()
        with torch.no_grad():
            pilot(input_ids=PROMPT[:1])
        assert torch.equal(generate(pilot, processor, num_beams=2), generate(pilot, processor, num_beams=2))
        assert torch.equal(generate(pilot, processor), first)


class Ban(LogitsProcessor):
    """Bans the upper half of the vocabulary."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.arange(VOCAB_SIZE // 2, VOCAB_SIZE), -torch.inf)


@pytest.mark.parametrize("fusion", ["logit", "probability"])
@pytest.mark.parametrize("decoding", ["sampling", "beams"])
def test_banned_tokens_stay_banned(pilot, fusion, decoding):
    config = CopilotConfig() if fusion == "logit" else CopilotConfig.paper(num_hidden_layers=2)
    torch.manual_seed(0)
    settings = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "output_scores": True, "eos_token_id": None}
    with CopilotLogitsProcessor(trained_like(pilot, config), pilot) as processor:
        out = pilot.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            logits_processor=[Ban(), processor],
            return_dict_in_generate=True,
            **settings,
            **DECODINGS[decoding],
        )
    assert (out.sequences[:, PROMPT.shape[1] :] < VOCAB_SIZE // 2).all()
    assert all((scores[:, VOCAB_SIZE // 2 :] == -torch.inf).all() for scores in out.scores)


def test_streamer_and_pipeline_give_the_same_text(pilot, tokenizer, capsys):
    text = "12+34="
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with CopilotLogitsProcessor(trained_like(pilot), pilot, tokenizer=tokenizer) as processor:
        plain = generate(pilot, processor, ids)
        streamed = generate(pilot, processor, ids, streamer=TextStreamer(tokenizer))
        assert torch.equal(plain, streamed) and capsys.readouterr().out
        pipe = pipeline("text-generation", model=pilot, tokenizer=tokenizer)
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        (out,) = pipe(text, logits_processor=[processor], return_tensors=True, **settings)
    assert out["generated_token_ids"] == plain[0].tolist()


def test_a_dispatched_pilot(pilot):
    """Weights that are elsewhere between forwards, as with device_map: the hooks of accelerate and ours get along."""
    copilot = trained_like(pilot)
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        expected = generate(pilot, processor)
    dispatched = cpu_offload(tiny_pilot().eval(), execution_device=torch.device("cpu"))
    with CopilotLogitsProcessor(copilot, dispatched) as processor:
        assert torch.equal(generate(dispatched, processor), expected)


@pytest.mark.parametrize(
    "unsupported",
    [
        pytest.param({"prompt_lookup_num_tokens": 3}, id="prompt_lookup"),
        pytest.param({"guidance_scale": 1.5}, id="guidance"),
        pytest.param({"assistant": True}, id="assistant"),
    ],
)
def test_unsupported_decoding_raises(pilot, unsupported):
    settings = dict(unsupported)
    if settings.pop("assistant", False):
        settings["assistant_model"] = tiny_pilot(seed=1).eval()
    ids = torch.tensor([[5, 15, 6, 17, 5, 15, 6]])
    with CopilotLogitsProcessor(trained_like(pilot), pilot) as processor, pytest.raises(ValueError, match="detached"):
        generate(pilot, processor, ids, **settings)


def test_inputs_embeds_raise(pilot):
    embeds = pilot.get_input_embeddings()(PROMPT)
    with CopilotLogitsProcessor(trained_like(pilot), pilot) as processor, pytest.raises(ValueError, match="embeds"):
        pilot.generate(inputs_embeds=embeds, logits_processor=[processor], max_new_tokens=2)


def test_another_pilot_raises(pilot):
    other = tiny_pilot(seed=3).eval()
    with CopilotLogitsProcessor(trained_like(pilot), pilot) as processor, pytest.raises(ValueError, match="not just"):
        generate(other, processor)


def test_lora_and_merged_pilot(pilot):
    copilot = trained_like(pilot)
    lora = get_peft_model(pilot, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)).eval()
    with Recorder(copilot, lora) as processor:
        wrapped = generate(lora, processor)
    check_against_training_path(copilot, lora, processor.calls, PROMPT.shape[1], lambda row: 0)
    merged = lora.merge_and_unload()
    with CopilotLogitsProcessor(copilot, merged) as processor:
        assert torch.equal(generate(merged, processor), wrapped)


def test_a_failure_leaves_the_copilot_in_its_mode(pilot, monkeypatch):
    copilot = trained_like(pilot).train()

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(copilot.layers[0], "forward", fails)
    with CopilotLogitsProcessor(copilot, pilot) as processor, pytest.raises(torch.OutOfMemoryError):
        pilot.generate(PROMPT, logits_processor=[processor], max_new_tokens=2)
    assert copilot.training and all(module.training for module in copilot.modules())


def test_copilot_of_another_dtype_and_in_training_mode(pilot):
    copilot = trained_like(pilot)
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        expected = generate(pilot, processor, output_scores=True, return_dict_in_generate=True)
    copilot.to(torch.float64).train()
    copilot.layers[0].dropout.p = 0.5
    with CopilotLogitsProcessor(copilot, pilot) as processor:
        found = generate(pilot, processor, output_scores=True, return_dict_in_generate=True)
    assert copilot.training
    for a, b in zip(expected.scores, found.scores, strict=True):
        assert torch.allclose(a, b.float(), atol=1e-4)
    half = tiny_pilot().eval().to(torch.bfloat16)
    with CopilotLogitsProcessor(copilot, half) as processor:
        assert generate(half, processor).shape == expected.sequences.shape


def count_hooks(pilot):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pilot.modules())


def test_hooks_go_and_others_stay(pilot):
    foreign = pilot.model.layers[1].register_forward_hook(lambda *args: None)
    before = count_hooks(pilot)
    copilot = trained_like(pilot)
    processor = CopilotLogitsProcessor(copilot, pilot)
    assert count_hooks(pilot) > before
    processor.detach()
    assert count_hooks(pilot) == before
    with pytest.raises(RuntimeError), CopilotLogitsProcessor(copilot, pilot):
        raise RuntimeError
    assert count_hooks(pilot) == before
    processor = CopilotLogitsProcessor(copilot, pilot)
    del processor
    gc.collect()
    assert count_hooks(pilot) == before
    foreign.remove()


@pytest.mark.parametrize("strength", [-0.1, float("inf"), float("nan")])
def test_bad_strength_raises(pilot, strength):
    with pytest.raises(ValueError, match="finite"):
        CopilotLogitsProcessor(trained_like(pilot), pilot, strength=strength)


def test_the_strength_can_be_changed_where_there_are_hooks(pilot):
    copilot = trained_like(pilot)
    with CopilotLogitsProcessor(copilot, pilot, strength=0.3) as processor:
        processor.strength = 1.5
        with CopilotLogitsProcessor(copilot, pilot, strength=1.5) as other:
            assert torch.equal(generate(pilot, processor), generate(pilot, other))
    bare = CopilotLogitsProcessor(copilot, pilot, strength=0.0)
    bare.strength = 0.0
    with pytest.raises(ValueError, match="made at λ = 0"):
        bare.strength = 1.0


def test_autocast_may_come_and_go(pilot, config):
    """A kept processor's keys and values are of the type that they were made in."""
    with CopilotLogitsProcessor(trained_like(pilot, config), pilot) as processor:
        with torch.autocast("cpu", torch.bfloat16):
            begun = generate(pilot, processor, max_new_tokens=3)
        assert generate(pilot, processor, begun, max_new_tokens=3).shape[1] == begun.shape[1] + 3


def test_a_whole_graph_of_the_pilot_says_what_it_asks_for(pilot):
    with CopilotLogitsProcessor(trained_like(pilot), pilot) as processor:
        pilot.forward = torch.compile(pilot.forward, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="compile with fullgraph=False"):
            generate(pilot, processor)


def test_nan_scores_stay_nan(pilot):
    """Documented: rows of NaN are passed on, as without a Copilot; other rows are rectified."""
    with CopilotLogitsProcessor(trained_like(pilot), pilot) as processor:
        with torch.no_grad():
            pilot(input_ids=PROMPT)
        scores = torch.zeros(3, VOCAB_SIZE)
        scores[1] = torch.nan
        out = processor(PROMPT, scores)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_predicted_feedback_feeds_the_last_correction(pilot):
    """Algorithm 2: the input at step i is f_{i-1} through the input projection."""
    copilot = trained_like(pilot, CopilotConfig.paper(num_hidden_layers=2))
    fed = []
    copilot.layers[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].clone()))
    with Recorder(copilot, pilot) as processor:
        generate(pilot, processor)
    assert torch.allclose(fed[0], copilot.start.weight.expand_as(fed[0]))
    for step in range(1, NEW_TOKENS):
        expected = processor.calls[step - 1][1] @ copilot.embed_tokens.weight
        assert torch.allclose(fed[step][:, 0], expected, atol=1e-5)


def test_predicted_feedback_after_a_token_without_a_row(pilot, tokenizer):
    """The start vector, as in training."""
    from hf_copilot.pilot.compatibility import tokenizer_fingerprint

    wide, copilot = tiny_pilot(vocab_size=VOCAB_SIZE + 8).eval(), trained_like(pilot, CopilotConfig.paper())
    copilot.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    fed, ids = [], PROMPT
    copilot.layers[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].clone()))
    with CopilotLogitsProcessor(copilot, wide, tokenizer=tokenizer) as processor, torch.no_grad():
        for token in (5, VOCAB_SIZE + 2, 5):
            processor(ids, wide(ids).logits[:, -1].float())
            ids = torch.cat([ids, torch.full((3, 1), token)], dim=1)
    is_start = [torch.allclose(step, copilot.start.weight.expand_as(step)) for step in fed]
    assert is_start == [True, False, True]


def test_padding_rows_of_the_pilot_are_left_alone(pilot, tokenizer, config):
    from hf_copilot.pilot.compatibility import tokenizer_fingerprint

    wide = tiny_pilot(vocab_size=VOCAB_SIZE + 8).eval()
    copilot = trained_like(pilot, config)
    with pytest.raises(ValueError, match="vocabulary rows"):
        CopilotLogitsProcessor(copilot, wide)
    copilot.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    with warnings.catch_warnings(), CopilotLogitsProcessor(copilot, wide, tokenizer=tokenizer) as processor:
        warnings.simplefilter("error")
        out = generate(wide, processor, output_scores=True, return_dict_in_generate=True)
    assert out.scores[0].shape[1] == VOCAB_SIZE + 8
    beyond = torch.cat([PROMPT, torch.full((3, 1), VOCAB_SIZE + 2)], dim=1)
    with CopilotLogitsProcessor(copilot, wide, tokenizer=tokenizer) as processor:
        torch.manual_seed(0)
        sampled = generate(wide, processor, beyond, do_sample=True, temperature=20.0, max_new_tokens=20)
    assert (sampled[:, beyond.shape[1] :] >= VOCAB_SIZE).any()


def test_continuous_batching_gives_no_unrectified_text(pilot):
    """It drops processors; the hook fails its forwards, so nothing is generated."""
    cache = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # by default most of the free memory
    settings = {"cache_implementation": "paged", "continuous_batching_config": cache, "eos_token_id": -1}
    with CopilotLogitsProcessor(trained_like(pilot), pilot) as processor:
        out = generate(pilot, processor, PROMPT[:1], **settings)
    assert torch.as_tensor(out).flatten().tolist() == PROMPT[0].tolist()


def test_a_decoding_loop_with_gradients_is_named(pilot):
    ids = PROMPT[:1]
    with CopilotLogitsProcessor(trained_like(pilot), pilot) as processor:
        logits = pilot(ids).logits[:, -1]
        with pytest.raises(ValueError, match="no_grad"):
            processor(ids, logits.float())
        with torch.no_grad():
            logits = pilot(ids).logits[:, -1]
        assert processor(ids, logits.float()).shape == logits.shape
        with torch.no_grad():
            pilot(ids)  # nobody asks about it
        logits = pilot(ids).logits[:, -1]
        with pytest.raises(ValueError, match="no_grad"):
            processor(ids, logits.float())


@torch.no_grad()
def test_a_failed_step_leaves_nothing_behind(unseen, pilot, monkeypatch):
    """No memory, or Ctrl-C, inside the Copilot: the next call is not fed what belongs to no call. Tokens are read
    anew, states in the Pilot's cache are lost."""
    copilot, refused = unseen
    text, cache = PROMPT[:1], DynamicCache()

    def call(processor, ids, past):
        logits = pilot(ids[:, past:], use_cache=True, **{CACHE: cache}).logits[:, -1].float()
        return processor(ids, logits)

    def fails(inputs):
        raise torch.OutOfMemoryError("no memory")

    with CopilotLogitsProcessor(copilot, pilot) as processor:
        call(processor, text[:, :-2], 0)
        monkeypatch.setattr(processor.rectifier, "_run", fails)
        with pytest.raises(torch.OutOfMemoryError):
            call(processor, text[:, :-1], cache.get_seq_length())
        monkeypatch.undo()
        with refused:
            call(processor, text, cache.get_seq_length())
            found = processor.rectifier.last_correction
            cache = DynamicCache()
            with CopilotLogitsProcessor(copilot, pilot) as fresh:
                call(fresh, text, 0)
                torch.testing.assert_close(found, fresh.rectifier.last_correction, rtol=1e-4, atol=1e-4)


def test_processors_in_threads_compile_nothing_anew(pilot, monkeypatch):
    """The setting that has compiled forwards look for hooks is a thread's, what is compiled the process's."""
    resets, copilot = [], trained_like(pilot)
    monkeypatch.setattr(tap, "compiled_without_guards", True)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    threads = [threading.Thread(target=lambda: CopilotLogitsProcessor(copilot, pilot).detach()) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert resets == [1]


@pytest.mark.parametrize(("device", "says"), [("cuda:0", True), ("cpu", False), ("meta", False)])
def test_a_copilot_that_was_not_moved_to_its_pilot_is_told_of(device, says, monkeypatch):
    """On another accelerator than the Pilot it may be, on the CPU it would be waited for at every token."""
    told = []
    monkeypatch.setattr(logits_processor.logger, "warning_once", lambda text, *args: told.append(text % args))
    pilot = tiny_pilot()
    copilot = trained_like(pilot)
    monkeypatch.setattr(type(pilot), "device", torch.device(device))
    CopilotLogitsProcessor(copilot, pilot, strength=0.0).detach()
    assert not told
    CopilotLogitsProcessor(copilot, pilot).detach()
    assert [f"its Pilot on {device}" in text for text in told] == [True] * says

"""Generation fuzzed: whatever the Pilot, the Copilot and the decoding, f at every step is that of a pass from scratch.

pytest -n 0 tests/test_fuzz.py --hypothesis-profile long --hypothesis-show-statistics   # 2,000 cases
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import transformers
from hypothesis import event, example, given
from hypothesis import strategies as st
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from test_generation import Recorder
from tiny import SEQ2SEQ, VOCAB_SIZE, tiny_pilot, tiny_seq2seq, trained_like
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LogitsProcessor, StaticCache
from versions import CACHE

from benchmarks.taped import pretended_graphs
from hf_copilot import CopilotConfig, CopilotLearner, CopilotLogitsProcessor

# In float64, since in float32 one of thousands of draws is a near tie at the edge of the top-k. Eager attention gives
# NaN there for rows that see nothing: in float32, and with all of the vocabulary.
PILOTS = {
    "llama": lambda **kwargs: tiny_pilot("llama", **kwargs),
    "gpt2": lambda **kwargs: GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE, **kwargs)),  # learned positions
    "mistral": lambda **kwargs: tiny_pilot("mistral", sliding_window=4, **kwargs),
    "gemma2": lambda **kwargs: tiny_pilot("gemma2", sliding_window=4, **kwargs),  # a window in every second layer
    "t5": lambda **kwargs: tiny_seq2seq("t5"),
    "bart": lambda **kwargs: tiny_seq2seq("bart"),
}
TYPES = {"sdpa": torch.float64, "eager": torch.float32}
GPT2_SHAPE = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
GPT2_SHAPE |= {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
# With 5.17 a prompt that is read in chunks on a kept cache is read from its beginning again, without us too.
CHUNKS_ON_KEPT = Version(transformers.__version__) >= Version("5.24")
WINDOWS = ("mistral", "gemma2")
BANNED = [7, 8, 9, 20, 21, 22, 30, 31]

# ---- what is drawn -------------------------------------------------------------------------------------------------

UNSUPPORTED = [{"prompt_lookup_num_tokens": 2}, {"guidance_scale": 1.5}, {"assistant_model": True}]
SAMPLING = st.fixed_dictionaries(
    {"do_sample": st.just(True), "temperature": st.sampled_from([0.5, 1.0, 2.0])},
    optional={"top_k": st.integers(1, 40), "top_p": st.floats(0.1, 1.0), "num_return_sequences": st.integers(1, 3)},
)
BEAMS = st.fixed_dictionaries(
    {"num_beams": st.integers(2, 4)},
    optional={
        "do_sample": st.booleans(),
        "num_return_sequences": st.integers(1, 2),
        "length_penalty": st.sampled_from([-1.0, 0.0, 2.0]),
        "early_stopping": st.sampled_from([True, False, "never"]),
    },
)
COMPANIONS = st.fixed_dictionaries(
    {},
    optional={
        "min_new_tokens": st.integers(1, 4),
        "repetition_penalty": st.floats(0.5, 2.0),
        "no_repeat_ngram_size": st.integers(1, 3),
        "bad_words_ids": st.just([[token] for token in BANNED]),
        "suppress_tokens": st.just(BANNED),
        "renormalize_logits": st.booleans(),
        "remove_invalid_values": st.booleans(),
        "output_hidden_states": st.booleans(),
    },
)
CACHES = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
ENDS = st.sampled_from([token for token in range(5, VOCAB_SIZE) if token not in BANNED])
TOKENS = st.integers(0, VOCAB_SIZE - 1)  # the padding token is an ordinary one too


@dataclass(frozen=True)
class Turn:
    """One `generate` call, on the text of the last one and some more tokens."""

    more: list[int]
    settings: dict[str, Any]
    adapter: str | None = None  # of a Pilot with two adapters; "none" switches them off
    hides_ends: bool = False  # mask what stands behind the end of a row
    other_forward: bool = False  # of the Pilot, before this turn


@dataclass(frozen=True)
class Case:
    family: str
    config: dict[str, Any]
    prompts: list[list[int]]
    turns: list[Turn]
    strength: float = 1.0
    attention: str = "sdpa"
    padding: int = 0  # on the left of the longest prompt
    kept: str | None = None  # a cache that is kept over all turns
    bans: str | None = None  # another processor, "before" or "after" the Copilot's
    trains: bool = False  # the Copilot is in training mode
    waits: bool | None = None  # False: the tokens of a run that goes on are looked at late, as on an accelerator
    recorded: bool = False  # as a CUDA graph, which is pretended


@st.composite
def configs(draw, family: str, attention: str) -> dict[str, Any]:
    has_encoder = family in SEQ2SEQ
    objective, fusion = draw(st.sampled_from([("cross_entropy", "logit"), ("rmse", "probability")]))
    pattern = draw(st.sampled_from([1, 2]))
    settings = {
        "memory": "pilot" if has_encoder else draw(st.sampled_from(["tokens", "pilot"])),
        "objective": objective,
        "fusion": fusion,
        "error_feedback": draw(st.sampled_from(["realized", "predicted"])) if objective == "rmse" else "realized",
        "copilot_input": draw(st.sampled_from(["both", "discrepancy", "token"])),
        "pattern": pattern,
        "num_hidden_layers": draw(st.integers(2 if pattern == 1 else 1, 3)),
        "position_embedding": "none" if has_encoder else draw(st.sampled_from(["rotary", "none"])),
        "top_k": 64 if attention == "eager" else draw(st.sampled_from([1, 5, 64])),
    }
    if settings["memory"] == "pilot":
        settings |= {
            "hidden_state_lag": draw(st.sampled_from([0, 1])),
            "pooling": draw(st.sampled_from(["mean", "max", "sum"])),
            "pooled_layers": draw(st.sampled_from(["all", "first_half", "second_half"])),
            "vocab_projection": draw(st.sampled_from(["own", "pilot"])),
        }
    if draw(st.booleans()):
        settings |= {"init": "random", "hidden_size": 16, "num_attention_heads": 2}
    return settings


@st.composite
def turns(draw, family: str, kept: str | None, adapters: list[str | None], is_first: bool) -> Turn:
    """Kept caches hold one row for each prompt."""
    search = draw(st.one_of(st.just({}), SAMPLING, *([BEAMS, BEAMS] if kept is None else [])))
    settings = {"max_new_tokens": draw(st.sampled_from([6, 5, 4, 3, 2, 1]))} | search | draw(COMPANIONS)
    if kept is not None:
        settings.pop("num_return_sequences", None)
    else:
        settings |= draw(st.sampled_from(CACHES))
    can_chunk = family not in SEQ2SEQ and (kept is None or CHUNKS_ON_KEPT) and settings.get("use_cache", True)
    if can_chunk and draw(st.integers(0, 3)) == 0:
        settings["prefill_chunk_size"] = draw(st.integers(1, 4))
    if draw(st.booleans()):
        settings["eos_token_id"] = draw(st.lists(ENDS, min_size=1, max_size=12))
    if draw(st.integers(0, 40)) == 23:
        settings = {"max_new_tokens": 4} | draw(st.sampled_from(UNSUPPORTED))
    more = [] if is_first else draw(st.lists(TOKENS, min_size=1, max_size=3))
    hides = family not in WINDOWS and draw(st.booleans())
    return Turn(more, settings, draw(st.sampled_from(adapters)), hides, draw(st.booleans()))


@st.composite
def cases(draw) -> Case:
    family = draw(st.sampled_from(list(PILOTS)))
    has_encoder = family in SEQ2SEQ
    kept = None if has_encoder else draw(st.sampled_from([None, None, "dynamic", "static"]))
    with_adapters = draw(st.integers(0, 3)) == 0
    adapters: list[str | None] = ["one", "two", "none"] if with_adapters and kept is None else [None]
    attention = "eager" if family == "gemma2" else draw(st.sampled_from(["sdpa", "eager"]))
    prompts = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=3))
    count = 1 if has_encoder else draw(st.integers(1, 3))
    return Case(
        family,
        draw(configs(family, attention)),
        prompts if draw(st.integers(0, 3)) else prompts[:1] * 2,
        [draw(turns(family, kept, adapters, is_first=i == 0)) for i in range(count)],
        draw(st.sampled_from([1.0, 0.3, 3.0, 0.0])),
        attention,
        draw(st.integers(0, 2)),
        kept,
        draw(st.sampled_from([None, "before", "after"])),
        draw(st.booleans()),
        draw(st.sampled_from([None, False])),
        draw(st.booleans()),
    )


# ---- what is run ---------------------------------------------------------------------------------------------------


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor(BANNED), -torch.inf)


class Run(NamedTuple):
    """What a turn's calls were asked, and what they gave."""

    calls: list[tuple[torch.Tensor, torch.Tensor]]  # tokens [R, n] and f [R, V]
    mask: torch.Tensor  # [B, n], of the prompts (of the encoder, beside one)
    encoder_ids: torch.Tensor | None
    adapter: str | None


@lru_cache
def plain_pilot(family: str, attention: str):
    kwargs = {} if family in SEQ2SEQ else {"attn_implementation": attention}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PILOTS[family](**kwargs).to(TYPES[attention]).eval()


def make_pilot(case: Case):
    if case.turns[0].adapter is None:
        return plain_pilot(case.family, case.attention)
    pilot = plain_pilot.__wrapped__(case.family, case.attention)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lora = LoraConfig(r=2, init_lora_weights=False)
        pilot = get_peft_model(pilot, lora, adapter_name="one")
        pilot.add_adapter("two", lora)
    return pilot.to(TYPES[case.attention]).eval()


@contextlib.contextmanager
def adapted(pilot, adapter: str | None):
    if adapter in ("one", "two"):
        pilot.set_adapter(adapter)
    with pilot.disable_adapter() if adapter == "none" else contextlib.nullcontext():
        yield


def padded(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts, on the left filled with tokens that are masked, and the mask: `[B, n]` each."""
    n = max(map(len, case.prompts)) + case.padding
    ids = [[11] * (n - len(prompt)) + prompt for prompt in case.prompts]
    mask = [[0] * (n - len(prompt)) + [1] * len(prompt) for prompt in case.prompts]
    return torch.tensor(ids), torch.tensor(mask)


def cache_of(case: Case, pilot):
    if case.kept is None:
        return {}
    return {CACHE: DynamicCache(config=pilot.config) if case.kept == "dynamic" else StaticCache(pilot.config, 64)}


def mask_of_text(text, mask, turn: Turn, extra: int):
    """The mask `[R, n]` of a text and of the tokens that come after it."""
    new = text[:, mask.shape[1] :]
    visible = torch.ones_like(new)
    if turn.hides_ends and turn.settings.get("eos_token_id"):
        ends = torch.isin(new, torch.tensor(turn.settings["eos_token_id"])).int()
        visible = (ends.cumsum(1) - ends == 0).long()  # the end itself is read
    mask = mask.repeat_interleave(len(text) // len(mask), 0)
    return torch.cat([mask, visible, torch.ones(len(text), extra, dtype=mask.dtype)], dim=1)


def converse(case: Case, pilot, processor) -> tuple[list[torch.Tensor], list[Run]]:
    """All turns of a case, with a processor or the bare Pilot: the texts, and what the processor was asked."""
    others = [Ban()] if case.bans else []
    ours = [] if processor is None else [processor]
    processors = others + ours if case.bans == "before" else ours + others
    (ids, mask), cache, texts, runs = padded(case), cache_of(case, pilot), [], []
    encoder_ids = ids if case.family in SEQ2SEQ else None
    for i, turn in enumerate(case.turns):
        if i:
            more = torch.tensor([turn.more] * len(texts[-1]))
            mask = mask_of_text(texts[-1], mask, case.turns[i - 1], len(turn.more))
            ids = torch.cat([texts[-1], more], dim=1)
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | turn.settings
        if settings.get("assistant_model"):
            settings["assistant_model"] = plain_pilot(case.family, case.attention)
        torch.manual_seed(i)
        with adapted(pilot, turn.adapter):
            if turn.other_forward:
                with torch.no_grad():
                    pilot(input_ids=ids, **({"decoder_input_ids": ids} if encoder_ids is not None else {}))
            texts.append(pilot.generate(ids, attention_mask=mask, logits_processor=processors, **settings, **cache))
        if processor is not None and processor.rectifier is not None:
            runs.append(Run(list(processor.calls), mask, encoder_ids, turn.adapter))
            processor.calls.clear()
    return texts, runs


# ---- from scratch --------------------------------------------------------------------------------------------------


@torch.no_grad()
def from_scratch(copilot, pilot, ids, start: int, encoder_ids=None) -> torch.Tensor:
    """f for the tokens after `start` of one row without padding, and for the one after `ids` `[n]`: `[n - s + 1, V]`.

    By the path of training, without any cache."""
    extended = torch.cat([ids, ids[-1:]])[None]  # the last token only makes position n - 1 a target
    inputs = {"input_ids": extended, "labels": extended.clone()}
    inputs["labels"][:, :start] = -100
    if encoder_ids is not None:
        inputs = {"input_ids": encoder_ids[0], "attention_mask": encoder_ids[1], "labels": extended[:, 1:]}
    learner = CopilotLearner(copilot, pilot, log_dtype=torch.float64)
    with learner.observe(inputs):
        pilot(**inputs)
    learner.close()
    (batch,) = learner.forced.batches(learner.round)
    copilot.eval()
    if copilot.config.error_feedback == "realized" or copilot.config.copilot_input == "token":
        return copilot(**batch.inputs, return_logits=True, lent=learner.forced.lent).logits[0]
    return with_predicted_feedback(copilot, batch, learner.forced.lent)


def with_predicted_feedback(copilot, batch, lent) -> torch.Tensor:
    """Algorithm 2: each query is fed f of the one before it; all of them as often as there are queries."""
    embedding, f = copilot.vocabulary(lent).embedding, None
    is_start = batch.inputs["is_start"][..., None]  # [1, m, 1]
    for _ in range(is_start.shape[1]):
        f = torch.zeros(*is_start.shape[:2], len(embedding)) if f is None else f
        fed = f.roll(1, dims=1).float().to(embedding.dtype) @ embedding  # [1, m, e]
        if copilot.config.copilot_input == "both":
            fed = fed + embedding[batch.inputs["input_indices"][..., -1]]
        fed = torch.where(is_start, copilot.start.weight, copilot.project_input(fed))
        f = copilot(**batch.inputs, inputs_embeds=fed, return_logits=True, lent=lent).logits
    return f[0]


def whole_rows(run: Run) -> dict[tuple, list[tuple[int, torch.Tensor]]]:
    """The length and f of every row of every call, by its prompt and the longest row of which it is the beginning."""
    found: dict[tuple, list] = {}
    for ids, f in reversed(run.calls):
        for i, (row, row_f) in enumerate(zip(ids.tolist(), f, strict=True)):
            prompt, row = i * len(run.mask) // len(ids), tuple(row)
            whole = next((key for key in found if key[0] == prompt and key[1][: len(row)] == row), (prompt, row))
            found.setdefault(whole, []).append((len(row), row_f))
    return found


def largest_difference(copilot, pilot, run: Run) -> float:
    """Between f of all calls of a run and f from scratch."""
    differences = []
    for (prompt, row), found in whole_rows(run).items():
        ids, mask = torch.tensor(row), run.mask[prompt].bool()
        if run.encoder_ids is None:
            n = len(mask)
            ids, start = torch.cat([ids[:n][mask], ids[n:]]), int(mask.sum())
            expected = from_scratch(copilot, pilot, ids, start)
        else:
            n = 1
            encoder = run.encoder_ids[prompt : prompt + 1], run.mask[prompt : prompt + 1]
            expected = from_scratch(copilot, pilot, ids, n, encoder)
        differences += [(expected[length - n] - f).abs().max() for length, f in found]
    return float(torch.stack(differences).max())  # NaN if one is


def hooks(pilot) -> list:
    """Ours on a Pilot; transformers leaves its own there after `output_hidden_states`."""
    found = [(*module._forward_hooks.values(), *module._forward_pre_hooks.values()) for module in pilot.modules()]
    return [hook for each in found for hook in each if hook.__module__.startswith("hf_copilot")]


def rectified(case: Case, pilot, copilot) -> tuple[list[torch.Tensor], list[Run]]:
    """All turns of a case, with λ as it says."""
    processor_class = Recorder if case.strength else CopilotLogitsProcessor
    with pretended_graphs(), processor_class(copilot, pilot, case.strength, cuda_graphs=case.recorded) as processor:
        assert bool(hooks(pilot)) == bool(case.strength)
        if processor.rectifier is not None:
            processor.rectifier.follower.waits = case.waits
        return converse(case, pilot, processor)


def is_refused(case: Case) -> bool:
    """Whether a case is one that a processor can't be used for."""
    unsupported = {name for settings in UNSUPPORTED for name in settings}
    return case.strength > 0 and any(unsupported & turn.settings.keys() for turn in case.turns)


def check_error(case: Case, pilot, error: Exception) -> None:
    """The bare Pilot raises it too, or the case is refused, with a sentence."""
    try:
        converse(case, pilot, None)
    except type(error) as bare:
        event(f"the bare Pilot raises too: {str(bare)[:40]}")
        return
    event(f"refused: {str(error)[:40]}")
    assert is_refused(case) and isinstance(error, ValueError) and len(str(error)) > 40, error


def check_bans(case: Case, texts: list[torch.Tensor]) -> None:
    """What is banned, by another processor or by settings, is never generated."""
    length = 1 if case.family in SEQ2SEQ else padded(case)[0].shape[1]
    for turn, text in zip(case.turns, texts, strict=True):
        if case.bans or {"bad_words_ids", "suppress_tokens"} & turn.settings.keys():
            assert not torch.isin(text[:, length + len(turn.more) :], torch.tensor(BANNED)).any()
        length = text.shape[1]


def check(case: Case) -> None:
    """f is that of a pass from scratch, bans hold, no hook is left, and λ = 0 is the bare Pilot."""
    pilot = make_pilot(case)
    copilot = trained_like(pilot, CopilotConfig(**case.config)).to(TYPES[case.attention]).train(case.trains)
    try:
        texts, runs = rectified(case, pilot, copilot)
    except Exception as error:
        assert not hooks(pilot)
        return check_error(case, pilot, error)
    assert not hooks(pilot)  # prompt lookup that finds nothing is plain decoding, and compared as such
    check_bans(case, texts)
    if not case.strength:
        bare, _ = converse(case, pilot, None)
        assert all(torch.equal(*pair) for pair in zip(texts, bare, strict=True))
    for run in runs:
        with adapted(pilot, run.adapter):
            assert largest_difference(copilot, pilot, run) < 1e-4
    event(f"compared {len(runs)} runs" if runs else "compared with the bare Pilot")


@example(  # the second prompt was taken for one on a kept cache, and so the states of the first adapter
    Case(
        "llama",
        {"memory": "pilot"},
        [[42, 45, 34], [42, 45, 34]],
        [
            Turn([], {"max_new_tokens": 1}, adapter="two"),
            Turn([0], {"max_new_tokens": 1, "prefill_chunk_size": 1}, adapter="one"),
        ],
    )
)
@example(Case("llama", {"memory": "tokens"}, [[5, 6, 7], [8, 9]], [Turn([], {"max_new_tokens": 6, "num_beams": 4})]))
@given(cases())
def test_f_is_that_of_a_pass_from_scratch(case):
    check(case)

"""The follower by itself: forwards and calls made by hand, no Copilot and no Pilot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from weakref import ref

import pytest
import torch
from transformers import DynamicCache

from hf_copilot.generation.follower import Follower
from hf_copilot.pilot.tap import PilotStates

WIDTH, VOCAB_SIZE = 4, 60
PROMPTS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])  # the first is padded on the left


def forward(ids, past=0, mask=None, encoder=None):
    """What the tap reads of a forward on the last tokens of `ids` `[R, n]`."""
    new = ids[:, past:]
    states = PilotStates(new, mask, past)
    states.hidden_states = states.last_hidden_state = new[..., None].float().expand(-1, -1, WIDTH)
    states.embeddings = states.hidden_states if encoder is None else encoder
    states.encoder_length = None if encoder is None else encoder.shape[1]
    states.next_logits = torch.randn(len(ids), VOCAB_SIZE)
    return states


def call(follower, ids, past=0, **more):
    follower.take(forward(ids, past, **more))
    return follower.follow(ids)


def grown(ids, *tokens):
    return torch.cat([ids, torch.tensor(tokens)[:, None]], dim=1)


@pytest.fixture(params=[True, False], ids=["states", "tokens"])
def follower(request):
    return Follower(request.param)


def new_tokens(step):
    return torch.cat([piece.input_ids for piece in step.pieces], dim=1)


def test_a_run_begins_and_continues(follower):
    first = call(follower, PROMPTS)
    assert (first.continues, first.kept, first.rows) == (False, 0, None) and first.pieces[0].is_first
    assert torch.equal(new_tokens(first), PROMPTS)
    ids = grown(PROMPTS, 11, 12)
    second = call(follower, ids, past=4)
    assert (second.continues, second.kept, second.rows) == (True, 4, None) and not second.pieces[0].is_first
    assert new_tokens(second).tolist() == [[11], [12]]


def test_without_a_cache_everything_is_read_again_where_states_are(follower):
    call(follower, PROMPTS)
    step = call(follower, grown(PROMPTS, 11, 12))
    assert step.continues and step.kept == (0 if follower.needs_states else 4)
    assert new_tokens(step).shape[1] == 5 - step.kept


def test_rows_that_change_places_are_found_by_their_tokens(follower):
    """Beams of one prompt: the second row's text goes on in both."""
    prompt = PROMPTS[1:].expand(2, -1)
    call(follower, prompt)
    call(follower, grown(prompt, 11, 12), past=4)
    kept = grown(prompt, 12, 12)
    step = call(follower, grown(kept, 13, 14), past=5)
    assert step.continues and step.rows.tolist() == [1, 1]


def test_rows_of_other_prompts_are_not_confused(follower):
    """The same tokens with other padding: each row goes on from its own place."""
    ids = torch.tensor([[5, 5, 6], [5, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    call(follower, ids, mask=mask)
    step = call(follower, grown(ids, 9, 8), past=3, mask=torch.cat([mask, mask[:, :1] * 0 + 1], dim=1))
    assert step.rows is None and step.visible.tolist() == [[False, True, True, True], [True] * 4]


def test_rows_do_not_go_on_from_another_prompt():
    """Rows of one length that have changed places between prompts are no beams."""
    follower = Follower(False)
    call(follower, PROMPTS)
    call(follower, grown(PROMPTS, 11, 12), past=4)
    assert not call(follower, grown(grown(PROMPTS.flip(0), 12, 11), 1, 1), past=5).continues


def test_another_text_begins_anew(follower):
    call(follower, PROMPTS)
    step = call(follower, PROMPTS + 1)
    assert not step.continues and step.kept == 0


def test_a_caller_may_write_to_its_tokens_afterwards(follower):
    """A loop of one's own with one buffer: the next text does not go on from the last one."""
    buffer = torch.full((1, 8), 5)
    call(follower, buffer[:, :4])
    buffer[:] = 6
    step = call(follower, buffer[:, :5])
    assert not step.continues and torch.equal(new_tokens(step), buffer[:, :5])


def test_a_run_that_another_thread_breaks_into_raises(follower):
    with ThreadPoolExecutor(1) as other:
        call(follower, PROMPTS)
        assert not other.submit(call, follower, PROMPTS.flip(0)).result().continues
        with pytest.raises(ValueError, match="in each thread"):
            call(follower, grown(PROMPTS, 11, 12), past=4)
        goes_on = other.submit(call, follower, grown(PROMPTS.flip(0), 11, 12), past=4).result()
        assert goes_on.continues and new_tokens(goes_on).tolist() == [[11], [12]]  # its run is whole


def test_threads_may_take_turns(follower):
    """One text after the other, of which one begins with what was generated before."""
    cache = DynamicCache()
    with ThreadPoolExecutor(1) as other:
        call(follower, PROMPTS)
        other.submit(call, follower, PROMPTS.flip(0)).result()
        states = forward(grown(PROMPTS, 11, 12))
        states.cache = ref(cache)
        follower.take(states)
        assert not follower.follow(grown(PROMPTS, 11, 12)).continues


def test_a_kept_cache_is_taken_up(follower):
    """A second turn: the cache holds the first, of which one forward shows the rest."""
    call(follower, PROMPTS)
    turn = torch.cat([PROMPTS, PROMPTS + 20], dim=1)
    step = call(follower, turn, past=4)
    assert not step.continues and step.kept == (4 if follower.needs_states else 0)


def test_chunks_of_a_prompt_are_joined(follower):
    follower.take(forward(PROMPTS[:, :2]))
    step = call(follower, PROMPTS, past=2)
    assert not step.continues and torch.equal(new_tokens(step), PROMPTS)


def test_a_cache_that_it_has_not_seen(follower):
    """States of it are lost; tokens are read again."""
    turn = torch.cat([PROMPTS, PROMPTS + 20], dim=1)
    follower.take(forward(turn, past=4))
    if follower.needs_states:
        with pytest.raises(ValueError, match="has not seen"):
            follower.follow(turn)
    else:
        assert torch.equal(new_tokens(follower.follow(turn)), turn)


@pytest.mark.parametrize("asked", [PROMPTS + 1, PROMPTS[:, 1:]])
def test_tokens_that_the_pilot_was_not_run_on_raise(follower, asked):
    follower.take(forward(PROMPTS))
    with pytest.raises(ValueError, match="has not just been run on"):
        follower.follow(asked)
    with pytest.raises(ValueError, match="has not just been run on"):
        follower.follow(PROMPTS)  # the forward was for one call


def test_another_encoder_output_begins_anew():
    follower, encoder = Follower(True), torch.randn(2, 3, WIDTH)
    mask = torch.ones(2, 4, dtype=torch.long)
    first = call(follower, PROMPTS, mask=mask, encoder=encoder)
    assert first.encoder_visible.all() and first.encoder_visible.shape == (2, 3)
    ids = grown(PROMPTS, 11, 12)
    assert call(follower, ids, past=4, encoder=encoder).continues
    assert not call(follower, grown(ids, 11, 12), encoder=encoder + 1).continues


def test_a_sliding_window_hides_padding_not_what_was_known(follower):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    call(follower, PROMPTS, mask=mask)
    window = torch.ones(2, 1, 1, 3, dtype=torch.bool)  # of the last three positions
    step = call(follower, grown(PROMPTS, 11, 12), past=4, mask=window)
    assert step.visible.tolist() == [[False, False, True, True, True], [True] * 5]

"""Follows a running `generate`: which row continues which, which tokens are new, what is padding. No Copilot in it.

Its state hangs on content alone: a row of this call continues the row of the last call that has the same tokens (and
the same encoder output), so beams, kept caches and several `generate` calls in a row need no hint from outside.

An accelerator is not waited for where sizes say that every row goes on by one token: whether the tokens do is decided
there, and looked at one call later.
Shapes: R rows, n tokens so far, t of them in one forward, S positions of the encoder, d_P the Pilot's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import get_ident
from typing import NamedTuple
from weakref import ref

import torch
from transformers import Cache

from ..pilot.cache import holds_every_state
from ..pilot.tap import PilotStates

UNKNOWN_CALL = (
    "The processor was called with tokens that its Pilot has not just been run on. It rectifies "
    "`pilot.generate(input_ids, logits_processor=[processor])` of the one Pilot that it is attached to; assisted "
    "decoding, prompt lookup, guidance_scale and inputs_embeds call processors for other tokens and are not supported "
    "(leave assistant_model, prompt_lookup_num_tokens and guidance_scale out). If it was detached, make a new one. A "
    "Pilot in training mode with gradient checkpointing generates without its cache: call pilot.eval() first. "
    "One processor is for one thread at a time. The cache of a state-space model must be filled while the processor "
    "is attached."
)
ONE_THREAD = (
    "Another thread called this processor in the middle of this one's run, and a processor follows one run at a time. "
    "Make a CopilotLogitsProcessor in each thread; they share Pilot and Copilot."
)
UNSEEN_CACHE = (
    "The Pilot's cache holds tokens whose states (or padding, behind the sliding window of a static cache) "
    "this processor has not seen: make the processor before the cache is filled, with all of its rows (not "
    "one that is repeated later), and one for each conversation that has a cache of its own, or call generate "
    "without a kept cache."
)

STATE_OUTSIDE = (
    "Beams change their places, and this Pilot keeps states outside of its cache, or in a cache that does not reorder "
    "them: transformers gives each beam the state of another. Pass use_cache=False, or num_beams=1."
)

COMPARED_LATE = 2**22  # tokens of every pair of rows that are compared without a wait


class Piece(NamedTuple):
    """Consecutive positions that are new to the memory: the arguments of `Memory.entries`."""

    input_ids: torch.Tensor  # [R, t]
    embeddings: torch.Tensor | None  # X̃, [R, t, d_P], or [R, S, d_P] of an encoder with the first positions
    hidden_states: torch.Tensor | None  # h, [R, t, d_P]
    is_first: bool  # whether they are the first positions


@dataclass
class Step:
    """How one call goes on from the last one."""

    ids: torch.Tensor  # [R, n]
    continues: bool  # whether every row has one token more than a row of the last call
    rows: torch.Tensor | None  # [R], the row of the last call that each goes on from; None if all kept their places
    kept: int  # the positions whose memory stays, in that order of rows
    pieces: list[Piece]  # the others
    next_logits: torch.Tensor | None  # [R, V], the Pilot's; None of a step that is foreseen
    visible: torch.Tensor  # [R, n] bool, False at padding
    encoder_visible: torch.Tensor | None  # [R, S] bool, likewise, of an encoder
    forward: PilotStates  # the Pilot's last


class Follower:
    """Takes the forwards of a Pilot, and says at every call of a processor how it goes on from the last one.

    Args:
        needs_states: Whether the memory is of states, which only forwards show. Else it is of tokens, which can be
            read again.
    """

    waits: bool | None = None  # whether values are looked at at once; None is where they lie on the CPU

    def __init__(self, needs_states: bool):
        self.needs_states = needs_states
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.of_threads: dict[int, list[PilotStates]] = {}  # forwards of the Pilot since the last call
        self.ids: torch.Tensor | None = None  # [R, n] tokens of the last call
        self.visible: torch.Tensor | None = None  # [R, n] bool, which of them are not padding
        self.group: torch.Tensor | None = None  # [R] rows of one group began the run with the same content
        self.may_move = True  # whether two rows did, which beams may be of
        self.encoder_output: torch.Tensor | None = None  # [R, S, d_P], of an encoder-decoder
        self.cache: ref[Cache] | None = None  # the Pilot's, at the last call
        self.unsettled: torch.Tensor | None = None  # [] bool, whether the last call's tokens were what sizes said
        self.thread = get_ident()  # of the last call
        self.runs: dict[int, torch.Tensor] = {}  # [R, n] tokens of each thread's last call

    def settle(self) -> None:
        """Look at what the last call of this thread left to be seen.

        Raises:
            ValueError: If its tokens were not those that the Pilot had been run on.
        """
        if self.unsettled is None or self.thread != get_ident():
            return
        holds, self.unsettled = bool(self.unsettled), None
        if not holds:
            self.reset()
            raise ValueError(UNKNOWN_CALL)

    def take(self, states: PilotStates) -> None:
        """Hear of a forward of the Pilot."""
        pending = self.of_threads.setdefault(get_ident(), [])
        if pending and states.past_length != pending[-1].past_length + pending[-1].length:
            pending.clear()  # of a forward that nobody asked about
        if pending:
            pending[-1].next_logits = None  # nobody asked for them
        pending.append(states)

    @property
    def pending(self) -> list[PilotStates]:
        """Those of this thread."""
        return self.of_threads.get(get_ident(), [])

    def follow(self, ids: torch.Tensor) -> Step:
        """How a call for the token after `ids` `[R, n]` goes on from the last call; all that it gives is on their
        device.

        Raises:
            ValueError: If the Pilot has not just been run on these tokens, or another thread broke into the run.
        """
        self.settle()
        pending, self.device = self.pending, ids.device
        if self.thread != get_ident() and _is_inside_a_run(pending, self.runs.pop(get_ident(), None), ids):
            raise ValueError(ONE_THREAD)
        self.of_threads, self.thread = {}, get_ident()
        if self._goes_on(pending, ids):
            forwards, rows, continues = pending, self._next_rows(pending[0], ids), True
        else:
            forwards, rows, continues = self._look_back(pending, ids)
        past = forwards[0].past_length
        rows = self._arrange(rows)
        if continues and past and rows is not None and not _holds_every_state(forwards[-1]):
            self.reset()
            raise ValueError(STATE_OUTSIDE)
        before = self.visible[:, :past] if continues else self._visible_before(forwards[0])  # [R, past]
        visible = torch.cat([before, *(self._visible(s, s.past_length) for s in forwards)], dim=1)  # [R, n]
        self.ids, self.visible, self.cache = ids.clone(), visible, forwards[-1].cache  # a caller may write to its own
        self.runs[self.thread] = self.ids
        encoder_visible = self._read_encoder(forwards[-1])
        if not continues:
            self.group, self.may_move = self._groups()
        kept, logits = self._kept(past, continues), forwards[-1].next_logits.to(self.device)  # [R, V]
        pieces = self._pieces(forwards, kept)
        return Step(ids, continues, rows, kept, pieces, logits, visible, encoder_visible, forwards[-1])

    def foresee(self, states: PilotStates) -> Step | None:
        """How the next call goes on if it comes after a forward of the Pilot that has just begun: where that is on one
        token of every row, rows can't change their places, and nothing else of the forward is read."""
        if self.needs_states or self.may_move or self.ids is None or self.pending or self._waits(self.ids):
            return None
        (rows, n), read = self.ids.shape, states.input_ids
        goes_on = states.past_length == n and states.cache is not None and states.cache == self.cache
        if not goes_on or read is None or read.shape != (rows, 1):
            return None
        ids = torch.cat([self.ids, read.to(self.device)], dim=1)  # [R, n + 1]
        visible = torch.cat([self.visible, self._visible(states, n)], dim=1)  # [R, n + 1]
        return Step(ids, True, None, n, [Piece(ids[:, n:], None, None, False)], None, visible, None, states)

    def _waits(self, ids: torch.Tensor) -> bool:
        return ids.device.type == "cpu" if self.waits is None else self.waits

    def _kept(self, past: int, continues: bool) -> int:
        if self.needs_states:
            return past
        return self.ids.shape[1] - 1 if continues else 0

    def _pieces(self, forwards: list[PilotStates], kept: int) -> list[Piece]:
        if not self.needs_states:
            return [Piece(self.ids[:, kept:], None, None, kept == 0)]
        return [_piece(states) for states in forwards]

    # ---- what sizes say --------------------------------------------------------------------------------------------

    def _goes_on(self, pending: list[PilotStates], ids: torch.Tensor) -> bool:
        """Whether, by its sizes, one forward on one token of every row leads from the last call to this one."""
        if self._waits(ids) or not self._is_next(ids) or len(ids) != len(self.ids) or len(pending) != 1:
            return False
        states, old = pending[0], self.encoder_output
        has_same_encoder = old is None or old.data_ptr() == states.embeddings.data_ptr()
        is_one_token = states.input_ids is not None and states.input_ids.shape == (len(ids), 1)
        follows = states.past_length == self.ids.shape[1] and states.next_logits is not None
        is_same_cache = states.cache is not None and states.cache == self.cache  # not one of another chat
        is_small = len(ids) * ids.numel() <= COMPARED_LATE
        may_reorder = not self.may_move or (is_small and _holds_every_state(states))
        return has_same_encoder and is_one_token and follows and is_same_cache and may_reorder

    def _next_rows(self, states: PilotStates, ids: torch.Tensor) -> torch.Tensor | None:
        """The row of the last call that each row goes on from, `[R]`, or None if its own; left to be seen."""
        is_read = states.input_ids.to(self.device) == ids[:, -1:]  # [R, 1]
        if not self.may_move:
            self.unsettled = (is_read & (ids[:, :-1] == self.ids)).all()
            return None
        same = (ids[:, None, :-1] == self.ids[None]).all(-1)  # [R, R]
        same &= self.group[:, None] == self.group[None]
        self.unsettled = (is_read[:, 0] & same.any(-1)).all()
        return same.int().argmax(-1)

    # ---- which tokens ----------------------------------------------------------------------------------------------

    def _look_back(
        self, pending: list[PilotStates], ids: torch.Tensor
    ) -> tuple[list[PilotStates], torch.Tensor | None, bool]:
        """The forwards that lead to this call, by their tokens; the row of the last call that each row has its
        beginning of, if one has; and whether every row goes on by one token."""
        is_next = self._is_next(ids) and self._has_same_encoder(pending)
        rows = self._parents(ids, ids.shape[1] - 1) if is_next else None  # [R]
        continues = rows is not None
        forwards = self._chain(pending, ids, continues)
        past = forwards[0].past_length
        if past and not continues:
            rows = self._parents(ids, past)
        return forwards, rows, continues

    def _chain(self, pending: list[PilotStates], ids: torch.Tensor, continues: bool) -> list[PilotStates]:
        """The forwards that lead from tokens whose memory is known to `ids`, as far back as they go: what the Pilot
        has just been run on may have other states than it had at the last call, since it may have been trained."""
        if not pending or pending[-1].next_logits is None:
            raise ValueError(UNKNOWN_CALL)
        forwards, start = [], ids.shape[1]
        for states in reversed(pending):
            if not _ends_with(states, ids[:, :start]):
                break
            forwards, start = [states, *forwards], states.past_length
            if start == 0 or self._is_enough(states):
                return forwards
        if forwards and (continues or self._parents(ids, start) is not None):
            return forwards
        raise ValueError(UNSEEN_CACHE if forwards else UNKNOWN_CALL)

    def _is_enough(self, states: PilotStates) -> bool:
        """Whether the memory can be made of token ids and this forward's mask alone."""
        return not self.needs_states and not states.hides_past

    # ---- which rows ------------------------------------------------------------------------------------------------

    def _is_next(self, ids: torch.Tensor) -> bool:
        return self.ids is not None and ids.shape[1] == self.ids.shape[1] + 1

    def _has_same_encoder(self, pending: list[PilotStates]) -> bool:
        """Whether the last forward read the encoder output of the last call; beams keep to their prompt's rows."""
        if self.encoder_output is None or not pending:
            return True
        old, new = self.encoder_output, pending[-1].embeddings
        return old.shape == new.shape and (old.data_ptr() == new.data_ptr() or torch.equal(old, new))

    def _parents(self, ids: torch.Tensor, length: int) -> torch.Tensor | None:
        """For every row the row of the last call with the same first `length` tokens: `[R]`, or None if some row has
        none. Beams keep to the rows of their prompt, so a row's parent is in the group of its own place: rows with
        the same tokens and other padding are not confused."""
        if self.ids is None or self.ids.shape[1] < length:
            return None
        old, new = self.ids[:, :length], ids[:, :length]
        if old.shape == new.shape and torch.equal(old, new):
            return torch.arange(len(new), device=new.device)
        _, content = torch.unique(torch.cat([old, new]), dim=0, return_inverse=True)  # [R_old + R]
        same = content[len(old) :, None] == content[None, : len(old)]  # [R, R_old]
        if len(new) == len(old):
            same &= self.group[:, None] == self.group[None]
        if not bool(same.any(-1).all()):
            return None
        return same.int().argmax(-1)  # [R]

    def _arrange(self, rows: torch.Tensor | None) -> torch.Tensor | None:
        """Put the rows of the state in the order of this call; gives the order back, or None if it was that."""
        if rows is None or (len(rows) == 1 and len(self.ids) == 1):
            return None
        is_looked_at = self.unsettled is None  # else the order is known to the device alone
        if is_looked_at and torch.equal(rows, torch.arange(len(self.ids), device=rows.device)):
            return None
        self.visible, self.ids, self.group = self.visible[rows], self.ids[rows], self.group[rows]
        self.may_move = True  # a row may be there twice
        return rows

    def _groups(self) -> tuple[torch.Tensor, bool]:
        """Rows that begin with the same content have one number, `[R]`; and whether two of them do."""
        content = self.ids.masked_fill(~self.visible, -1)  # [R, n]
        if self.encoder_output is not None:
            _, encoder = torch.unique(self.encoder_output.flatten(1), dim=0, return_inverse=True)  # [R]
            content = torch.cat([content, encoder.to(content.device)[:, None]], dim=1)  # [R, n + 1]
        found, group = torch.unique(content, dim=0, return_inverse=True)  # [groups, ...], [R]
        return group, len(found) < len(group)

    # ---- what is padding -------------------------------------------------------------------------------------------

    def _read_encoder(self, states: PilotStates) -> torch.Tensor | None:
        """Keep a forward's encoder output, if it has one; which of its positions are not padding, `[R, S]` bool."""
        if states.encoder_length is None:
            return None
        self.encoder_output = states.embeddings
        mask = states.encoder_attention_mask
        if mask is None:
            return torch.ones(states.embeddings.shape[:2], dtype=torch.bool, device=self.device)
        return mask.to(self.device) != 0

    def _visible_before(self, states: PilotStates) -> torch.Tensor:
        """Which positions before the first forward of a run are not padding, `[R, past]` bool.

        As its mask has them now: a row that ended early in the last run is padded behind its end. Where a window hides
        them, as they were.
        """
        past = states.past_length
        return self.visible[:, :past] if past and states.hides_past else self._visible(states, 0)[:, :past]

    def _visible(self, states: PilotStates, start: int) -> torch.Tensor:
        return states.visible_from(start).to(self.device)


def _ends_with(states: PilotStates, ids: torch.Tensor) -> bool:
    """Whether a forward was run on the last of these tokens `[R, n]`, at their positions."""
    tokens, known = ids[:, states.past_length :], states.input_ids
    if known is None or known.shape != tokens.shape:
        return False
    return torch.equal(known.to(tokens.device), tokens)


def _is_inside_a_run(pending: list[PilotStates], old: torch.Tensor | None, ids: torch.Tensor) -> bool:
    """Whether the first row of `ids` `[R, n]` has one token more than a row of the thread's last call, and the Pilot
    was not run on all of it anew, into a cache: a text of its own may begin with the last one."""
    if old is None or ids.shape[1] != old.shape[1] + 1:
        return False
    begins_anew = bool(pending) and pending[0].past_length == 0 and pending[0].cache is not None
    return not begins_anew and bool((ids[:1, :-1].to(old.device) == old).all(-1).any())


def _piece(states: PilotStates) -> Piece:
    """The positions of one forward. An encoder's X̃ is kept from the first ones on."""
    is_first = states.past_length == 0
    is_kept = states.encoder_length is not None and not is_first
    return Piece(states.input_ids, None if is_kept else states.embeddings, states.hidden_states, is_first)


def _holds_every_state(states: PilotStates) -> bool:
    """Whether the Pilot's cache does, where it has one."""
    return states.cache is None or holds_every_state(states.cache())

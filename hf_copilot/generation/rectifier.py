"""Follows a running `generate` of the Pilot and gives the Copilot's correction for every next token (Algorithm 2).

Mirror image of the learner: it reads the same states through the same tap. Its state hangs on content alone: a row
of this call continues the row of the last call that has the same tokens (and the same encoder output), so beams, kept
caches and several `generate` calls in a row need no hint from outside. Shapes: R rows, n tokens so far, t of them new,
S positions of the encoder, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import DynamicCache

from ..model.discrepancy import sparse_discrepancy
from ..model.modeling_copilot import CopilotModel, Vocabulary, interleave, memory_mask, rotary_positions
from ..pilot.tap import PilotStates, PilotTap
from ..pilot.vocabulary import lent_vocabulary

UNKNOWN_CALL = (
    "The processor was called with tokens that its Pilot has not just been run on. It rectifies "
    "`pilot.generate(input_ids, logits_processor=[processor])` of the one Pilot that it is attached to; assisted "
    "decoding, prompt lookup, guidance_scale and inputs_embeds call processors for other tokens and are not supported "
    "(leave assistant_model, prompt_lookup_num_tokens and guidance_scale out). If it was detached, make a new one. A "
    "Pilot in training mode with gradient checkpointing generates without its cache: call pilot.eval() first. "
    "One whose cache holds no positions (state-space models) needs use_cache=False."
)


class Rectifier:
    """The Copilot's side of a `generate` call.

    Args:
        copilot: Run in eval mode, whatever mode it is in.
        pilot: The model whose `generate` is followed.

    Raises:
        NotImplementedError: For a Pilot with virtual tokens (prompt, prefix or p-tuning).
    """

    def __init__(self, copilot: CopilotModel, pilot: nn.Module):
        if isinstance(pilot, PeftModel) and pilot.active_peft_config.is_prompt_learning:
            raise NotImplementedError(
                "Rectified generation does not support Pilots with virtual tokens (prompt tuning, prefix tuning, "
                "p-tuning) yet: fine-tune the Pilot with LoRA or in full."
            )
        self.copilot, self.config = copilot, copilot.config
        self.tap = PilotTap(pilot, self.config, self._take, lambda: not torch.is_grad_enabled())
        self.tap.open()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.pending: list[PilotStates] = []  # forwards of the Pilot since the last call
        self.lent: Vocabulary | None = None  # the Pilot's matrices, as they were when the run began
        self.cache = self.copilot.new_cache()  # the memory of n positions, the run of the queries so far
        self.ids: torch.Tensor | None = None  # [R, n] tokens of the last call
        self.visible: torch.Tensor | None = None  # [R, n] bool, which of them are not padding
        self.encoder_output: torch.Tensor | None = None  # [R, S, d_P], X̃ of an encoder-decoder
        self.encoder_visible: torch.Tensor | None = None  # [R, S] bool, which of its positions are not padding
        self.group: torch.Tensor | None = None  # [R] rows of one group began the run with the same content
        self.last_logits: torch.Tensor | None = None  # [R, V] the Pilot's logits at the last call
        self.last_correction: torch.Tensor | None = None  # [R, V] f at the last call

    def close(self) -> None:
        """Remove the hooks from the Pilot and forget everything."""
        self.tap.close()
        self.reset()

    def _take(self, states: PilotStates) -> None:
        if self.pending and states.past_length != self.pending[-1].past_length + self.pending[-1].length:
            self.pending = []  # of a forward that nobody asked about
        if self.pending:
            self.pending[-1].next_logits = None  # nobody asked for them
        self.pending.append(states)

    @torch.no_grad()
    def correction(self, input_ids: torch.Tensor) -> torch.Tensor:
        """f for the token after `input_ids` `[R, n]`: `[R, V]` float32.

        Raises:
            ValueError: If these are not the tokens that the Pilot has just been run on.
        """
        pending, self.pending = self.pending, []
        ids = input_ids.to(self.copilot.device)  # [R, n]
        is_next = self._is_next(ids) and self._has_same_encoder(pending)
        rows = self._parents(ids, ids.shape[1] - 1) if is_next else None  # [R]
        continues = rows is not None
        pending = self._chain(pending, ids, continues)
        past = pending[0].past_length
        kept = past if self.config.reads_states else (ids.shape[1] - 1) * continues  # positions whose memory is kept
        self._arrange(self._parents(ids, past) if past and not continues else rows)
        if not continues:
            self.cache.self_attention_cache = DynamicCache()
            if self.config.vocab_projection == "pilot":
                self.lent = lent_vocabulary(self.tap.model, self.copilot.device)
        if self.config.pilot_is_encoder_decoder:
            self.encoder_output, self.encoder_visible = pending[-1].embeddings, self._encoder_visible(pending[-1])
        self._cut_memory(kept)
        inputs = self._next_input(ids[:, -1], continues)
        memory = self._memory(pending, ids[:, kept:])  # [R, new entries, d_P], or [R, new entries]
        before = self.visible[:, :past] if continues else self._visible_before(pending[0])  # [R, past]
        self.visible = torch.cat([before, *(self._visible(s, s.past_length) for s in pending)], dim=1)  # [R, n]
        if not continues:
            self.group = self._groups(ids)
        last = ids.new_full((len(ids), 1), ids.shape[1] - 1)  # [R, 1]
        mask = memory_mask(self.config, last, self.visible, self.encoder_visible)  # [R, 1, entries]
        positions = self.visible.cumsum(1) - 1  # [R, n], as in a row without padding
        inputs |= rotary_positions(self.config, positions[:, -1:], positions[:, kept:])
        correction = self._run(inputs, memory, mask)  # [R, V]
        self.ids, self.last_correction = ids, correction
        self.last_logits = pending[-1].next_logits.to(ids.device)  # [R, V]
        return correction

    # ---- following -------------------------------------------------------------------------------------------------

    def _chain(self, pending: list[PilotStates], ids: torch.Tensor, continues: bool) -> list[PilotStates]:
        """The forwards, last ones first to be looked at, that lead from tokens whose memory is known to `ids`."""
        if not pending or pending[-1].next_logits is None:
            raise ValueError(UNKNOWN_CALL)
        start = ids.shape[1]
        for count, states in enumerate(reversed(pending), 1):
            if not self._ends_with(states, ids[:, :start]):
                break
            start = states.past_length
            if start == 0 or continues or self._is_enough(states) or self._parents(ids, start) is not None:
                return pending[-count:]
        if start == ids.shape[1]:
            raise ValueError(UNKNOWN_CALL)
        raise ValueError(
            "The Pilot's cache holds tokens whose states (or padding, behind the sliding window of a static cache) "
            "this processor has not seen: make the processor before the cache is filled, with all of its rows (not "
            "one that is repeated later), and one for each conversation that has a cache of its own, or call generate "
            "without a kept cache."
        )

    def _is_enough(self, states: PilotStates) -> bool:
        """Whether the memory hangs on ids and padding alone, and this forward shows the padding of all positions."""
        return not self.config.reads_states and not self._hides_past(states)

    def _ends_with(self, states: PilotStates, ids: torch.Tensor) -> bool:
        """Whether a forward was run on the last of these tokens `[R, n]`, at their positions."""
        tokens, known = ids[:, states.past_length :], states.input_ids
        if known is None or known.shape != tokens.shape:
            return False
        return torch.equal(known.to(tokens.device), tokens)

    def _arrange(self, rows: torch.Tensor | None) -> None:
        """Put the rows of the state in the order of this call."""
        if rows is not None and not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            self._reorder(rows)

    def _is_next(self, ids: torch.Tensor) -> bool:
        return self.ids is not None and ids.shape[1] == self.ids.shape[1] + 1

    def _has_same_encoder(self, pending: list[PilotStates]) -> bool:
        """Whether the last forward read the encoder output of the last call; beams keep to their prompt's rows."""
        if not self.config.pilot_is_encoder_decoder or not pending:
            return True
        old, new = self.encoder_output, pending[-1].embeddings
        return old.shape == new.shape and (old.data_ptr() == new.data_ptr() or torch.equal(old, new))

    def _groups(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows that begin with the same content have one number: `[R]`."""
        content = ids.masked_fill(~self.visible, -1)  # [R, n]
        if self.config.pilot_is_encoder_decoder:
            _, encoder = torch.unique(self.encoder_output.flatten(1), dim=0, return_inverse=True)  # [R]
            content = torch.cat([content, encoder.to(content.device)[:, None]], dim=1)  # [R, n + 1]
        return torch.unique(content, dim=0, return_inverse=True)[1]

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

    def _reorder(self, rows: torch.Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.visible, self.ids, self.group = self.visible[rows], self.ids[rows], self.group[rows]
        self.last_logits, self.last_correction = self.last_logits[rows], self.last_correction[rows]

    def _cut_memory(self, past: int) -> None:
        """Keep the memory of the first `past` positions: all of it in most calls."""
        memory = self.cache.cross_attention_cache
        kept = 2 * past
        if not self.config.reads_states:
            kept = past
        elif self.config.pilot_is_encoder_decoder:
            kept = self.encoder_visible.shape[1] + past
        if past == 0:
            self.cache.cross_attention_cache = DynamicCache()
        elif memory.get_seq_length() > kept:
            memory.crop(kept - memory.get_seq_length())

    # ---- the Copilot's step ----------------------------------------------------------------------------------------

    def _memory(self, pending: list[PilotStates], new: torch.Tensor) -> torch.Tensor:
        """What these forwards add to the memory [X̃ ; h], on the Copilot's device and in its type: `[R, 2t, d_P]`, or
        `[R, t, d_P]` beside an encoder-decoder, with X̃ before it `[R, S, d_P]` where the memory is empty; or, to that
        of tokens alone, the new tokens `[R, t]`."""
        if not self.config.reads_states:
            return new
        to = {"device": self.copilot.device, "dtype": self.copilot.dtype}
        if not self.config.pilot_is_encoder_decoder:
            parts = [interleave(states.embeddings.to(**to), states.hidden_states.to(**to)) for states in pending]
            return torch.cat(parts, dim=1)
        empty = pending[0].past_length == 0
        parts = [self.encoder_output] * empty + [states.hidden_states for states in pending]
        return torch.cat([part.to(**to) for part in parts], dim=1)

    def _encoder_visible(self, states: PilotStates) -> torch.Tensor:
        mask = states.encoder_attention_mask
        if mask is None:
            return torch.ones(states.embeddings.shape[:2], dtype=torch.bool, device=self.copilot.device)
        return mask.to(self.copilot.device) != 0

    def _visible_before(self, states: PilotStates) -> torch.Tensor:
        """Which positions before the first forward of a run are not padding, `[R, past]` bool: as its mask has them
        now (a row that ended early in the last run is padded behind its end), or as they were, where a window hides
        them."""
        past = states.past_length
        return self.visible[:, :past] if past and self._hides_past(states) else self._visible(states, 0)[:, :past]

    def _hides_past(self, states: PilotStates) -> bool:
        """Whether a forward's mask does not go back to the first position, since a window slides."""
        return self._visible(states, 0).shape[1] < states.past_length + states.length

    def _visible(self, states: PilotStates, start: int) -> torch.Tensor:
        """Which positions from `start` to the end n of one forward are not padding, by its mask in whatever form it
        came: `[R, n - start]` bool, or the last of them, where a window slides."""
        mask: Any = states.attention_mask
        if isinstance(mask, dict):
            mask = mask.get("full_attention", next(iter(mask.values())))
        n = states.past_length + states.length
        if mask is None:
            visible = torch.ones(len(states.last_hidden_state), n - start, dtype=torch.bool)
        elif mask.ndim == 2:
            visible = mask[:, start:n] != 0
        else:  # [R, 1, t, n or more], bool or additive: visible to any query
            columns = mask[:, 0, :, :n][..., -(n - start) :]  # a sliding window has fewer than n
            visible = (columns if mask.dtype == torch.bool else columns == 0).any(1)
        return visible.to(self.copilot.device)

    def _next_input(self, token: torch.Tensor, continues: bool) -> dict[str, torch.Tensor]:
        """What the Copilot is fed: the start vector, ℓ of the token just emitted, or (predicted) its own last f.

        Realised: ℓ_{i−1} = onehot(token) − p̂_{i−1}, as in training. Predicted (Algorithm 2): f_{i−1}. After a token
        that the Copilot has no row for (a padding row of this Pilot) it is fed the start vector.
        """
        rows, top_k = len(token), self.config.top_k
        is_start = (token >= self.config.vocab_size)[:, None] | (not continues)  # [R, 1]
        token = token.clamp(max=self.config.vocab_size - 1)
        if not continues:
            indices, values = token[:, None, None], torch.zeros(rows, 1, 1, device=token.device)
            return {"input_indices": indices, "input_values": values, "is_start": is_start}
        if self.config.error_feedback == "predicted" and self.config.copilot_input != "token":
            embedding = self.copilot.vocabulary(self.lent).embedding  # [V, e]
            fed = self.last_correction.to(embedding.dtype) @ embedding  # [R, e]
            if self.config.copilot_input == "both":
                fed = fed + embedding[token]
            fed = self.copilot.project_input(fed[:, None])  # [R, 1, d]
            return {"input_indices": None, "input_values": None, "is_start": is_start, "inputs_embeds": fed}
        known = self.last_logits[:, : self.config.vocab_size].float()  # [R, V]
        mistake = sparse_discrepancy(known, token, top_k)  # [R, k + 1]
        return {
            "input_indices": mistake.indices[:, None],
            "input_values": mistake.values[:, None],
            "is_start": is_start,
        }

    def _run(self, inputs: dict[str, torch.Tensor], memory: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One query per row through the Copilot in eval mode: f, `[R, V]` float32."""
        was_training = self.copilot.training
        if was_training:
            self.copilot.eval()
        output = self.copilot(
            **inputs,
            memory=memory,
            memory_mask=mask,
            past_key_values=self.cache,
            return_logits=True,
            lent=self.lent,
        )
        if was_training:
            self.copilot.train()
        return output.logits[:, 0].float()


def pad_to_vocabulary(correction: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """f for a Pilot with other padding rows: cut, or 0 in rows that the Copilot does not have; `[R, vocab_size]`."""
    return F.pad(correction, (0, vocab_size - correction.shape[-1]))

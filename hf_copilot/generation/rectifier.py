"""The Copilot's correction for every next token of a running `generate` (Algorithm 2).

Mirror image of the learner: it reads the same states through the same tap. Shapes: R rows, n tokens so far, d the
Copilot's hidden size, V vocabulary.
"""

from __future__ import annotations

from threading import Lock

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from ..model.discrepancy import sparse_discrepancy
from ..model.memory import memory_of
from ..model.modeling_copilot import CopilotModel, Vocabulary, rotary_positions
from ..pilot.compatibility import check_generation
from ..pilot.tap import GenerationTap
from ..pilot.vocabulary import lent_vocabulary
from .follower import Follower, Piece, Step

WITH_GRADIENT = (
    "The Pilot's last forward computed gradients, as in training, and a CopilotLogitsProcessor reads none of these: "
    "put torch.no_grad() around your decoding loop, as `generate` does."
)

MODE = Lock()  # threads that share a Copilot in training mode switch it one at a time


class Rectifier:
    """The Copilot's side of a `generate` call.

    Args:
        copilot: Run in eval mode, whatever mode it is in.
        pilot: The model whose `generate` is followed.

    Raises:
        NotImplementedError: For a Pilot with virtual tokens (prompt, prefix or p-tuning).
    """

    def __init__(self, copilot: CopilotModel, pilot: nn.Module):
        check_generation(pilot)
        self.copilot, self.config, self.memory = copilot, copilot.config, memory_of(copilot.config)
        self.follower = Follower(self.memory.reads_states)
        self.was_with_gradient = False  # the Pilot's last forward, which is one of training then
        self.tap = GenerationTap(pilot, self.config, self.follower.take, self._listens)
        self.tap.open()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.follower.reset()
        self.lent: Vocabulary | None = None  # the Pilot's matrices, as they were when the run began
        self.cache = self.copilot.new_cache()  # the memory of n positions, the run of the queries so far
        self.last_logits: torch.Tensor | None = None  # [R, V] the Pilot's logits at the last call
        self.last_correction: torch.Tensor | None = None  # [R, V] f at the last call

    def close(self) -> None:
        """Remove the hooks from the Pilot and forget everything."""
        self.tap.close()
        self.reset()

    def _listens(self) -> bool:
        """Asked before a forward of the Pilot, when `generate` has just waited for the last token."""
        self.follower.settle()
        self.was_with_gradient = torch.is_grad_enabled()
        return not self.was_with_gradient

    @torch.no_grad()
    def correction(self, input_ids: torch.Tensor) -> torch.Tensor:
        """f for the token after `input_ids` `[R, n]`: `[R, V]` float32.

        Raises:
            ValueError: If these are not the tokens that the Pilot has just been run on, or it was run with gradients.
        """
        if self.was_with_gradient and not self.follower.pending:
            raise ValueError(WITH_GRADIENT)
        step = self.follower.follow(input_ids.to(self.copilot.device))
        try:
            return self._rectify(step)
        except BaseException:  # no memory, Ctrl-C: what is kept belongs to no call
            self.reset()
            raise

    def _rectify(self, step: Step) -> torch.Tensor:
        self._keep_rows(step)
        if not step.continues:
            self._begin_run()
        self._keep_memory(step)
        correction = self._run(self._next_input(step) | self._next_memory(step))  # [R, V]
        self.last_logits, self.last_correction = step.next_logits, correction
        return correction

    # ---- what is kept of the last call -----------------------------------------------------------------------------

    def _keep_rows(self, step: Step) -> None:
        if step.rows is not None:
            self.cache.reorder_cache(step.rows)
            self.last_logits = self.last_logits[step.rows]
            self.last_correction = self.last_correction[step.rows]

    def _begin_run(self) -> None:
        self.cache.self_attention_cache = DynamicCache()
        if self.config.vocab_projection == "pilot":
            self.lent = lent_vocabulary(self.tap.model, self.copilot.device)

    def _keep_memory(self, step: Step) -> None:
        """Keep the memory of the first positions: all of it in most calls."""
        if step.kept == 0:
            self.cache.cross_attention_cache = DynamicCache()
            return
        encoder_length = 0 if step.encoder_visible is None else step.encoder_visible.shape[1]
        memory = self.cache.cross_attention_cache
        surplus = memory.get_seq_length() - self.memory.size(step.kept, encoder_length)
        if surplus > 0:
            memory.crop(-surplus)

    # ---- the Copilot's step ----------------------------------------------------------------------------------------

    def _next_memory(self, step: Step) -> dict[str, torch.Tensor]:
        """The memory's new entries, what the one query of each row may read of it, and where both stand."""
        entries = torch.cat([self._entries(piece) for piece in step.pieces], dim=1)  # [R, new entries, ...]
        last = step.ids.new_full((len(step.ids), 1), step.ids.shape[1] - 1)  # [R, 1]
        reads = self.memory.reads(last, step.visible, step.encoder_visible)
        positions = step.visible.cumsum(1) - 1  # [R, n], as in a row without padding
        where = rotary_positions(self.config, positions[:, -1:], positions[:, step.kept :])
        return {"memory": entries, "memory_mask": reads, **where}

    def _entries(self, piece: Piece) -> torch.Tensor:
        states = {"device": self.copilot.device, "dtype": self.copilot.dtype}
        tensors = [None if tensor is None else tensor.to(**states) for tensor in piece[1:3]]
        return self.memory.entries(piece.input_ids, *tensors, piece.is_first)

    def _next_input(self, step: Step) -> dict[str, torch.Tensor]:
        """What the Copilot is fed: the start vector, ℓ of the token just emitted, or (predicted) its own last f.

        Realised: ℓ_{i−1} = onehot(token) − p̂_{i−1}, as in training. Predicted (Algorithm 2): f_{i−1}. After a token
        that the Copilot has no row for (a padding row of this Pilot) it is fed the start vector.
        """
        vocab_size, token = self.config.vocab_size, step.ids[:, -1]  # [R]
        is_start = (token >= vocab_size)[:, None] | (not step.continues)  # [R, 1]
        token = token.clamp(max=vocab_size - 1)
        if not step.continues:
            values = torch.zeros(len(token), 1, 1, device=token.device)
            return {"input_indices": token[:, None, None], "input_values": values, "is_start": is_start}
        if self.config.error_feedback == "predicted" and self.config.copilot_input != "token":
            fed = {"input_indices": None, "input_values": None, "inputs_embeds": self._predicted_input(token)}
            return fed | {"is_start": is_start}
        mistake = sparse_discrepancy(self.last_logits[:, :vocab_size].float(), token, self.config.top_k)  # [R, k + 1]
        fed = {"input_indices": mistake.indices[:, None], "input_values": mistake.values[:, None]}
        return fed | {"is_start": is_start}

    def _predicted_input(self, token: torch.Tensor) -> torch.Tensor:
        """The last f, and with `copilot_input="both"` the token `[R]`, by the embedding: `[R, 1, d]`."""
        embedding = self.copilot.vocabulary(self.lent).embedding  # [V, e]
        fed = self.last_correction.to(embedding.dtype) @ embedding  # [R, e]
        if self.config.copilot_input == "both":
            fed = fed + embedding[token]
        return self.copilot.project_input(fed[:, None])

    def _run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """One query per row through the Copilot in eval mode: f, `[R, V]` float32."""
        with MODE:
            was_training = self.copilot.training
            if was_training:
                self.copilot.eval()
            try:
                output = self.copilot(**inputs, cache=self.cache, return_logits=True, lent=self.lent)
            finally:
                if was_training:
                    self.copilot.train()
        return output.logits[:, 0].float()


def pad_to_vocabulary(correction: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """f for a Pilot with other padding rows: cut, or 0 in rows that the Copilot does not have; `[R, vocab_size]`."""
    return F.pad(correction, (0, vocab_size - correction.shape[-1]))

"""The Copilot's correction for every next token of a running `generate` (Algorithm 2).

Mirror image of the learner: it reads the same states through the same tap. Shapes: R rows, n tokens so far, d the
Copilot's hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock, get_ident

import torch
import torch.nn.functional as F
from torch import nn

from ..model.attention import NOWHERE, Span
from ..model.caches import Caches
from ..model.discrepancy import sparse_discrepancy
from ..model.memory import memory_of
from ..model.modeling_copilot import CopilotModel, Vocabulary, rotary_positions
from ..pilot.compatibility import check_generation
from ..pilot.tap import GenerationTap, PilotStates
from ..pilot.vocabulary import lent_vocabulary
from .cuda_graphs import Inputs, Record, RecordedStep
from .follower import Follower, Piece, Step
from .growing_cache import GrowingCache, power_of_two

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
        record: Records the step of one more token for every row, as [`CudaGraph`] does; None does not.

    Raises:
        NotImplementedError: For a Pilot with virtual tokens (prompt, prefix or p-tuning).
    """

    def __init__(self, copilot: CopilotModel, pilot: nn.Module, record: Record | None = None):
        check_generation(pilot)
        self.copilot, self.config, self.memory = copilot, copilot.config, memory_of(copilot.config)
        self.follower = Follower(self.config.reads_states)
        self.was_with_gradient = False  # the Pilot's last forward, which is one of training then
        self.recorded = RecordedStep(self._run, record) if record else None
        self.tap = GenerationTap(pilot, self.config, self.follower.take, self._listens, begun=self._begin_beside)
        self.tap.open()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        if self.recorded is not None:
            self.recorded.forget()
        self.follower.reset()
        self.lent: Vocabulary | None = None  # the Pilot's matrices, as they were when the run began
        own = sum(kind != "cross" for kind in self.config.attention_types)  # layers that keep the run of the queries
        memory = sum(kind != "self" for kind in self.config.attention_types)  # that keep the memory of n positions
        self.caches = Caches(GrowingCache(own), GrowingCache(memory))
        self.last_logits: torch.Tensor | None = None  # [R, V] the Pilot's logits at the last call
        self.last_correction: torch.Tensor | None = None  # [R, V] f at the last call
        self.begun: tuple[PilotStates, torch.Tensor] | None = None  # a forward, and f `[R, V]`, which is on its way

    def close(self) -> None:
        """Remove the hooks from the Pilot and forget everything."""
        self.tap.close()
        self.reset()

    def _listens(self) -> bool:
        """Asked before a forward of the Pilot, when `generate` has just waited for the last token."""
        self.follower.settle()
        self.was_with_gradient = torch.is_grad_enabled()
        if self.was_with_gradient:
            self.follower.of_threads.pop(get_ident(), None)  # older ones are not what is asked about next
        return not self.was_with_gradient

    @torch.inference_mode(False)  # what is kept is written to again, outside of it too
    @torch.no_grad()
    def correction(self, input_ids: torch.Tensor) -> torch.Tensor:
        """f for the token after `input_ids` `[R, n]`: `[R, V]` float32. Where steps are recorded it lasts until the
        Pilot's next forward.

        Raises:
            ValueError: If these are not the tokens that the Pilot has just been run on, or it was run with gradients.
        """
        if self.was_with_gradient and not self.follower.pending:
            raise ValueError(WITH_GRADIENT)
        step = self.follower.follow(input_ids.to(self.copilot.device))
        with self._all_or_nothing():
            return self._rectify(step)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _begin_beside(self, states: PilotStates) -> None:
        """Start the step of the next call beside the Pilot's forward, where it is known what that reads."""
        if self.recorded is None or self.follower.thread != get_ident():
            return
        step = self.follower.foresee(states)
        self.begun = None
        if step is not None:
            with self._all_or_nothing():
                self.begun = states, self._start(step)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # no memory, Ctrl-C: what is kept belongs to no call
            self.reset()
            raise

    def _rectify(self, step: Step) -> torch.Tensor:
        begun, self.begun = self.begun, None
        if self.recorded is not None:
            self.recorded.join()
        if begun is not None and begun[0] is step.forward and self._is_one_token(step) and step.rows is None:
            correction = begun[1]  # [R, V]
        else:
            self._keep(step)
            correction = self._next(step)  # [R, V]
        own, memory = self.caches
        own.length, memory.length = own.length + 1, self._size(step, step.ids.shape[1])
        is_fed_back = self.recorded is not None and self.config.error_feedback == "predicted"
        self.last_correction = correction.clone() if is_fed_back else correction  # a step may be begun in vain
        self.last_logits = step.next_logits
        return correction

    # ---- what is kept of the last call -----------------------------------------------------------------------------

    def _keep(self, step: Step) -> None:
        """The memory of the first positions, all of it in most calls; the run, where it goes on."""
        (own, memory), rows = self.caches, step.rows
        if rows is not None and step.kept:
            memory.reorder(rows)
        if rows is not None and step.continues:
            own.reorder(rows)
            self.last_logits, self.last_correction = self.last_logits[rows], self.last_correction[rows]
        if not step.continues:
            own.keep(0)
            self._begin_run()
        memory.keep(self._size(step, step.kept) if step.kept else 0)

    def _begin_run(self) -> None:
        if self.config.vocab_projection == "pilot":
            self.lent = lent_vocabulary(self.tap.model, self.copilot.device)
        if self.recorded is not None:
            self.recorded.use([*self.copilot.parameters(), *(self.lent or ())])

    def _size(self, step: Step, positions: int) -> int:
        """The memory's entries of so many positions."""
        return self.memory.size(positions, 0 if step.encoder_visible is None else step.encoder_visible.shape[1])

    # ---- the Copilot's step ----------------------------------------------------------------------------------------

    def _next(self, step: Step) -> torch.Tensor:
        """One query for each row: f, `[R, V]` float32."""
        if self.recorded is None or not self._is_one_token(step):
            with self._mode():
                return self._run(self._inputs(step))
        correction = self._start(step)  # [R, V]
        self.recorded.join()
        return correction

    def _is_one_token(self, step: Step) -> bool:
        """Whether every row goes on by a token, and the memory by its entries."""
        return step.continues and step.kept == step.ids.shape[1] - 1

    def _start(self, step: Step) -> torch.Tensor:
        """Begin a recorded step of one token for each row; gives where f will be, `[R, V]`."""
        inputs = self._inputs(step) | self._places(step)
        with self._mode():
            return self.recorded.start(inputs, [cache.held for cache in self.caches if cache.held is not None])

    def _inputs(self, step: Step) -> dict[str, torch.Tensor]:
        """What [`_run`] reads at this step."""
        entries, device = [self._entries(piece) for piece in step.pieces], step.ids.device
        inputs = {
            "token": step.ids[:, -1],  # [R]
            "memory": entries[0] if len(entries) == 1 else torch.cat(entries, dim=1),  # [R, new entries, ...]
            "new": torch.arange(step.kept, step.ids.shape[1], device=device),  # [t], the query's last
            "visible": step.visible,  # [R, n]
        }
        if step.encoder_visible is not None:
            inputs["encoder_visible"] = step.encoder_visible  # [R, S]
        if step.continues and self.config.copilot_input != "token":
            is_predicted = self.config.error_feedback == "predicted"
            inputs["before"] = self.last_correction if is_predicted else self.last_logits  # [R, V]
        return inputs

    def _places(self, step: Step) -> dict[str, torch.Tensor]:
        """Where in the caches it writes, and positions that are still to come: the shapes of many steps are one."""
        (own, memory), n, device = self.caches, step.ids.shape[1], step.ids.device
        columns, end = power_of_two(n), self._size(step, n)
        own.make_room(own.length + 1)
        memory.make_room(self._size(step, columns))
        return {
            "visible": F.pad(step.visible, (0, columns - n)),  # [R, columns]
            "own_places": torch.arange(own.length, own.length + 1, device=device),  # [1]
            "memory_places": torch.arange(memory.length, end, device=device),  # [new entries]
        }

    def _run(self, inputs: Inputs) -> torch.Tensor:
        """f of one query for each row, `[R, V]` float32, and its keys and values in the caches."""
        own, memory = self.caches
        own.places, memory.places = inputs.get("own_places"), inputs.get("memory_places")
        read = self._fed(inputs) | self._read(inputs)
        output = self.copilot(**read, cache=self.caches, return_logits=True, lent=self.lent)
        return output.logits[:, 0].float()

    def _read(self, inputs: Inputs) -> dict[str, torch.Tensor | Span | None]:
        """The memory's new entries, what the queries may read of it and of the run, and where all stand."""
        new, visible, (own, memory) = inputs["new"], inputs["visible"], self.caches
        last = new[-1:].expand(len(visible), 1)  # [R, 1]
        positions = visible.cumsum(1) - 1  # [R, n], as in a row without padding
        reads, self_mask = self.memory.reads(last, visible, inputs.get("encoder_visible")), None
        if memory.places is not None:
            reads = reads._replace(places=F.pad(reads.places, (0, memory.room - reads.places.shape[1]), value=NOWHERE))
        if own.places is not None and own.layers:
            places = torch.arange(own.room, device=new.device).expand(len(visible), -1)  # [R, C]
            self_mask = Span(places, own.places.expand(len(visible), 1))
        where = rotary_positions(self.config, positions[:, new[-1:]], positions[:, new])
        return {"memory": inputs["memory"], "memory_mask": reads, "self_mask": self_mask, **where}

    def _entries(self, piece: Piece) -> torch.Tensor:
        states = {"device": self.copilot.device, "dtype": self.copilot.dtype}
        tensors = [None if tensor is None else tensor.to(**states) for tensor in piece[1:3]]
        return self.memory.entries(piece.input_ids, *tensors, piece.is_first)

    def _fed(self, inputs: Inputs) -> dict[str, torch.Tensor | None]:
        """What the Copilot is fed: the start vector, ℓ of the token just emitted, or (predicted) its own last f.

        Realised: ℓ_{i−1} = onehot(token) − p̂_{i−1}, as in training. Predicted (Algorithm 2): f_{i−1}. After a token
        that it has no row for it is fed the start vector.
        """
        vocab_size, before = self.config.vocab_size, inputs.get("before")
        token, is_unknown = self.copilot.known(inputs["token"])  # [R], [R]
        is_start = is_unknown[:, None] | (not self.caches.own.length)  # [R, 1]
        fed = {"is_start": is_start, "input_indices": None, "input_values": None}
        if before is None:  # the first query of a run, or one that is fed the token alone
            values = torch.zeros(len(token), 1, 1, device=token.device)
            return fed | {"input_indices": token[:, None, None], "input_values": values}
        if self.config.error_feedback == "predicted":
            embeds = torch.where(is_start[..., None], self.copilot.start.weight, self._predicted_input(token, before))
            return fed | {"inputs_embeds": embeds}  # [R, 1, d]
        mistake = sparse_discrepancy(before[:, :vocab_size].float(), token, self.config.top_k)  # [R, k + 1]
        return fed | {"input_indices": mistake.indices[:, None], "input_values": mistake.values[:, None]}

    def _predicted_input(self, token: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
        """The last f `[R, V]`, and with `copilot_input="both"` the token `[R]`, by the embedding: `[R, 1, d]`."""
        embedding = self.copilot.vocabulary(self.lent).embedding  # [V, e]
        fed = correction.to(embedding.dtype) @ embedding  # [R, e]
        if self.config.copilot_input == "both":
            fed = fed + embedding[token]
        return self.copilot.project_input(fed[:, None])

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """Eval mode; where steps are recorded without autocast, whose casts do not last."""
        is_recorded, kind = self.recorded is not None, self.copilot.device.type
        with MODE, torch.autocast(kind, enabled=False) if is_recorded else nullcontext():
            was_training = self.copilot.training
            if was_training:
                self.copilot.eval()
            try:
                yield
            finally:
                if was_training:
                    self.copilot.train()


def pad_to_vocabulary(correction: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """f for a Pilot with other padding rows: cut, or 0 in rows that the Copilot does not have; `[R, vocab_size]`."""
    return F.pad(correction, (0, vocab_size - correction.shape[-1]))

"""Which request is in which slot of an engine's batch, and what is kept of those that left it. No Copilot in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Mistake = tuple[torch.Tensor, torch.Tensor]  # ℓ of one token: indices and values, [k + 1] each


@dataclass(eq=False)
class Request:
    """One request, whatever slot it is in.

    Attributes:
        prompt_length: Tokens of its prompt: a run of the Copilot begins at the last of them.
        strength: λ, more than 0.
        source: Where its tokens are read, as the engine has them.
        held: Tokens whose keys and values are in the caches.
        mistakes: ℓ of its generated tokens, of a Copilot that reads them.
        logits: `[V]`, the Pilot's for the next token, likewise.
    """

    prompt_length: int
    strength: float
    source: Any
    held: int = 0
    mistakes: list[Mistake] = field(default_factory=list)
    logits: torch.Tensor | None = None


class Turn(NamedTuple):
    """A request that gets a token in this step."""

    row: int  # of the logits
    request: Request
    length: int  # tokens so far, prompt and generated


class Lists(NamedTuple):
    """The tokens of a request as vLLM's first runner has them: two lists, of which the second grows."""

    prompt: list[int]
    output: list[int]

    def read(self, start: int, stop: int) -> list[int]:
        """Those at the positions from `start` to before `stop`."""
        border = len(self.prompt)
        return self.prompt[start:stop] + self.output[max(start - border, 0) : max(stop - border, 0)]

    def is_of(self, other: Lists) -> bool:
        """Whether both are of one request: the runner keeps a request's lists while others have its slot."""
        return self.prompt is other.prompt or self.output is other.output

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)


class Slots:
    """Requests by slot. One that leaves, since it is done or since others need its memory, gives its keys and values
    back at once.

    Of those that left last the discrepancies stay, and a request that comes back, which is known by its tokens, has
    them again: ℓ hangs on the tokens before it alone.

    Args:
        free: Called with a request that leaves.
        kept: Of how many they stay; 0 for a Copilot that reads none.
    """

    def __init__(self, free: Callable[[Request], None], kept: int = 0):
        self.free, self.kept = free, kept
        self.of: dict[int, Request] = {}
        self.left: list[tuple[list[int], Request]] = []  # tokens whose discrepancies are known, oldest first

    def update(
        self,
        removed: Iterable[int],
        added: Iterable[tuple[int, Request | None]],
        moved: Iterable[tuple[int, int, bool]] = (),
    ) -> None:
        """Follow a change of the batch, in the engine's order: what is removed, added (None is a request without a
        Copilot), and moved from a slot to another, or swapped. What was in a slot that is filled has left, be it named
        among the removed or not."""
        added = list(added)
        for slot in (*removed, *(slot for slot, _ in added)):
            self._leave(slot)
        self.of |= {slot: request for slot, request in added if request is not None}
        for start, end, swaps in moved:
            first, second = self.of.pop(start, None), self.of.pop(end, None) if swaps else self._leave(end)
            self.of |= {slot: request for slot, request in ((end, first), (start, second)) if request is not None}
        for _, request in added:
            if request is not None:
                self._come_back(request)

    def _leave(self, slot: int) -> None:
        request = self.of.pop(slot, None)
        if request is None:
            return
        self.free(request)
        if not self.kept:
            return
        known = request.prompt_length + len(request.mistakes)
        if len(request.source) == known:
            request.logits = None  # no token was drawn from them: of a prompt that was not read to its end
        if request.logits is not None:
            request.logits = request.logits.clone()  # a row of a batch, which can go
        if request.mistakes or request.logits is not None:
            self.left = [*self.left, (request.source.read(0, known), request)][-self.kept :]

    def _come_back(self, request: Request) -> None:
        """Give a request what is kept of it, if it was here before."""
        if not self.kept or len(request.source) == request.prompt_length:
            return
        length, found = len(request.source), []
        for tokens, old in self.left:
            is_whole = len(tokens) == length or (len(tokens) == length - 1 and old.logits is not None)
            is_its_run = old.prompt_length == request.prompt_length
            if is_whole and is_its_run and tokens == request.source.read(0, len(tokens)):
                found.append((old.source.is_of(request.source), len(found), tokens, old))
        if found:  # the same request before another with the same tokens, then the newest
            *_, tokens, old = max(found, key=lambda one: one[:2])
            request.mistakes, request.logits = old.mistakes, old.logits
            self.left.remove((tokens, old))

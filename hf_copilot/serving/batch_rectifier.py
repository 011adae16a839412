"""The Copilot's correction for requests of different lengths, which come and go (Algorithm 2).

The sister of generation's rectifier, which follows one `generate`. It knows no engine: an adapter says which requests
get a token in this step, and reads their tokens. Shapes: R rows, s tokens that are new to the caches, m queries,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..generation.rectifier import pad_to_vocabulary
from ..model.attention import Span
from ..model.caches import Caches
from ..model.discrepancy import fuse, sparse_discrepancy
from ..model.memory import memory_of
from ..model.modeling_copilot import CopilotModel, rotary_positions
from .paged_cache import PagedCache
from .requests import Mistake, Request, Turn

LOST = (
    "A request came back to the batch, and the discrepancies of its tokens, which this Copilot reads, are gone. Train "
    "one with CopilotConfig(copilot_input='token'), which reads none."
)

Read = Callable[[Sequence[Request], Sequence[int], int], torch.Tensor]


class BatchRectifier:
    """The Copilot's side of an engine.

    Args:
        copilot: One that reads tokens; put in eval mode.
        read: Gives the tokens of requests `[R, s]` int64, on the Copilot's device: of every one `s` from its place on.
        requests, length: The most that are served at once, and the most tokens of one.
    """

    def __init__(self, copilot: CopilotModel, read: Read, requests: int, length: int):
        self.copilot, self.config, self.read = copilot.eval(), copilot.config, read
        self.memory = memory_of(copilot.config)
        self.caches = Caches(PagedCache(requests, length), PagedCache(requests, length))
        self.rows = copilot.config.vocab_size  # of the vocabulary, that Pilot and Copilot both have

    @torch.inference_mode()
    def free(self, request: Request) -> None:
        """Give back what is held of a request; if it is served again, it is computed again."""
        for cache in self.caches:
            cache.free(request)
        request.held = 0

    @torch.inference_mode()
    def rectify(self, logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        """Rectify the Pilot's logits `[R, V]` float32 in place, in the rows of these turns; gives them back.

        A request whose prompt is not read to its end may have a turn too: what is computed for it is computed again.

        Raises:
            RuntimeError: If a request came back whose discrepancies are needed, and gone.
        """
        self.rows = min(self.config.vocab_size, logits.shape[-1])
        for turns_alike in _alike(turns):
            rows = [turn.row for turn in turns_alike]
            scores = logits[rows]  # [R, V] a copy
            correction = pad_to_vocabulary(self.correction(turns_alike), scores.shape[-1])  # [R, V]
            for strength in {turn.request.strength for turn in turns_alike}:
                of = [i for i, turn in enumerate(turns_alike) if turn.request.strength == strength]
                fused = fuse(scores[of], correction[of].to(scores.device), strength, self.config.fusion)
                logits[[rows[i] for i in of]] = fused
            if self.config.copilot_input != "token":
                for turn, pilot in zip(turns_alike, scores, strict=True):
                    turn.request.logits = pilot
        return logits

    def correction(self, turns: Sequence[Turn]) -> torch.Tensor:
        """f for the next token of requests that have as many new tokens and queries: `[R, V]` float32."""
        requests, device = [turn.request for turn in turns], self.copilot.device
        new, queries = _new(turns[0])
        starts = [turn.length - new for turn in turns]
        ids = self.read(requests, starts, new)  # [R, s]
        ends = torch.tensor([turn.length for turn in turns], device=device)[:, None]  # [R, 1]
        first = torch.tensor([request.prompt_length - 1 for request in requests], device=device)[:, None]  # [R, 1]
        positions = ends - torch.arange(queries, 0, -1, device=device)  # [R, m]
        tokens = ends - torch.arange(new, 0, -1, device=device)  # [R, s] positions of the memory's new tokens
        own, shared = self.caches
        own.open(requests, [_run(turn) - queries for turn in turns], queries, device)
        shared.open(requests, starts, new, device)
        places = torch.arange(own.read.shape[1], device=device).expand_as(own.read)  # [R, e]
        output = self.copilot(
            **self._inputs(turns, ids[:, -queries:], positions == first),
            memory=ids,
            memory_mask=self.memory.reads(positions, torch.ones_like(shared.read, dtype=torch.bool)),
            self_mask=Span(places, positions - first),
            cache=self.caches,
            **rotary_positions(self.config, positions, tokens),
        )
        for turn in turns:
            turn.request.held = turn.length
        return self.copilot.logits(output.last_hidden_state[:, -1]).float()

    # ---- what the queries are fed ----------------------------------------------------------------------------------

    def _inputs(self, turns: Sequence[Turn], ids: torch.Tensor, is_first: torch.Tensor) -> dict[str, torch.Tensor]:
        """At the last of the prompt the start vector, then ℓ of the token at the query, `ids` `[R, m]`; after one that
        the Copilot has no row for, the start vector."""
        ids, is_unknown = self.copilot.known(ids)  # [R, m], [R, m]
        is_start = is_first | is_unknown  # [R, m]
        if self.config.copilot_input == "token":
            indices = ids[..., None]  # [R, m, 1]
            return {"input_indices": indices, "input_values": torch.zeros_like(indices).float(), "is_start": is_start}
        self._learn_mistakes(turns, ids[:, -1])
        fed = [self._mistakes(turn, ids.shape[1]) for turn in turns]
        indices, values = (torch.stack(column) for column in zip(*fed, strict=True))  # [R, m, k + 1]
        return {"input_indices": indices, "input_values": values, "is_start": is_start}

    def _learn_mistakes(self, turns: Sequence[Turn], ids: torch.Tensor) -> None:
        """ℓ of the newest tokens `[R]`, where it is not known, by the Pilot's logits of the last turn."""
        missing = []
        for i, turn in enumerate(turns):
            request, generated = turn.request, turn.length - turn.request.prompt_length
            del request.mistakes[generated:]  # of tokens that the engine took back
            if len(request.mistakes) < generated - (request.logits is not None):
                raise RuntimeError(LOST)
            if len(request.mistakes) < generated:
                missing.append(i)
        if missing:
            logits = torch.stack([turns[i].request.logits for i in missing]).to(ids.device)  # [R', V]
            logits = logits[:, : self.config.vocab_size].float()
            found = sparse_discrepancy(logits, ids[missing], self.config.top_k)
            for i, *mistake in zip(missing, found.indices, found.values, strict=True):
                turns[i].request.mistakes.append(tuple(mistake))

    def _mistakes(self, turn: Turn, queries: int) -> Mistake:
        """ℓ before each of the last queries: indices and values, `[m, k + 1]`; zeros before the first, which reads
        none."""
        size, device = min(self.config.top_k, self.rows) + 1, self.copilot.device
        nothing = torch.zeros(size, dtype=torch.int64, device=device), torch.zeros(size, device=device)
        fed = turn.request.mistakes[-queries:]
        if len(fed) < queries:
            fed = [nothing, *fed]
        indices, values = zip(*fed, strict=True)
        return torch.stack(indices), torch.stack(values)


def _run(turn: Turn) -> int:
    """Queries of a run so far: one at the end of the prompt, and one at each token since."""
    return turn.length - turn.request.prompt_length + 1


def _new(turn: Turn) -> tuple[int, int]:
    """How many tokens are new to the caches, and queries: at least the last, which a request may be served again."""
    start = min(turn.request.held, turn.length - 1)
    return turn.length - start, min(turn.length - start, _run(turn))


def _alike(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Turns of as many new tokens and queries together: one batch without padding. Nearly all have one of each."""
    groups: dict[tuple[int, int], list[Turn]] = {}
    for turn in turns:
        groups.setdefault(_new(turn), []).append(turn)
    return list(groups.values())

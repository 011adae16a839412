"""What a Pilot's cache holds: of how many positions, and whether it holds all of the Pilot's state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from transformers import Cache


def find_cache(values: Iterable[Any]) -> Cache | None:
    """The cache among the arguments or outputs of a forward, which is known by its type."""
    return next((value for value in values if isinstance(value, Cache)), None)


class CachedPositions:
    """How many positions the caches of a decoder hold. One whose layers are all of a state-space model can't say: then
    those are counted that the decoder is seen to read into it."""

    def __init__(self):
        self.counted: WeakKeyDictionary[Cache, int] = WeakKeyDictionary()

    def before(self, cache: Cache | None) -> int:
        """In the cache that a forward is given; 0 where they can't be known, and none are."""
        if cache is None:
            return 0
        if says_its_positions(cache):
            return int(cache.get_seq_length())
        return self.counted.get(cache, 0) if cache.has_previous_state() else 0

    def count(self, cache: Cache | None, length: int) -> None:
        """There are so many now, after a forward."""
        if cache is not None and not says_its_positions(cache):
            self.counted[cache] = length


def says_its_positions(cache: Cache) -> bool:
    """Whether a layer of it is one of attention."""
    try:
        cache.get_seq_length()
    except ValueError:
        return False
    return True


def holds_every_state(cache: Cache | None) -> bool:
    """Whether each layer of a cache holds something after a forward. Else the Pilot keeps states elsewhere
    (RecurrentGemma in its modules, MiniMax beside the layers of its cache), and they do not follow beams."""
    return all(_holds(cache, i) for i in range(len(getattr(cache, "layers", ()))))


def _holds(cache: Cache, i: int) -> bool:
    try:
        return cache.has_previous_state(i)
    except ValueError:  # a layer of attention
        return getattr(cache.layers[i], "is_initialized", True)

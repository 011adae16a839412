"""Keys and values of many requests of different lengths, which come and go.

Shapes: R rows, s entries that are new to each, e entries that the longest has, in whole blocks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

BLOCK = 64  # entries
NOTHING = 0  # the block that stays zero: behind the end of what a row has


class PagedCache:
    """Blocks of one pool for every layer. To the layers of a [`CopilotModel`] it is what a `DynamicCache` is.

    It grows with what is held, gives a row's blocks back when the row goes, and everything with the last one.

    Args:
        rows, length: The most rows, and the most entries of one, that are ever held.
    """

    def __init__(self, rows: int, length: int):
        self.most = 1 + rows * -(-length // BLOCK)  # blocks
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.tables: dict[Hashable, list[int]] = {}  # the blocks of every row, in order
        self.size = 1  # blocks of the pool
        self.unused: list[int] = []
        self.pools: dict[int, list[torch.Tensor]] = {}  # keys, values of a layer: [size * BLOCK, kv_heads, head_dim]

    @property
    def entries(self) -> int:
        """How many entries there is room for."""
        return self.size * BLOCK

    def open(self, rows: Sequence[Hashable], starts: Sequence[int], new: int, device: torch.device) -> None:
        """Make room: the next updates are of these rows, each with `new` entries from its place in `starts` on."""
        tables = [self._table(row, start + new) for row, start in zip(rows, starts, strict=True)]
        longest = max(map(len, tables))
        blocks = torch.tensor([table + [NOTHING] * (longest - len(table)) for table in tables], device=device)
        self.read = (blocks[..., None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(1)  # [R, e]
        places = torch.tensor(starts, device=device)[:, None] + torch.arange(new, device=device)  # [R, s]
        self.written = self.read.gather(1, places)  # [R, s]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values of the new entries, `[R, kv_heads, s, head_dim]`, and give all of these rows,
        `[R, kv_heads, e, head_dim]`: zero or another's behind a row's end, and finite."""
        pool = self._pool(layer, keys)
        for held, new in zip(pool, (keys, values), strict=True):
            held[self.written] = new.transpose(1, 2)  # [R, s, kv_heads, head_dim]
        return pool[0][self.read].transpose(1, 2), pool[1][self.read].transpose(1, 2)

    def free(self, row: Hashable) -> None:
        """Give a row's blocks back, zeroed: what is not finite in one request must reach no other."""
        blocks = self.tables.pop(row, [])
        if not self.tables:
            return self.clear()
        for pool in self.pools.values():
            for held in pool:
                held.unflatten(0, (-1, BLOCK))[blocks] = 0
        self.unused += blocks

    def _table(self, row: Hashable, length: int) -> list[int]:
        table = self.tables.setdefault(row, [])
        while len(table) * BLOCK < length:
            if not self.unused:
                self._grow()
            table.append(self.unused.pop())
        return table

    def _grow(self) -> None:
        size = min(2 * self.size, self.most)
        if size == self.size:
            raise RuntimeError(f"More than {self.most - 1} blocks of {BLOCK} entries are asked for.")
        self.unused += range(size - 1, self.size - 1, -1)
        self.size = size

    def _pool(self, layer: int, like: torch.Tensor) -> list[torch.Tensor]:
        pool, shape = self.pools.get(layer, []), (self.entries, like.shape[1], like.shape[3])
        if not pool or len(pool[0]) < self.entries:
            grown = [like.new_zeros(shape) for _ in range(2)]
            for new, held in zip(grown, pool, strict=False):
                new[: len(held)] = held
            self.pools[layer] = grown
        return self.pools[layer]

"""Every block that holds something, at one moment: its owners, how full it is, and whether it can be found by its hash.

Both functions take ``tables``: for each sequence its id, its block table, and how many of its tokens are stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from paged_infer.control.blocks.manager import Table
from paged_infer.control.blocks.pool import BlockPool


class Cell(NamedTuple):
    """One block."""

    block: int
    owners: tuple[int, ...]  # sequence ids; as many as its reference count
    num_tokens: int
    is_hashed: bool

    @property
    def state(self) -> str:
        """ "held", "cached" (free, but found by its hash until it is taken) or "free"."""
        return "held" if self.owners else "cached" if self.is_hashed else "free"


def pool_cells(
    tables: Iterable[tuple[int, Table, int]], pool: BlockPool, block_size: int, *, cached: bool = True
) -> dict[int, Cell]:
    """By its number, each block that is held or hashed; the others are blank. Owners are in the order of ``tables``.

    ``cached``: False leaves out the free ones, which in a large pool are many.
    """
    owners: dict[int, tuple[int, ...]] = {}
    filled: dict[int, int] = {}
    for sequence_id, table, num_stored in tables:
        for index, block in enumerate(table):
            owners[block] = (*owners.get(block, ()), sequence_id)
            here = min(block_size, max(0, num_stored - index * block_size))
            filled[block] = max(filled.get(block, 0), here)
    cells = {
        block: Cell(block, held_by, filled[block], pool.hash_of(block) is not None) for block, held_by in owners.items()
    }
    if cached:
        cells |= {b: Cell(b, (), block_size, True) for b in pool.hashed_blocks if b not in cells}
    return cells


def num_empty_slots(tables: Iterable[tuple[int, Table, int]], block_size: int) -> int:
    """Slots of held blocks that hold no token."""
    empty: dict[int, int] = {}  # by block: a partly filled one may be in several tables
    for _, table, num_stored in tables:
        first = num_stored // block_size
        for index, block in enumerate(table[first:], first):
            filled = max(0, num_stored - index * block_size)
            empty[block] = min(empty.get(block, block_size), block_size - filled)
    return sum(empty.values())

"""Every block that holds something, at one moment: whose it is, how full, and whether it can be found."""

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
    is_hashed: bool  # by its hash

    @property
    def state(self) -> str:
        """ "held", "cached" (free, but findable until it is taken) or "free"."""
        return "held" if self.owners else "cached" if self.is_hashed else "free"


def pool_cells(
    tables: Iterable[tuple[int, Table, int]], pool: BlockPool, block_size: int, *, cached: bool = True
) -> dict[int, Cell]:
    """By its number, each block that is held or can be found; the others are blank.

    Args:
        tables: (sequence id, its block table, how many of its tokens are stored); owners are in this order.
        cached: False leaves out those that are free, however findable: in a large pool they are many.
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

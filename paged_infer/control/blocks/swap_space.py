"""Blocks of CPU memory that keep the keys and values of preempted sequences until the pool has room again.

pool    block 2 [ t0..t15 ]   block 7 [ t16..t22 ]         swap out: (2 -> 0), (7 -> 1), and 2 and 7 are free
           |                     |
swap    block 0 [ t0..t15 ]   block 1 [ t16..t22 ]         swap in: (1 -> 4), and block 2 is found by its hash

A block that several beams of a sequence group share is moved once, and is in the tables of all of them.
"""

from __future__ import annotations

from collections import Counter, deque


class SwapSpace:
    """``num_blocks`` swap blocks, or 0 for none. An emptied one is filled again only in a later step."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._tables: dict[int, tuple[int, ...]] = {}
        self._counts: Counter[int] = Counter()  # how many tables each swap block is in
        self._emptied: list[int] = []

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._emptied)

    def take(self, num_blocks: int) -> list[int] | None:
        """That many free swap blocks, to be put into tables next; None if there are fewer."""
        if num_blocks > len(self._free):
            return None
        return [self._free.popleft() for _ in range(num_blocks)]

    def put(self, sequence_id: int, swap_blocks: tuple[int, ...]) -> None:
        """The sequence's blocks are in these swap blocks, in logical order."""
        self._tables[sequence_id] = swap_blocks
        self._counts.update(swap_blocks)

    def table(self, sequence_id: int) -> tuple[int, ...]:
        return self._tables.get(sequence_id, ())

    def drop(self, sequence_id: int) -> None:
        """Empty the sequence's swap blocks, except those that are also in other tables."""
        swap_blocks = self._tables.pop(sequence_id, ())
        self._counts.subtract(swap_blocks)
        self._emptied += [block for block in swap_blocks if not self._counts[block]]

    def reuse_emptied(self) -> None:
        """The step that may have read the emptied swap blocks is over: they are free."""
        self._free.extend(self._emptied)
        self._emptied.clear()

    def check_integrity(self, sequence_ids: set[int]) -> None:
        """Raises RuntimeError unless exactly these sequences are here, with every swap block free or counted right."""
        if self._tables.keys() != sequence_ids:
            raise RuntimeError(
                f"sequences {sorted(self._tables)[:8]} are in swap space, not {sorted(sequence_ids)[:8]}"
            )
        held = Counter(block for table in self._tables.values() for block in table)
        if held != +self._counts:
            raise RuntimeError("a swap block has a wrong reference count")
        blocks = [*self._free, *self._emptied, *held]
        if sorted(blocks) != list(range(self.num_blocks)):
            raise RuntimeError("a swap block is lost, or is both free and held")

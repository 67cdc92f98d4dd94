"""The physical blocks: which are free, and how often each of the others is held."""

from __future__ import annotations

from collections import deque


class OutOfBlocks(Exception):
    """The pool has no free block left."""


class BlockPool:
    """``num_blocks`` blocks, each either free or held by one or more block tables.

        free    [ 4, 1, 7 ]                     taken from the left, returned to the right
        counts  { 0: 1,  2: 1,  3: 2, ... }     block 3 stands in two tables

    Every operation costs the same whatever the pool's size.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks}: must be at least 1")
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def reference_count(self, block: int) -> int:
        """How many tables hold ``block``; 0 for a free one."""
        return self._counts[block]

    def take(self) -> int:
        """A free block, now held once.

        Raises:
            OutOfBlocks: none is free.
        """
        if not self._free:
            raise OutOfBlocks(f"all {self.num_blocks} blocks are held")
        block = self._free.popleft()
        self._counts[block] = 1
        return block

    def release(self, block: int) -> None:
        """One table fewer holds ``block``; the last one frees it."""
        if self._counts[block] < 1:
            raise RuntimeError(f"block {block} is released but nobody holds it")
        self._counts[block] -= 1
        if self._counts[block] == 0:
            self._free.append(block)

    def check_integrity(self, tables: list[list[int]]) -> None:
        """Law 2: each block is free or held, and held exactly as often as ``tables`` say.

        Raises:
            RuntimeError: naming the blocks that break it.
        """
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        wrong = [block for block in range(self.num_blocks) if held[block] != self._counts[block]]
        if wrong:
            raise RuntimeError(
                f"blocks {wrong[:8]} are counted {[self._counts[b] for b in wrong[:8]]} times "
                f"but stand in {[held[b] for b in wrong[:8]]} tables"
            )
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("a block stands twice in the free list")
        wrong = [block for block in range(self.num_blocks) if (block in free) != (held[block] == 0)]
        if wrong:
            raise RuntimeError(f"blocks {wrong[:8]} are both free and held, or neither")

"""From a sequence's tokens to physical blocks: its block table, grown and freed.

tokens       [ t0 .. t15 | t16 .. t31 | t32 t33 ]        block_size = 16
table        [    7      |     2      |   5     ]        34 tokens need 3 blocks, 14 slots of the last are empty
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from paged_infer.control.block_pool import BlockPool


class Allocation(enum.Enum):
    """Whether so many tokens can have blocks: now, when others have left, or never in this pool."""

    OK = "ok"
    LATER = "later"
    NEVER = "never"


class BlockManager:
    """Block tables of all sequences over one pool."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: must be at least 1")
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self._tables: dict[int, list[int]] = {}

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int) -> Allocation:
        """Whether a sequence that holds no block yet can have its first ``num_tokens`` tokens stored."""
        needed = self.blocks_for(num_tokens)
        if needed > self.pool.num_blocks:
            return Allocation.NEVER
        return Allocation.OK if needed <= self.pool.num_free else Allocation.LATER

    def missing_blocks(self, sequence_id: int, num_tokens: int) -> int:
        """How many more blocks the sequence needs to hold ``num_tokens`` tokens in all."""
        return max(0, self.blocks_for(num_tokens) - len(self._tables.get(sequence_id, ())))

    def grow(self, sequence_id: int, num_tokens: int) -> bool:
        """Make the sequence's table hold ``num_tokens`` tokens in all. All the blocks it lacks, or none and False."""
        missing = self.missing_blocks(sequence_id, num_tokens)
        if missing > self.pool.num_free:
            return False
        if missing:
            table = self._tables.setdefault(sequence_id, [])
            table.extend(self.pool.take() for _ in range(missing))
        return True

    def table(self, sequence_id: int) -> list[int]:
        """Physical blocks of the sequence, in logical order. The manager's own list: read it, do not keep it."""
        return self._tables.get(sequence_id, [])

    def free(self, sequence_id: int) -> None:
        """Give back all of the sequence's blocks; nothing happens if it holds none."""
        for block in self._tables.pop(sequence_id, ()):
            self.pool.release(block)

    def check_integrity(self, num_stored: Mapping[int, int]) -> None:
        """Law 2: nothing leaks, nothing is shared by accident, and ``num_stored`` tokens of each sequence have slots.

        Raises:
            RuntimeError: saying which block or sequence breaks it.
        """
        self.pool.check_integrity(list(self._tables.values()))
        strangers = self._tables.keys() - num_stored.keys()
        if strangers:
            raise RuntimeError(f"sequences {sorted(strangers)[:8]} hold blocks and do not run")
        for sequence_id, num_tokens in num_stored.items():
            if self.missing_blocks(sequence_id, num_tokens):
                raise RuntimeError(f"sequence {sequence_id} has stored {num_tokens} tokens in too few blocks")

"""Blocks of ordinary memory, where preempted sequences keep their keys and values until there is room again.

pool    block 2 [ t0..t15 ]   block 7 [ t16..t22 ]         swap out: (2 -> 0), (7 -> 1), and 2 and 7 are free
           |                     |
swap    place 0 [ t0..t15 ]   place 1 [ t16..t22 ]         swap in: (1 -> 4), and block 2 is found by its hash
"""

from __future__ import annotations

from collections import deque


class SwapSpace:
    """``num_blocks`` places of one block each, 0 for none. A place that is emptied is filled only in a later step."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._tables: dict[int, tuple[int, ...]] = {}
        self._emptied: list[int] = []

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._emptied)

    def put(self, sequence_id: int, num_blocks: int) -> tuple[int, ...] | None:
        """Places for all of a sequence's blocks, in logical order, or None."""
        if num_blocks > len(self._free):
            return None
        self._tables[sequence_id] = tuple(self._free.popleft() for _ in range(num_blocks))
        return self._tables[sequence_id]

    def places(self, sequence_id: int) -> tuple[int, ...]:
        return self._tables.get(sequence_id, ())

    def drop(self, sequence_id: int) -> None:
        """Empty the sequence's places."""
        self._emptied += self._tables.pop(sequence_id, ())

    def reuse_emptied(self) -> None:
        """The step that may have read them is over."""
        self._free.extend(self._emptied)
        self._emptied.clear()

    def check_integrity(self, sequence_ids: set[int]) -> None:
        """Raises RuntimeError unless each place is used once or not at all, and just these sequences are here."""
        if self._tables.keys() != sequence_ids:
            raise RuntimeError(
                f"sequences {sorted(self._tables)[:8]} lie in swap space, not {sorted(sequence_ids)[:8]}"
            )
        places = [*self._free, *self._emptied, *(place for table in self._tables.values() for place in table)]
        if sorted(places) != list(range(self.num_blocks)):
            raise RuntimeError("a place of the swap space is lost, or stands twice")

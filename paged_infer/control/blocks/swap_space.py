"""Blocks of ordinary memory that keep the keys and values of preempted sequences until the pool has room again.

pool    block 2 [ t0..t15 ]   block 7 [ t16..t22 ]         swap out: (2 -> 0), (7 -> 1), and 2 and 7 are free
           |                     |
swap    place 0 [ t0..t15 ]   place 1 [ t16..t22 ]         swap in: (1 -> 4), and block 2 is found by its hash

A block that several beams of a sequence group share is moved once, and is in the tables of all of them.
"""

from __future__ import annotations

from collections import Counter, deque


class SwapSpace:
    """``num_blocks`` places of one block each, 0 for none. An emptied place is filled again only in a later step."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._tables: dict[int, tuple[int, ...]] = {}
        self._counts: Counter[int] = Counter()  # how many tables each place is in
        self._emptied: list[int] = []

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._emptied)

    def take(self, num_blocks: int) -> list[int] | None:
        """That many free places, to be put into tables at once; None if there are fewer."""
        if num_blocks > len(self._free):
            return None
        return [self._free.popleft() for _ in range(num_blocks)]

    def put(self, sequence_id: int, places: tuple[int, ...]) -> None:
        """The sequence's blocks are in these places, in logical order."""
        self._tables[sequence_id] = places
        self._counts.update(places)

    def places(self, sequence_id: int) -> tuple[int, ...]:
        return self._tables.get(sequence_id, ())

    def drop(self, sequence_id: int) -> None:
        """Empty the sequence's places, except those in other tables too."""
        places = self._tables.pop(sequence_id, ())
        self._counts.subtract(places)
        self._emptied += [place for place in places if not self._counts[place]]

    def reuse_emptied(self) -> None:
        """The step that may have read the emptied places is over: they are free."""
        self._free.extend(self._emptied)
        self._emptied.clear()

    def check_integrity(self, sequence_ids: set[int]) -> None:
        """Raises RuntimeError unless each place is free or counted correctly, and exactly these sequences are here."""
        if self._tables.keys() != sequence_ids:
            raise RuntimeError(
                f"sequences {sorted(self._tables)[:8]} are in swap space, not {sorted(sequence_ids)[:8]}"
            )
        held = Counter(place for table in self._tables.values() for place in table)
        if held != +self._counts:
            raise RuntimeError("a place of the swap space has a wrong count")
        places = [*self._free, *self._emptied, *held]
        if sorted(places) != list(range(self.num_blocks)):
            raise RuntimeError("a place of the swap space is lost, or is both free and held")

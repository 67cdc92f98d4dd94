"""From a sequence's tokens to physical blocks: its block table, grown, shared, swapped and freed.

tokens       [ t0 .. t15 | t16 .. t31 | t32 t33 ]        block_size = 16
table        (    7      ,     2      ,   5     )        34 tokens need 3 blocks, 14 slots of the last are empty

Two prompts that begin with the same 32 tokens:

    A   ( 7, 2, 5 )        blocks 7 and 2 are full and hashed, so B finds them: they are counted twice,
    B   ( 7, 2, 9 )        and never written again. Block 5 is partly filled, and nobody else's.

A second sample C of A's prompt begins with all that A has, and copies what it must write to:

    fork   A ( 7, 2, 5 )   C ( 7, 2, 5 )        block 5 is held twice, with room for both
    write  A ( 7, 2, 6 )   C ( 7, 2, 5 )        A writes first, so A gets a copy (5 -> 6); then 5 is C's alone

So does a beam that goes on in two ways, at any token: the other takes the place of a beam that goes on in none.

    fork   A ( 7, 2, 6 )   B ( 7, 3, 4 ) -> ( 7, 2, 6 )        3 and 4 are free, if nobody else holds them

A table is a tuple, replaced when it changes: whoever was given one may keep it.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ReadOnlyList
from itertools import chain
from typing import Any, NamedTuple

from paged_infer.control.blocks.pool import BlockPool
from paged_infer.control.blocks.swap_space import SwapSpace
from paged_infer.control.step import BlockTransfers

Table = tuple[int, ...]


class Allocation(enum.Enum):
    """Whether so many tokens can have blocks: now, when others have left, or never in this pool."""

    OK = "ok"
    LATER = "later"
    NEVER = "never"


class Returning(NamedTuple):
    """A sequence that is to come back from swap space, where ``num_stored`` of its ``num_tokens`` tokens lie.

    ``chain``: hashes of its full blocks that are stored, if they are to be found.
    """

    sequence_id: int
    chain: ReadOnlyList[bytes]
    num_stored: int
    num_tokens: int


class BlockManager:
    """Block tables of all sequences over one pool, and a swap space beside it.

    ``watermark``: share of the pool that newcomers leave free while others hold blocks, so that those do not have to
    take them back a step later. In ``bench memory`` 1 % (vLLM V0's share), 2 % and 3 % mean 0.9, 0.7 and 0.5
    preemptions a ShareGPT-like request, and 96.8, 96.4 and 95.9 % of the pool in use.
    """

    def __init__(self, num_blocks: int, block_size: int, *, num_swap_blocks: int = 0, watermark: float = 0.02) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: must be at least 1")
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark={watermark}: must be >= 0 and < 1")
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.swap = SwapSpace(num_swap_blocks)
        self.watermark_blocks = int(watermark * num_blocks)
        self.transfers = BlockTransfers()  # what the next step has to do before it computes
        self.events: list[tuple[Any, ...]] = []  # what has changed since somebody took it; see control.trace
        self._tables: dict[int, Table] = {}
        # Blocks published for steps that have not succeeded yet, and as what: meanwhile one may have been freed and
        # evicted.
        self._uncommitted: list[tuple[int, bytes]] = []

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int, prefix: ReadOnlyList[int] = ()) -> Allocation:
        """Whether a sequence that holds no block yet can have its first ``num_tokens`` tokens stored.

        ``prefix``: blocks that it would share. Those among them that are free now stop being so.
        """
        needed = self.blocks_for(num_tokens)
        if needed > self.pool.num_blocks:
            return Allocation.NEVER
        needed -= sum(self.pool.reference_count(block) > 0 for block in prefix)
        return Allocation.OK if self._has_room(needed) else Allocation.LATER

    def _has_room(self, num_blocks: int) -> bool:
        """For a newcomer who takes so many of the free blocks. An idle pool has no watermark."""
        return num_blocks <= self.num_spare_blocks

    @property
    def num_spare_blocks(self) -> int:
        """Free blocks above the watermark, which new sequences may take; negative below the watermark."""
        return self.pool.num_free - (self.watermark_blocks if self.pool.num_used else 0)

    def missing_blocks(self, sequence_id: int, num_tokens: int) -> int:
        """How many more blocks the sequence needs to hold ``num_tokens`` tokens in all."""
        return max(0, self.blocks_for(num_tokens) - len(self._tables.get(sequence_id, ())))

    def reserve(self, sequence_id: int, start: int, end: int) -> bool:
        """Give tokens ``start`` to ``end`` of the sequence slots that are its alone. All the blocks it takes, or none.

        A block that others hold too is copied before it is written. Only the one of ``start`` can be: those before
        are written no more, and those after are new.
        """
        table = self._tables.get(sequence_id, ())
        missing = max(0, -(-end // self.block_size) - len(table))
        index = start // self.block_size
        shared = index < len(table) and self.pool.reference_count(table[index]) > 1
        if not missing and not shared:
            return True
        if missing + shared > self.pool.num_free:
            return False
        taken = tuple(self.pool.take() for _ in range(shared + missing))
        if shared:
            self.transfers.copies.append((table[index], taken[0]))
            self.pool.release(table[index])
            rest = table[index + 1 :]
            self._hold(sequence_id, table[:index], taken[:1] + rest + taken[1:], hits=rest)
        else:
            self._hold(sequence_id, table, taken)
        return True

    def _hold(self, sequence_id: int, kept: Table, blocks: Table, hits: Table = ()) -> None:
        """Set the table to ``kept`` and ``blocks``; ``hits`` are those of them that were not taken from the free."""
        self._tables[sequence_id] = kept + blocks
        self.events.append(("hold", sequence_id, len(kept), blocks, hits))

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Let a sequence hold the first ``num_tokens`` tokens of another, and nothing of what it held before."""
        wanted, held = self._tables[parent_id][: self.blocks_for(num_tokens)], self.table(child_id)
        kept = next((i for i, (a, b) in enumerate(zip(wanted, held, strict=False)) if a != b), None)
        kept = min(len(wanted), len(held)) if kept is None else kept
        for block in wanted[kept:]:
            self.pool.share(block)
        for block in reversed(held[kept:]):
            self.pool.release(block)
        self._hold(child_id, held[:kept], wanted[kept:], hits=wanted[kept:])
        self.events.append(("fork", child_id, parent_id, num_tokens))

    def trim(self, sequence_id: int, num_tokens: int) -> None:
        """Give back the blocks behind those of the sequence's first ``num_tokens`` tokens, the last first."""
        table, kept = self.table(sequence_id), self.blocks_for(num_tokens)
        if len(table) > kept:
            for block in reversed(table[kept:]):
                self.pool.release(block)
            self._hold(sequence_id, table[:kept], ())

    def table(self, sequence_id: int) -> Table:
        """Physical blocks of the sequence, in logical order."""
        return self._tables.get(sequence_id, ())

    def free(self, sequence_id: int) -> None:
        """Give back all of the sequence's blocks, the last first: a suffix is of no use once its prefix is evicted."""
        for block in reversed(self._tables.pop(sequence_id, ())):
            self.pool.release(block)
        self.events.append(("free", sequence_id))

    # -- prefix caching ---------------------------------------------------------------------------------------------

    def find_prefix(self, chain: ReadOnlyList[bytes]) -> Table:
        """Blocks that hold the longest known beginning of ``chain``, a hash a block."""
        found = []
        for block_hash in chain:
            block = self.pool.find(block_hash)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def adopt(self, sequence_id: int, prefix: Table) -> None:
        """Begin the table of a sequence that holds no block yet with blocks that somebody has filled."""
        for block in prefix:
            self.pool.share(block)
        if prefix:
            self._hold(sequence_id, (), prefix, hits=prefix)
            self.events.append(("adopt", sequence_id, len(prefix) * self.block_size))

    def publish(self, sequence_id: int, chain: ReadOnlyList[bytes], first: int, end: int) -> None:
        """Make logical blocks ``first`` to ``end`` findable: after the step at hand, all their tokens are stored.

        They may be adopted in the same step, because every layer stores K and V before any row reads.
        """
        table = self._tables[sequence_id]
        for index in range(first, end):
            if self.pool.publish(table[index], chain[index]):
                self._uncommitted.append((table[index], chain[index]))
                self.events.append(("publish", table[index]))

    def commit(self, num_published: int | None = None) -> None:
        """The step that is out longest has succeeded: what was published for it, all or the first so many, is there."""
        del self._uncommitted[:num_published]
        self.swap.reuse_emptied()

    def roll_back(self) -> None:
        """What is out has failed: nothing that was published for it may be found. Who adopted it must begin again."""
        for block, block_hash in self._uncommitted:
            if self.pool.find(block_hash) == block:
                self.pool.drop_hash(block)
                self.events.append(("withdraw", block))
        self._uncommitted.clear()
        self.swap.reuse_emptied()

    def forget(self, hashes: Iterable[bytes]) -> None:
        """Remove these hashes from the prefix cache: their blocks were stored, but must not be reused."""
        for block_hash in hashes:
            block = self.pool.find(block_hash)
            if block is not None:
                self.pool.drop_hash(block)
                self.events.append(("withdraw", block))

    @property
    def num_uncommitted(self) -> int:
        """Blocks published for steps that have not succeeded yet."""
        return len(self._uncommitted)

    # -- swapping ---------------------------------------------------------------------------------------------------

    def swap_out(self, *group: tuple[int, int]) -> bool:
        """Move the first tokens of each (sequence id, number of tokens) to swap space and free its table.

        All of them or none. A block that several share is moved once.
        """
        tables = {i: self._tables[i][: self.blocks_for(num_tokens)] for i, num_tokens in group}
        blocks = list(dict.fromkeys(chain.from_iterable(tables.values())))
        places = self.swap.take(len(blocks))
        if places is None:
            return False
        place_of = dict(zip(blocks, places, strict=True))
        self.transfers.swap_outs += place_of.items()
        for sequence_id, table in tables.items():
            self.swap.put(sequence_id, tuple(place_of[block] for block in table))
            self.free(sequence_id)
        return True

    def swap_in(self, *group: Returning) -> bool:
        """Bring sequences back where all that they know has room. All of them, or False.

        Blocks whose like is still in the pool are not moved.
        """
        if not self._has_room(self._blocks_to_return(group)):
            return False
        block_of: dict[int, int] = {}  # by place
        for one in group:
            places = self.swap.places(one.sequence_id)
            block_of = {**self._residents(places, one.chain), **block_of}
            hits = tuple(block_of[place] for place in places if place in block_of)
            for block in hits:  # before anything is taken: they may lie free, next to be evicted
                self.pool.share(block)
            for place in places:
                if place not in block_of:
                    block_of[place] = self.pool.take()
                    self.transfers.swap_ins.append((place, block_of[place]))
            self._hold(one.sequence_id, (), tuple(block_of[place] for place in places), hits=hits)
            self.swap.drop(one.sequence_id)
            self.publish(one.sequence_id, one.chain, 0, len(one.chain))
        return True

    def _residents(self, places: Table, hashes: ReadOnlyList[bytes]) -> dict[int, int]:
        """Place -> the block that holds the same. ``hashes``: those of the full ones."""
        found = ((place, self.pool.find(h)) for place, h in zip(places, hashes, strict=False))
        return {place: block for place, block in found if block is not None}

    def _blocks_to_return(self, group: ReadOnlyList[Returning]) -> int:
        """How many free blocks it takes to bring these back, with copies of the shared ones that they will write to."""
        tables = [self.swap.places(one.sequence_id) for one in group]
        resident: dict[int, int] = {}
        growth = 0
        written: Counter[int] = Counter()
        for one, places in zip(group, tables, strict=True):
            resident |= self._residents(places, one.chain)
            growth += self.blocks_for(one.num_tokens) - len(places)
            written.update(places[one.num_stored // self.block_size :])
        missing = len({*chain.from_iterable(tables)} - resident.keys())
        unheld = sum(self.pool.reference_count(block) == 0 for block in {*resident.values()})
        return missing + unheld + growth + written.total() - len(written)

    def num_empty_slots(self, num_stored: Mapping[int, int]) -> int:
        """Slots in blocks that are held and hold no token, where so many tokens of each sequence are stored."""
        empty: dict[int, int] = {}  # by block: a partly filled one may stand in several tables
        for sequence_id, num_tokens in num_stored.items():
            first = num_tokens // self.block_size
            for index, block in enumerate(self._tables.get(sequence_id, ())[first:], first):
                filled = max(0, num_tokens - index * self.block_size)
                empty[block] = min(empty.get(block, self.block_size), self.block_size - filled)
        return sum(empty.values())

    def check_integrity(self, num_stored: Mapping[int, int]) -> None:
        """Law 2: nothing leaks, nothing is shared by accident, and ``num_stored`` tokens of each sequence have slots.

        Raises:
            RuntimeError: saying which block or sequence breaks it.
        """
        self.pool.check_integrity(list(self._tables.values()))
        strangers = self._tables.keys() - num_stored.keys()
        if strangers:
            raise RuntimeError(f"sequences {sorted(strangers)[:8]} hold blocks and do not run")
        uncommitted = {block for block, _ in self._uncommitted}
        for sequence_id, num_tokens in num_stored.items():
            if self.missing_blocks(sequence_id, num_tokens):
                raise RuntimeError(f"sequence {sequence_id} has stored {num_tokens} tokens in too few blocks")
            unfilled = self._tables.get(sequence_id, ())[num_tokens // self.block_size :]
            for block in unfilled:
                if self.pool.hash_of(block) is not None and block not in uncommitted:
                    raise RuntimeError(f"block {block} of sequence {sequence_id} is has a hash and is not yet full")

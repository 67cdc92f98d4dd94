"""From a sequence's tokens to physical blocks: its block table, grown, shared, swapped and freed.

tokens       [ t0 .. t15 | t16 .. t31 | t32 t33 ]        block_size = 16
table        (    7      ,     2      ,   5     )        34 tokens need 3 blocks, 14 slots of the last are empty

Two prompts that begin with the same 32 tokens:

    A   ( 7, 2, 5 )        blocks 7 and 2 are full and hashed, so B finds them: they are counted twice,
    B   ( 7, 2, 9 )        and never written again. Block 5 is partly filled, and A's alone.

A second sample C of A's prompt starts with all of A's blocks. The first to write to a shared one gets a copy of it:

    fork   A ( 7, 2, 5 )   C ( 7, 2, 5 )        block 5 is held twice, with room for both
    write  A ( 7, 2, 6 )   C ( 7, 2, 5 )        A writes first, so A gets a copy (5 -> 6); then 5 is C's alone

Beams fork in the same way, at any token: the second continuation of A replaces a beam that has none.

    fork   A ( 7, 2, 6 )   B ( 7, 3, 4 ) -> ( 7, 2, 6 )        3 and 4 are free, if no other table holds them

A table is a tuple, replaced when it changes, so a step may keep the one it was given.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ReadOnlyList
from itertools import chain
from typing import NamedTuple

from paged_infer.control.blocks.pool import BlockPool
from paged_infer.control.blocks.swap_space import SwapSpace
from paged_infer.control.step import BlockTransfers
from paged_infer.control.trace_step import Adopt, DropHash, Event, Fork, Free, Hold, Publish

Table = tuple[int, ...]


class Allocation(enum.Enum):
    """Whether a number of tokens can have blocks: now, once others have finished, or never in this pool."""

    OK = "ok"
    LATER = "later"
    NEVER = "never"


class SwapIn(NamedTuple):
    """A sequence to swap in: ``num_stored`` of its ``num_tokens`` tokens are in swap space.

    ``chain``: hashes of its full stored blocks; empty without prefix caching.
    """

    sequence_id: int
    chain: ReadOnlyList[bytes]
    num_stored: int
    num_tokens: int


class BlockManager:
    """Block tables of all sequences over one pool, and a swap space.

    ``watermark``: share of the pool that admissions leave free while sequences hold blocks, so that these can grow in
    the next step without preempting. In ``bench memory`` 1 % (vLLM V0's share), 2 % and 3 % mean 0.9, 0.7 and 0.5
    preemptions per ShareGPT-like request, and 96.8, 96.4 and 95.9 % of the pool in use.
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
        self.transfers = BlockTransfers()  # to perform before the next step computes
        self.events: list[Event] = []  # since the scheduler last took them
        self._tables: dict[int, Table] = {}
        # (block, hash) published for steps that have not succeeded yet. Such a block may meanwhile have been evicted.
        self._uncommitted: list[tuple[int, bytes]] = []

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int, prefix: ReadOnlyList[int] = ()) -> Allocation:
        """Whether a sequence without blocks can have its first ``num_tokens`` tokens stored.

        ``prefix``: blocks that it would share. Those that are free now count as taken.
        """
        needed = self.blocks_for(num_tokens)
        if needed > self.pool.num_blocks:
            return Allocation.NEVER
        needed -= sum(self.pool.reference_count(block) > 0 for block in prefix)
        return Allocation.OK if needed <= self.num_spare_blocks else Allocation.LATER

    @property
    def num_spare_blocks(self) -> int:
        """Free blocks that new sequences may take: those above the watermark, or all of an idle pool."""
        return self.pool.num_free - (self.watermark_blocks if self.pool.num_used else 0)

    def missing_blocks(self, sequence_id: int, num_tokens: int) -> int:
        """How many more blocks the sequence needs to hold ``num_tokens`` tokens in all."""
        return max(0, self.blocks_for(num_tokens) - len(self._tables.get(sequence_id, ())))

    def reserve(self, sequence_id: int, start: int, end: int) -> bool:
        """Give tokens ``start`` to ``end`` slots in blocks that only this sequence holds. False if too few are free.

        A block that other tables hold too is copied before it is written (copy-on-write). Only the block of ``start``
        can be shared: those before it are full, and those after it are new.
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
        """Set the table to ``kept`` and ``blocks``, of which ``hits`` were not taken from the pool."""
        self._tables[sequence_id] = kept + blocks
        self.events.append(Hold(sequence_id, len(kept), blocks, hits))

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Let the child share the first ``num_tokens`` tokens of the parent, and release what it held before."""
        wanted, held = self._tables[parent_id][: self.blocks_for(num_tokens)], self.table(child_id)
        kept = next((i for i, (a, b) in enumerate(zip(wanted, held, strict=False)) if a != b), None)
        kept = min(len(wanted), len(held)) if kept is None else kept
        for block in wanted[kept:]:
            self.pool.share(block)
        for block in reversed(held[kept:]):
            self.pool.release(block)
        self._hold(child_id, held[:kept], wanted[kept:], hits=wanted[kept:])
        self.events.append(Fork(child_id, parent_id, num_tokens))

    def trim(self, sequence_id: int, num_tokens: int) -> None:
        """Release the blocks after those of the sequence's first ``num_tokens`` tokens, the last first."""
        table, kept = self.table(sequence_id), self.blocks_for(num_tokens)
        if len(table) > kept:
            for block in reversed(table[kept:]):
                self.pool.release(block)
            self._hold(sequence_id, table[:kept], ())

    def table(self, sequence_id: int) -> Table:
        """Physical blocks of the sequence, in logical order."""
        return self._tables.get(sequence_id, ())

    def free(self, sequence_id: int) -> None:
        """Release all of the sequence's blocks, the last first: a suffix is useless once its prefix is evicted."""
        for block in reversed(self._tables.pop(sequence_id, ())):
            self.pool.release(block)
        self.events.append(Free(sequence_id))

    # -- prefix caching ---------------------------------------------------------------------------------------------

    def find_prefix(self, chain: ReadOnlyList[bytes]) -> Table:
        """Blocks of the longest cached prefix of ``chain``, which has a hash for each block."""
        found = []
        for block_hash in chain:
            block = self.pool.find(block_hash)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def adopt(self, sequence_id: int, prefix: Table) -> None:
        """Start the table of a sequence without blocks with those that ``find_prefix`` found."""
        for block in prefix:
            self.pool.share(block)
        if prefix:
            self._hold(sequence_id, (), prefix, hits=prefix)
            self.events.append(Adopt(sequence_id, len(prefix) * self.block_size))

    def publish(self, sequence_id: int, chain: ReadOnlyList[bytes], first: int, end: int) -> None:
        """Give logical blocks ``first`` to ``end`` their hashes (vLLM: cache_full_blocks). The coming step fills them.

        They may be adopted in the same step, because every layer stores K and V before any row reads.
        """
        table = self._tables[sequence_id]
        for index in range(first, end):
            if self.pool.publish(table[index], chain[index]):
                self._uncommitted.append((table[index], chain[index]))
                self.events.append(Publish(table[index]))

    def commit(self, num_published: int | None = None) -> None:
        """The oldest step in flight has succeeded: keep the first ``num_published`` uncommitted hashes, or all."""
        del self._uncommitted[:num_published]
        self.swap.reuse_emptied()

    def roll_back(self) -> None:
        """The steps in flight have failed: drop the hashes published for them. Sequences that adopted them restart."""
        for block, block_hash in self._uncommitted:
            if self.pool.find(block_hash) == block:
                self._drop_hash(block)
        self._uncommitted.clear()
        self.swap.reuse_emptied()

    def forget(self, hashes: Iterable[bytes]) -> None:
        """Remove these hashes from the prefix cache: their blocks must not be reused."""
        for block_hash in hashes:
            block = self.pool.find(block_hash)
            if block is not None:
                self._drop_hash(block)

    def _drop_hash(self, block: int) -> None:
        self.pool.drop_hash(block)
        self.events.append(DropHash(block))

    @property
    def num_uncommitted(self) -> int:
        """Blocks published for steps that have not succeeded yet."""
        return len(self._uncommitted)

    # -- swapping ---------------------------------------------------------------------------------------------------

    def swap_out(self, *group: tuple[int, int]) -> bool:
        """Move the first tokens of each (sequence id, number of tokens) to swap space: all, or False if it is too full.

        A block that several share is moved once.
        """
        tables = {i: self._tables[i][: self.blocks_for(num_tokens)] for i, num_tokens in group}
        blocks = list(dict.fromkeys(chain.from_iterable(tables.values())))
        swap_blocks = self.swap.take(len(blocks))
        if swap_blocks is None:
            return False
        swap_block_of = dict(zip(blocks, swap_blocks, strict=True))
        self.transfers.swap_outs += swap_block_of.items()
        for sequence_id, table in tables.items():
            self.swap.put(sequence_id, tuple(swap_block_of[block] for block in table))
            self.free(sequence_id)
        return True

    def swap_in(self, *group: SwapIn) -> bool:
        """Move the group back into the pool. False, and nothing moves, unless all its known tokens fit.

        A block with a copy still in the pool is found by its hash, and not moved.
        """
        if self._blocks_to_return(group) > self.num_spare_blocks:
            return False
        block_of: dict[int, int] = {}  # by swap block
        for one in group:
            swap_blocks = self.swap.table(one.sequence_id)
            block_of = {**self._residents(swap_blocks, one.chain), **block_of}
            hits = tuple(block_of[swap_block] for swap_block in swap_blocks if swap_block in block_of)
            for block in hits:  # before taking any: these may be free, and next to be evicted
                self.pool.share(block)
            for swap_block in swap_blocks:
                if swap_block not in block_of:
                    block_of[swap_block] = self.pool.take()
                    self.transfers.swap_ins.append((swap_block, block_of[swap_block]))
            self._hold(one.sequence_id, (), tuple(block_of[swap_block] for swap_block in swap_blocks), hits=hits)
            self.swap.drop(one.sequence_id)
            self.publish(one.sequence_id, one.chain, 0, len(one.chain))
        return True

    def _residents(self, swap_blocks: Table, hashes: ReadOnlyList[bytes]) -> dict[int, int]:
        """Swap block -> the block in the pool with the same contents. ``hashes``: those of the full ones."""
        found = ((swap_block, self.pool.find(h)) for swap_block, h in zip(swap_blocks, hashes, strict=False))
        return {swap_block: block for swap_block, block in found if block is not None}

    def _blocks_to_return(self, group: ReadOnlyList[SwapIn]) -> int:
        """How many free blocks ``swap_in`` takes, and the copies of shared blocks that the group will write to."""
        tables = [self.swap.table(one.sequence_id) for one in group]
        resident: dict[int, int] = {}
        growth = 0
        written: Counter[int] = Counter()
        for one, swap_blocks in zip(group, tables, strict=True):
            resident |= self._residents(swap_blocks, one.chain)
            growth += self.blocks_for(one.num_tokens) - len(swap_blocks)
            written.update(swap_blocks[one.num_stored // self.block_size :])
        missing = len({*chain.from_iterable(tables)} - resident.keys())
        unheld = sum(self.pool.reference_count(block) == 0 for block in {*resident.values()})
        return missing + unheld + growth + written.total() - len(written)

    def check_integrity(self, num_stored: Mapping[int, int]) -> None:
        """Raises RuntimeError unless law 2 holds and ``num_stored`` tokens of each sequence have slots."""
        self.pool.check_integrity(list(self._tables.values()))
        others = self._tables.keys() - num_stored.keys()
        if others:
            raise RuntimeError(f"sequences {sorted(others)[:8]} hold blocks but are not running")
        uncommitted = {block for block, _ in self._uncommitted}
        for sequence_id, num_tokens in num_stored.items():
            if self.missing_blocks(sequence_id, num_tokens):
                raise RuntimeError(f"sequence {sequence_id} has {num_tokens} tokens stored in too few blocks")
            unfilled = self._tables.get(sequence_id, ())[num_tokens // self.block_size :]
            for block in unfilled:
                if self.pool.hash_of(block) is not None and block not in uncommitted:
                    raise RuntimeError(f"block {block} of sequence {sequence_id} has a hash but is not full")

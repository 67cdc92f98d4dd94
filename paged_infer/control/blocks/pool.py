"""The physical blocks: which are free, which are held and how often, and which can be found by a hash."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection


class OutOfBlocks(Exception):
    """The pool has no free block left."""


class BlockPool:
    """``num_blocks`` blocks, each in exactly one of three places.

        blank    [ 4, 1 ]                   free, holding nothing worth finding: taken first, from the right
        cached   [ 7, 2, 9 ]                free, but findable by hash: evicted from the left, least recently used
        held     { 0: 1,  3: 2, ... }       in so many block tables, findable or not

             take                release, no hash
        blank ----> held <----------------------------> blank
                     ^ |
        share a hit  | | release, with a hash
                     | v
                   cached ----> held, its hash forgotten: an eviction, when no block is blank

    The blank block that was freed last is taken first: its memory may still be in a processor's caches, and on a CPU
    a pool has no memory for blocks that were never taken (``cache.lazy_zeros``). Every operation costs the same
    whatever the pool's size.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks}: must be at least 1")
        self.num_blocks = num_blocks
        self.num_shared = 0  # blocks in more than one table
        self.num_references = 0  # lengths of all tables together: what they would hold if nothing were shared
        self.num_evictions = 0
        self._blank = [*reversed(range(num_blocks))]
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._counts = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def hashed_blocks(self) -> Collection[int]:
        """Blocks that have a hash, free or held."""
        return self._hash_of.keys()

    @property
    def num_hashed(self) -> int:
        return len(self._hash_of)

    def reference_count(self, block: int) -> int:
        """How many tables hold ``block``; 0 if it is free."""
        return self._counts[block]

    def hash_of(self, block: int) -> bytes | None:
        """The hash by which ``block`` is found, if it has one."""
        return self._hash_of.get(block)

    # -- held or free -----------------------------------------------------------------------------------------------

    def take(self) -> int:
        """A free block to write to, now held once: the blank one that was freed last, else the least recently used of
        the cached ones, evicted.

        Raises:
            OutOfBlocks: none is free.
        """
        if self._blank:
            block = self._blank.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
            self.num_evictions += 1
        else:
            raise OutOfBlocks(f"all {self.num_blocks} blocks are held")
        self._counts[block] = 1
        self.num_references += 1
        return block

    def share(self, block: int) -> None:
        """One more table holds ``block``, which is held or cached (vLLM: touch)."""
        if self._counts[block] == 0:
            del self._cached[block]
        self._counts[block] += 1
        self.num_references += 1
        self.num_shared += self._counts[block] == 2

    def release(self, block: int) -> None:
        """One table fewer holds ``block``; the last release frees it."""
        if self._counts[block] < 1:
            raise RuntimeError(f"block {block} is released but not held")
        self._counts[block] -= 1
        self.num_references -= 1
        self.num_shared -= self._counts[block] == 1
        if self._counts[block] == 0:
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    # -- hashed or not -----------------------------------------------------------------------------------------------

    def find(self, block_hash: bytes) -> int | None:
        """The held or cached block of this hash, if there is one."""
        return self._block_of.get(block_hash)

    def publish(self, block: int, block_hash: bytes) -> bool:
        """Give the held ``block`` its hash. False, without effect, if it has one or another block has this hash."""
        if block_hash in self._block_of or block in self._hash_of:
            return False
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        return True

    def drop_hash(self, block: int) -> None:
        """Remove the hash of ``block``: its contents were never stored, or must not be reused."""
        del self._block_of[self._hash_of.pop(block)]
        if self._counts[block] == 0:
            del self._cached[block]
            self._blank.append(block)

    def check_integrity(self, tables: list[tuple[int, ...]]) -> None:
        """Law 2: each block is free or held, and held exactly as often as it appears in ``tables``.

        Raises:
            RuntimeError: it does not hold; the message names the blocks.
        """
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        wrong = [block for block in range(self.num_blocks) if held[block] != self._counts[block]]
        if wrong:
            raise RuntimeError(
                f"blocks {wrong[:8]} are counted {[self._counts[b] for b in wrong[:8]]} times "
                f"but appear in {[held[b] for b in wrong[:8]]} block tables"
            )
        free = {*self._blank, *self._cached}
        if len(free) != self.num_free:
            raise RuntimeError("a block is listed twice as free")
        wrong = [block for block in range(self.num_blocks) if (block in free) != (held[block] == 0)]
        if wrong:
            raise RuntimeError(f"blocks {wrong[:8]} are both free and held, or neither")
        if {block: block_hash for block_hash, block in self._block_of.items()} != self._hash_of:
            raise RuntimeError("a hash maps to a block that does not have it")
        wrong = [*(self._cached.keys() - self._hash_of.keys()), *(self._hash_of.keys() & set(self._blank))]
        if wrong:
            raise RuntimeError(
                f"free blocks {wrong[:8]} are in the wrong free list: blank blocks have no hash, cached ones have one"
            )
        if self.num_shared != sum(count > 1 for count in held):
            raise RuntimeError(f"num_shared={self.num_shared} contradicts the block tables")
        if self.num_references != sum(held):
            raise RuntimeError(f"num_references={self.num_references}, but the block tables have {sum(held)} entries")

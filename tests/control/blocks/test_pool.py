"""BlockPool: every block is free or held, and law 2 is checked by something that can fail."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_infer.control.blocks.pool import BlockPool, OutOfBlocks


def test_every_block_is_given_out_once_and_then_none_is_left() -> None:
    pool = BlockPool(5)
    assert sorted(pool.take() for _ in range(5)) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 5)
    with pytest.raises(OutOfBlocks, match="all 5 blocks"):
        pool.take()


def test_the_blank_block_that_was_freed_last_is_taken_first() -> None:
    pool = BlockPool(4)
    for block in (pool.take(), pool.take()):
        pool.release(block)
    assert [pool.take() for _ in range(4)] == [1, 0, 2, 3]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9))))
def test_no_more_blocks_are_ever_touched_than_were_held_at_once(acts: list[tuple[bool, int]]) -> None:
    pool, held, touched, most = BlockPool(100), list[int](), set[int](), 0
    for takes, index in acts:
        if takes or not held:
            held.append(pool.take())
            touched.add(held[-1])
        else:
            pool.release(held.pop(index % len(held)))
        most = max(most, len(held))
    assert len(touched) == most


def test_a_block_is_counted_while_it_is_held() -> None:
    pool = BlockPool(2)
    block = pool.take()
    assert [pool.reference_count(b) for b in (block, 1 - block)] == [1, 0]
    pool.release(block)
    assert pool.reference_count(block) == 0 and pool.num_free == 2


def test_a_free_block_cannot_be_released() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.release(block)
    with pytest.raises(RuntimeError, match=f"block {block} is released"):
        pool.release(block)
    assert pool.num_free == 2


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_a_pool_of_nothing_is_refused(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks={num_blocks}"):
        BlockPool(num_blocks)


def test_integrity_notices_a_leak_a_shared_block_and_a_dangling_table() -> None:
    pool = BlockPool(4)
    first, second = pool.take(), pool.take()
    pool.check_integrity([[first], [second]])
    for tables in ([[first]], [[first, second], [second]], [[first, second, 3]]):
        with pytest.raises(RuntimeError, match="counted"):
            pool.check_integrity(tables)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda pool, held: pool._blank.append(pool._blank[0]), "twice"),
        (lambda pool, held: pool._blank.append(held), "both free and held"),
        (lambda pool, held: pool._blank.pop(), "or neither"),
    ],
)
def test_integrity_notices_a_wrong_free_list(tamper, message: str) -> None:
    pool = BlockPool(4)
    held = pool.take()
    tamper(pool, held)
    with pytest.raises(RuntimeError, match=message):
        pool.check_integrity([[held]])


def published(pool: BlockPool, *hashes: bytes) -> list[int]:
    blocks = [pool.take() for _ in hashes]
    for block, block_hash in zip(blocks, hashes, strict=True):
        assert pool.publish(block, block_hash)
    return blocks


def test_a_freed_block_is_found_until_it_is_evicted() -> None:
    pool = BlockPool(2)
    (block,) = published(pool, b"a")
    pool.release(block)
    assert pool.find(b"a") == block and pool.num_free == 2
    assert pool.take() != block and pool.num_evictions == 0  # a blank one goes first
    assert pool.take() == block and pool.num_evictions == 1
    assert pool.find(b"a") is None


def test_the_least_recently_used_is_evicted_first() -> None:
    pool = BlockPool(3)
    a, b, c = published(pool, b"a", b"b", b"c")
    for block in (a, b, c):
        pool.release(block)
    pool.share(a)  # used again
    pool.release(a)
    assert [pool.take() for _ in range(3)] == [b, c, a]


def test_a_hit_is_held_by_all_who_found_it() -> None:
    pool = BlockPool(2)
    (block,) = published(pool, b"a")
    pool.share(block)
    pool.release(block)
    assert (pool.reference_count(block), pool.num_shared, pool.num_used) == (1, 0, 1)
    pool.release(block)
    pool.share(block)
    pool.check_integrity([(block,)])


def test_of_two_equal_blocks_the_first_is_found() -> None:
    pool = BlockPool(3)
    first, second = pool.take(), pool.take()
    assert pool.publish(first, b"a") and not pool.publish(second, b"a") and not pool.publish(first, b"b")
    assert pool.find(b"a") == first and pool.find(b"b") is None
    pool.release(second)
    assert pool.num_hashed == 1


def test_what_is_withdrawn_is_not_found_held_or_free() -> None:
    pool = BlockPool(2)
    a, b = published(pool, b"a", b"b")
    pool.release(a)
    pool.drop_hash(a)
    pool.drop_hash(b)
    assert pool.find(b"a") is pool.find(b"b") is None
    pool.check_integrity([(b,)])
    assert pool.take() == a and pool.num_evictions == 0


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda pool: pool._hash_of.clear(), "a hash maps"),
        (lambda pool: (pool._hash_of.clear(), pool._block_of.clear()), "wrong free list"),
        (lambda pool: setattr(pool, "num_shared", 1), "shared"),
    ],
)
def test_integrity_notices_stale_hashes_and_counts(tamper, message: str) -> None:
    pool = BlockPool(2)
    (block,) = published(pool, b"a")
    pool.release(block)
    tamper(pool)
    with pytest.raises(RuntimeError, match=message):
        pool.check_integrity([])


class PoolMachine(RuleBasedStateMachine):
    """Any order of acts, against a model that keeps one list of free blocks and scans it."""

    @initialize(num_blocks=st.integers(1, 6))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tables: list[int] = []  # a block stands here as often as it is held
        self.free = list(reversed(range(num_blocks)))  # in the order in which they were freed
        self.hashes: dict[int, bytes] = {}
        self.evictions = 0

    def take_place(self, index: int) -> int:
        return self.tables[index % len(self.tables)]

    @precondition(lambda self: self.free)
    @rule()
    def take(self) -> None:
        blank = [block for block in self.free if block not in self.hashes]
        expected = blank[-1] if blank else self.free[0]
        self.evictions += expected in self.hashes
        self.hashes.pop(expected, None)
        assert self.pool.take() == expected
        self.free.remove(expected)
        self.tables.append(expected)

    @precondition(lambda self: not self.free)
    @rule()
    def take_from_nothing(self) -> None:
        with pytest.raises(OutOfBlocks):
            self.pool.take()

    @rule(name=st.integers(0, 4))
    def share_a_hit(self, name: int) -> None:
        block = self.pool.find(b"%d" % name)
        assert block == next((b for b, h in self.hashes.items() if h == b"%d" % name), None)
        if block is not None:
            self.pool.share(block)
            self.tables.append(block)
            if block in self.free:
                self.free.remove(block)

    @precondition(lambda self: self.tables)
    @rule(index=st.integers(0, 9), name=st.integers(0, 4))
    def publish(self, index: int, name: int) -> None:
        block = self.take_place(index)
        fresh = b"%d" % name not in self.hashes.values() and block not in self.hashes
        assert self.pool.publish(block, b"%d" % name) == fresh
        if fresh:
            self.hashes[block] = b"%d" % name

    @precondition(lambda self: self.tables)
    @rule(index=st.integers(0, 9))
    def release(self, index: int) -> None:
        block = self.take_place(index)
        self.tables.remove(block)
        self.pool.release(block)
        if block not in self.tables:
            self.free.append(block)

    @precondition(lambda self: self.hashes)
    @rule(index=st.integers(0, 9))
    def withdraw(self, index: int) -> None:
        block = list(self.hashes)[index % len(self.hashes)]
        del self.hashes[block]
        self.pool.drop_hash(block)
        if block in self.free:  # as if it had been freed just now
            self.free.remove(block)
            self.free.append(block)

    @invariant()
    def the_books_agree(self) -> None:
        self.pool.check_integrity([tuple(self.tables)])
        assert self.pool.num_free == len(self.free) and self.pool.num_hashed == len(self.hashes)
        assert self.pool.num_evictions == self.evictions
        assert all(self.pool.hash_of(b) == self.hashes.get(b) for b in range(self.pool.num_blocks))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

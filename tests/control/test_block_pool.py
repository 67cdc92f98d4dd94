"""BlockPool: every block is free or held, and law 2 is checked by something that can fail."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_infer.control.block_pool import BlockPool, OutOfBlocks


def test_every_block_is_given_out_once_and_then_none_is_left() -> None:
    pool = BlockPool(5)
    assert sorted(pool.take() for _ in range(5)) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 5)
    with pytest.raises(OutOfBlocks, match="all 5 blocks"):
        pool.take()


def test_the_block_that_is_free_the_longest_is_taken_first() -> None:
    pool = BlockPool(3)
    for block in (pool.take(), pool.take()):
        pool.release(block)
    assert [pool.take() for _ in range(3)] == [2, 0, 1]


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
        (lambda pool, held: pool._free.append(pool._free[0]), "twice"),
        (lambda pool, held: pool._free.append(held), "both free and held"),
        (lambda pool, held: pool._free.popleft(), "or neither"),
    ],
)
def test_integrity_notices_a_wrong_free_list(tamper, message: str) -> None:
    pool = BlockPool(4)
    held = pool.take()
    tamper(pool, held)
    with pytest.raises(RuntimeError, match=message):
        pool.check_integrity([[held]])


@given(st.integers(1, 6), st.lists(st.integers(-1, 5), max_size=60))
def test_any_order_of_takes_and_releases_keeps_the_books(num_blocks: int, moves: list[int]) -> None:
    pool, held = BlockPool(num_blocks), list[int]()
    for move in moves:
        if move < 0 and len(held) < num_blocks:
            block = pool.take()
            assert block not in held
            held.append(block)
        elif held:
            pool.release(held.pop(move % len(held)))
        pool.check_integrity([held])
        assert pool.num_used == len(held)

"""BlockManager: tables grow by whole blocks, all or nothing, and give everything back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_infer.control.blocks.manager import Allocation, BlockManager
from paged_infer.control.blocks.snapshot import num_empty_slots


@given(st.integers(0, 200), st.integers(1, 20))
def test_blocks_for_is_the_least_number_that_holds_the_tokens(num_tokens: int, block_size: int) -> None:
    blocks = BlockManager(1, block_size).blocks_for(num_tokens)
    assert blocks * block_size >= num_tokens > (blocks - 1) * block_size


def test_a_table_grows_only_when_its_last_block_is_full() -> None:
    manager = BlockManager(10, 4)
    sizes = []
    for num_tokens in range(1, 10):
        assert manager.reserve(1, 0, num_tokens)
        sizes.append(len(manager.table(1)))
    assert sizes == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_a_table_keeps_its_blocks_in_order_as_it_grows() -> None:
    manager = BlockManager(10, 2)
    manager.reserve(1, 0, 4)
    before = manager.table(1)
    manager.reserve(2, 0, 2)
    manager.reserve(1, 0, 7)
    assert manager.table(1)[:2] == before
    assert len(set(manager.table(1) + manager.table(2))) == 5


def test_growth_takes_all_that_is_missing_or_nothing() -> None:
    manager = BlockManager(3, 2)
    assert manager.reserve(1, 0, 4)
    assert not manager.reserve(2, 0, 3)
    assert manager.table(2) == () and manager.pool.num_free == 1
    manager.check_integrity({1: 4})


def test_a_table_never_shrinks() -> None:
    manager = BlockManager(3, 2)
    manager.reserve(1, 0, 5)
    assert manager.reserve(1, 0, 1) and len(manager.table(1)) == 3


def test_can_allocate_answers_now_later_or_never() -> None:
    manager = BlockManager(4, 4)
    manager.reserve(1, 0, 5)
    assert [manager.can_allocate(n) for n in (8, 9, 16, 17)] == [
        Allocation.OK,
        Allocation.LATER,
        Allocation.LATER,
        Allocation.NEVER,
    ]


def test_what_is_free_has_all_been_given_back() -> None:
    manager = BlockManager(4, 2)
    manager.reserve(1, 0, 3)
    manager.reserve(2, 0, 3)
    manager.free(1)
    manager.check_integrity({2: 3})
    manager.free(2)
    manager.free(2)  # holding nothing is no error
    assert manager.pool.num_free == 4
    manager.check_integrity({})


def test_missing_blocks_counts_what_growth_would_take() -> None:
    manager = BlockManager(9, 4)
    assert manager.missing_blocks(1, 9) == 3
    manager.reserve(1, 0, 5)
    assert [manager.missing_blocks(1, n) for n in (1, 8, 9, 13)] == [0, 0, 1, 2]


def test_integrity_notices_strangers_and_tokens_without_slots() -> None:
    manager = BlockManager(4, 2)
    manager.reserve(7, 0, 3)
    with pytest.raises(RuntimeError, match=r"sequences \[7\] hold blocks but are not running"):
        manager.check_integrity({})
    with pytest.raises(RuntimeError, match="sequence 7 has 5 tokens stored in too few blocks"):
        manager.check_integrity({7: 5})


def test_a_block_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size=0"):
        BlockManager(4, 0)


def test_a_suffix_is_evicted_before_its_prefix() -> None:
    manager = BlockManager(3, 2)
    chain = [b"a", b"b", b"c"]
    manager.reserve(1, 0, 6)
    manager.publish(1, chain, 0, 3)
    manager.commit()
    manager.free(1)
    for known in (2, 1, 0):
        manager.reserve(2, 0, 2 * (3 - known))
        assert len(manager.find_prefix(chain)) == known


def test_hits_count_as_room_only_while_somebody_else_holds_them() -> None:
    manager = BlockManager(4, 2)
    manager.reserve(1, 0, 4)
    manager.publish(1, [b"a", b"b"], 0, 2)
    hits = manager.find_prefix([b"a", b"b", b"c"])
    assert hits == manager.table(1)
    assert manager.can_allocate(8) is Allocation.LATER and manager.can_allocate(8, hits) is Allocation.OK
    manager.reserve(2, 0, 2)
    manager.free(1)
    assert manager.can_allocate(6, hits) is Allocation.OK and manager.can_allocate(8, hits) is Allocation.LATER


def test_adopted_blocks_are_held_by_both() -> None:
    manager = BlockManager(4, 2)
    manager.reserve(1, 0, 4)
    manager.publish(1, [b"a", b"b"], 0, 2)
    manager.adopt(2, manager.find_prefix([b"a", b"b"]))
    manager.reserve(2, 0, 6)
    manager.free(1)
    manager.check_integrity({2: 6})
    assert manager.pool.num_used == 3


def test_what_was_published_for_a_failed_step_is_withdrawn_and_what_was_confirmed_is_not() -> None:
    manager = BlockManager(4, 2)
    manager.reserve(1, 0, 4)
    manager.publish(1, [b"a", b"b"], 0, 1)
    manager.commit()
    manager.publish(1, [b"a", b"b"], 1, 2)
    manager.roll_back()
    assert len(manager.find_prefix([b"a", b"b"])) == 1


def test_integrity_notices_a_findable_block_that_is_not_full() -> None:
    manager = BlockManager(4, 2)
    manager.reserve(1, 0, 4)
    manager.publish(1, [b"a", b"b"], 0, 2)
    manager.check_integrity({1: 0})  # its step is still out
    manager.commit()
    with pytest.raises(RuntimeError, match="has a hash but is not full"):
        manager.check_integrity({1: 3})


def test_a_block_held_twice_is_copied_before_it_is_written() -> None:
    manager = BlockManager(5, 4)
    manager.reserve(1, 0, 6)
    full, part = manager.table(1)
    manager.fork(1, 2, 6)
    assert manager.table(2) == (full, part) and manager.pool.num_used == 2
    assert manager.reserve(1, 6, 7)
    ((source, copy),) = manager.transfers.copies
    assert (source, manager.table(1), manager.table(2)) == (part, (full, copy), (full, part))
    assert manager.reserve(2, 6, 7) and len(manager.transfers.copies) == 1  # nobody else holds it any more
    manager.check_integrity({1: 7, 2: 7})


def test_a_copy_that_finds_no_block_takes_nothing() -> None:
    manager = BlockManager(3, 4)
    manager.reserve(1, 0, 6)
    manager.fork(1, 2, 6)
    assert not manager.reserve(1, 6, 9)  # a copy, and one more
    assert manager.table(1) == manager.table(2) and not manager.transfers.copies
    manager.check_integrity({1: 6, 2: 6})


def test_a_block_that_is_only_read_is_not_copied() -> None:
    manager = BlockManager(4, 4)
    manager.reserve(1, 0, 8)
    manager.fork(1, 2, 8)
    assert manager.reserve(1, 8, 9) and manager.reserve(2, 8, 9) and not manager.transfers.copies
    assert manager.pool.num_used == 4


def test_empty_slots_of_shared_blocks_are_counted_once() -> None:
    manager = BlockManager(6, 4)
    manager.reserve(1, 0, 6)
    manager.fork(1, 2, 6)
    assert num_empty_slots([(i, manager.table(i), n) for i, n in ((1, 6), (2, 6))], block_size=4) == 2
    manager.reserve(1, 6, 7)
    assert num_empty_slots([(i, manager.table(i), n) for i, n in ((1, 7), (2, 6))], block_size=4) == 1 + 2

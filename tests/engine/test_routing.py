"""Which replica gets the next request: the rules as functions of loads and of what was sent before."""

from __future__ import annotations

import pytest

from paged_infer.control.blocks.hashing import extend_chain, root_hash
from paged_infer.engine.routing import (
    MAX_DIFFERENCE,
    Load,
    Router,
    SentBlocks,
    is_balanced,
    least_loaded,
    longest_prefix,
    next_in_turn,
)

IDLE = Load(0, 0)


def chain_of(*token_ids: int, salt: str | None = None) -> list[bytes]:
    """Hashes of blocks of one token."""
    chain: list[bytes] = []
    extend_chain(chain, root_hash(salt), token_ids, block_size=1)
    return chain


def test_round_robin_skips_replicas_that_are_not_ready() -> None:
    assert [next_in_turn([0, 2, 5], last) for last in (-1, 0, 1, 2, 5)] == [0, 2, 2, 5, 0]


def test_a_waiting_sequence_counts_as_four_running_ones() -> None:
    assert least_loaded({0: Load(waiting=1, running=0), 1: Load(waiting=0, running=3)}, last=1) == 1
    assert least_loaded({0: Load(waiting=1, running=0), 1: Load(waiting=0, running=5)}, last=0) == 0


def test_equal_loads_take_turns() -> None:
    assert [least_loaded(dict.fromkeys(range(3), IDLE), last) for last in (0, 1, 2)] == [1, 2, 0]


def test_the_longest_known_prefix_wins_and_load_decides_ties() -> None:
    loads = {0: Load(0, 9), 1: Load(0, 5), 2: IDLE}
    assert longest_prefix({0: 6, 1: 2, 2: 0}, 10, loads, last=0) == 0
    assert longest_prefix({0: 6, 1: 6, 2: 0}, 10, loads, last=0) == 1


def test_a_prompt_of_which_little_is_known_goes_to_the_least_loaded() -> None:
    loads = {0: Load(0, 5), 1: IDLE}
    assert longest_prefix({0: 3, 1: 0}, 10, loads, last=1) == 1  # 30 %: not more than the limit
    assert longest_prefix({0: 4, 1: 0}, 10, loads, last=1) == 0


def test_a_popular_prefix_does_not_overload_a_replica() -> None:
    hot = {0: 10, 1: 0}
    assert longest_prefix(hot, 10, {0: Load(0, MAX_DIFFERENCE), 1: IDLE}, last=1) == 0
    assert longest_prefix(hot, 10, {0: Load(0, MAX_DIFFERENCE + 1), 1: IDLE}, last=1) == 1
    assert is_balanced({0: Load(0, 300), 1: Load(0, 200)}), "the difference is large, but not the ratio"


def test_with_a_single_prefix_the_loads_stay_within_the_bound() -> None:
    router, running = Router("prefix", 2, num_blocks=100), [0, 0]
    for _ in range(1000):
        running[router.choose(chain_of(1, 2, 3), {i: Load(0, n) for i, n in enumerate(running)})] += 1
    assert max(running) <= max(1.5 * min(running), min(running) + MAX_DIFFERENCE) + 1 and min(running) > 0


def test_what_was_sent_is_found_by_its_chain_and_salt() -> None:
    sent = SentBlocks(100)
    sent.add(chain_of(1, 2, 3))
    assert sent.num_matching(chain_of(1, 2, 3, 4)) == 3
    assert sent.num_matching(chain_of(1, 2, 9, 4)) == 2
    assert sent.num_matching(chain_of(2, 3)) == 0, "the same tokens after others are other blocks"
    assert sent.num_matching(chain_of(1, 2, 3, salt="another")) == 0


def test_no_more_is_remembered_than_a_pool_holds_and_the_ends_of_prompts_are_dropped_first() -> None:
    sent = SentBlocks(4)
    sent.add(chain_of(1, 2, 3))
    sent.add(chain_of(7, 8))
    assert sent.num_matching(chain_of(1, 2, 3)) == 2
    assert sent.num_matching(chain_of(7, 8)) == 2


@pytest.mark.parametrize("routing", ["round_robin", "least_loaded", "prefix"])
def test_every_rule_chooses_among_those_that_are_ready(routing: str) -> None:
    router = Router(routing, 3, num_blocks=100)
    assert [router.choose(chain_of(1), {1: IDLE}) for _ in range(2)] == [1, 1]


def test_a_restarted_replica_has_an_empty_cache() -> None:
    router = Router("prefix", 2, num_blocks=100)
    loads = {0: IDLE, 1: IDLE}
    first = router.choose(chain_of(1, 2), loads)
    assert router.choose(chain_of(1, 2, 3), loads) == first
    router.forget(first)
    assert router.choose(chain_of(1, 2, 3), loads) != first, "nothing is known, so turns decide"

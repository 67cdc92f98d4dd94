"""Prefix caching, law 4: what has been computed is found again, and what has not is never found."""

from __future__ import annotations

import pytest
from scheduling import FakeMemory, Source, add, carry_out, counts, make_scheduler, run

from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import Sequence
from paged_infer.control.sequence_state import SequenceState


def serve(scheduler: Scheduler, *sequences: Sequence) -> None:
    scheduler.add(sequences)
    while scheduler.has_work:
        run(scheduler)


def test_a_prompt_that_was_served_before_is_computed_from_its_first_new_token() -> None:
    scheduler, source = make_scheduler(block_size=4), Source()
    serve(scheduler, source.sequence(10, story=1))
    again = source.sequence(11, story=1)
    scheduler.add([again])
    (item,) = run(scheduler).sequences
    assert (item.num_computed_tokens, item.num_tokens) == (8, 3)  # two full blocks; the third was partly output
    assert again.num_cached_tokens == 8 and scheduler.stats.prefix_hit_tokens == 8


def test_what_was_said_is_found_when_it_comes_back_in_a_prompt() -> None:
    scheduler, source = make_scheduler(block_size=4), Source()
    first = source.sequence(6, max_tokens=8)
    serve(scheduler, first)
    turn = source.sequence(3, max_tokens=1)
    turn.token_ids[:0] = first.token_ids  # a chat: the whole past, and a new question
    turn.num_prompt_tokens += 14
    scheduler.add([turn])
    assert run(scheduler).sequences[0].num_computed_tokens == 12  # of 13 stored tokens: the last was never fed back


def test_at_least_one_token_of_a_fully_cached_prompt_is_computed() -> None:
    scheduler, source = make_scheduler(block_size=4), Source()
    serve(scheduler, source.sequence(8, story=1))
    scheduler.add([source.sequence(8, story=1)])
    (item,) = run(scheduler).sequences
    assert (item.num_computed_tokens, item.num_tokens) == (4, 4)
    assert item.sample is not None


def test_identical_prompts_of_one_step_are_computed_once() -> None:
    scheduler, source, memory = make_scheduler(block_size=4), Source(), FakeMemory(4)
    sequences = [source.sequence(11, story=1) for _ in range(3)]
    scheduler.add(sequences)
    step = scheduler.schedule()
    assert list(counts(step).values()) == [11, 3, 3]
    assert {item.block_table[:2] for item in step.sequences} == {step.sequences[0].block_table[:2]}
    assert len({item.block_table[2] for item in step.sequences}) == 3
    memory.execute(step, dict(enumerate(sequences)))
    carry_out(scheduler, step)
    assert scheduler.manager.pool.num_used == 2 + 3 and scheduler.manager.pool.num_shared == 2


def test_only_what_the_step_itself_computes_is_shared_in_it() -> None:
    scheduler, source = make_scheduler(block_size=4, budget=10), Source()
    serving = source.sequence(1, max_tokens=50)
    first, second = source.sequence(20, story=1), source.sequence(20, story=1)
    scheduler.add([serving, first, second])
    assert counts(run(scheduler)) == {serving.sequence_id: 1, first.sequence_id: 9}
    assert counts(run(scheduler)) == {serving.sequence_id: 1, first.sequence_id: 9}
    step = run(scheduler)  # the last two of the first; the second finds 16, of its 20 tokens, and computes 4
    assert counts(step) == {serving.sequence_id: 1, first.sequence_id: 2, second.sequence_id: 4}


def test_requests_of_different_salts_share_nothing() -> None:
    scheduler, source = make_scheduler(), Source()
    serve(scheduler, source.sequence(12, story=1, salt="a"))
    for salt, hit in ((None, 0), ("b", 0), ("a", 8)):
        sequence = source.sequence(12, story=1, salt=salt, max_tokens=1)
        serve(scheduler, sequence)
        assert sequence.num_cached_tokens == hit


def test_a_request_that_wants_its_prompts_logprobs_reads_no_cache_and_feeds_it() -> None:
    scheduler, source = make_scheduler(block_size=4), Source()
    for _ in range(2):
        scheduler.add([source.sequence(9, story=1, prompt_logprobs=1, max_tokens=1)])
        assert run(scheduler).num_tokens == 9
    scheduler.add([source.sequence(9, story=1, max_tokens=1)])
    assert run(scheduler).num_tokens == 1


def test_a_failed_step_leaves_nothing_to_be_found() -> None:
    scheduler, source = make_scheduler(block_size=4), Source()
    first, second = source.sequence(9, story=1), source.sequence(9, story=1)
    scheduler.add([first, second])
    assert list(counts(scheduler.schedule()).values()) == [9, 1]  # and it fails
    scheduler.finish(first, "abort")  # who would have computed what the second one found
    step = run(scheduler)
    assert counts(step) == {second.sequence_id: 9}
    assert second.num_cached_tokens == scheduler.stats.prefix_hit_tokens == 0


def test_a_hash_published_by_an_aborted_request_of_a_failed_step_is_withdrawn_too() -> None:
    scheduler, source = make_scheduler(block_size=4), Source()
    (lost,) = add(scheduler, source, 9, story=1)
    scheduler.schedule()
    scheduler.finish(lost, "abort")
    scheduler.check_integrity()
    assert scheduler.manager.pool.num_hashed == 2
    scheduler.add([source.sequence(9, story=1)])
    assert run(scheduler).num_tokens == 9


def test_a_hash_never_leads_to_a_block_that_was_used_again() -> None:
    scheduler, source, memory = make_scheduler(num_blocks=4, block_size=4), Source(), FakeMemory(4)
    for story in (1, 2, 1, 3, 2, 1):
        sequence = source.sequence(10, story=story, max_tokens=3)
        scheduler.add([sequence])
        while scheduler.has_work:
            step = scheduler.schedule()
            memory.execute(step, {sequence.sequence_id: sequence})
            carry_out(scheduler, step)
    assert scheduler.manager.pool.num_evictions > 0


def test_a_preempted_sequences_own_blocks_do_not_count_as_cached() -> None:
    scheduler, source = make_scheduler(num_blocks=5, block_size=4), Source()
    _, young = add(scheduler, source, 7, 7, max_tokens=8)
    while not young.num_preemptions or young.state is SequenceState.WAITING:
        run(scheduler)
    assert young.num_cached_tokens == 0 < scheduler.stats.prefix_hit_tokens


def test_hits_that_lie_free_are_no_room_for_anything_else() -> None:
    """Four blocks, all free, two of them hits: a prompt of five blocks' worth is refused, one of four gets in."""
    scheduler, source = make_scheduler(num_blocks=4, block_size=4), Source()
    serve(scheduler, source.sequence(8, story=1, max_tokens=1))
    scheduler.add([source.sequence(16, story=1, max_tokens=1)])
    assert run(scheduler).num_tokens == 8
    assert scheduler.manager.pool.num_evictions == 0


@pytest.mark.parametrize("caching", [True, False])
def test_caching_can_be_turned_off(caching: bool) -> None:
    scheduler, source = make_scheduler(enable_prefix_caching=caching), Source()
    for _ in range(2):
        serve(scheduler, source.sequence(9, story=1))
    assert (scheduler.stats.prefix_hit_tokens > 0) == (scheduler.manager.pool.num_hashed > 0) == caching

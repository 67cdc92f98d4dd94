"""Preemption by swapping: blocks go out and come back, and nothing is computed twice."""

from __future__ import annotations

import pytest
from scheduling import FakeMemory, Source, add, carry_out, counts, make_scheduler, run

from paged_infer.control.blocks.manager import Allocation, BlockManager
from paged_infer.control.blocks.swap_space import SwapSpace
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence_state import SequenceState


def swapping_pair(**options) -> tuple[Scheduler, list]:
    """Two sequences of 8 tokens in a pool of 4 blocks; the next step needs a fifth."""
    scheduler, source = make_scheduler(num_blocks=4, block_size=4, **options), Source()
    sequences = add(scheduler, source, 7, 7, max_tokens=6)
    run(scheduler, 2)
    return scheduler, sequences


def test_a_swapped_sequence_computes_nothing_again() -> None:
    scheduler, (old, young) = swapping_pair(num_swap_blocks=4)
    step = scheduler.schedule()
    assert (young.state, young.num_computed_tokens) == (SequenceState.SWAPPED, 8)
    assert [block for block, _ in step.transfers.swap_outs] and scheduler.manager.table(young.sequence_id) == ()
    carry_out(scheduler, step)
    computed = {old.sequence_id: 8 + 1, young.sequence_id: 8}
    while scheduler.has_work:
        for sequence_id, num_tokens in counts(run(scheduler)).items():
            computed[sequence_id] += num_tokens
    assert set(computed.values()) == {7 + 6 - 1}  # all but the last token, each once
    assert scheduler.stats.blocks_swapped_out == 2


def test_what_is_still_resident_is_not_moved_back() -> None:
    scheduler, (_, young) = swapping_pair(num_swap_blocks=4)
    while young.state is not SequenceState.SWAPPED:
        run(scheduler)
    while young.state is SequenceState.SWAPPED:
        step = run(scheduler)
    assert len(step.transfers.swap_ins) == 1  # of two: the old one took its last block and left the first
    assert scheduler.stats.blocks_swapped_in == 1


def test_a_full_swap_space_falls_back_to_computing_again() -> None:
    scheduler, (_, young) = swapping_pair(num_swap_blocks=1)
    scheduler.schedule()
    assert (young.state, young.num_computed_tokens) == (SequenceState.WAITING, 0)
    assert scheduler.manager.swap.num_used == 0


def test_nobody_comes_in_before_all_that_are_swapped_are_back() -> None:
    scheduler, (old, young) = swapping_pair(num_swap_blocks=4)
    (late,) = add(scheduler, Source(), 1)
    late.sequence_id = 99
    while not old.is_finished:
        assert 99 not in counts(run(scheduler))
    assert {young.sequence_id, 99} <= counts(run(scheduler)).keys()


def test_samples_of_one_request_are_swapped_one_by_one() -> None:
    scheduler, source = make_scheduler(num_blocks=9, block_size=2, num_swap_blocks=9), Source()
    (other,) = add(scheduler, source, 4, max_tokens=10)
    samples = source.request(4, n=2, max_tokens=5).sequences
    scheduler.add(samples)
    seen = set()
    while scheduler.has_work:
        run(scheduler)
        seen.add(tuple(s.state.value for s in samples))
    assert ("running", "swapped") in seen and other.num_preemptions == 0
    assert {s.num_output_tokens for s in samples} == {5}


@pytest.mark.parametrize("moment", ["out", "in"])
def test_a_failed_step_that_swapped_is_computed_again(moment: str) -> None:
    scheduler, sequences = swapping_pair(num_swap_blocks=4)
    memory, by_id = FakeMemory(4), {s.sequence_id: s for s in sequences}
    for sequence in sequences:  # what the first two steps stored
        memory.slots.update(
            {
                (scheduler.manager.table(sequence.sequence_id)[i // 4], i % 4): content
                for i, content in enumerate(memory._contents(sequence, 8))
            }
        )
    failed = False
    while scheduler.has_work:
        step = scheduler.schedule()
        transfers = step.transfers.swap_outs if moment == "out" else step.transfers.swap_ins
        if transfers and not failed:
            failed = True
            memory.execute(step, by_id, fails_after=0)
            continue
        memory.execute(step, by_id)
        carry_out(scheduler, step)
        scheduler.check_integrity()
    assert failed and scheduler.manager.swap.num_used == 0


def test_an_aborted_sequence_leaves_swap_space_at_once() -> None:
    scheduler, (_, young) = swapping_pair(num_swap_blocks=4)
    run(scheduler)
    scheduler.finish(young, "abort")
    assert scheduler.manager.swap.num_used == 0 and not scheduler.swapped
    scheduler.check_integrity()


def test_a_place_is_not_filled_again_in_the_step_that_empties_it() -> None:
    space = SwapSpace(2)
    assert space.take(2) == [0, 1]
    space.put(1, (0, 1))
    space.drop(1)
    assert space.num_used == 0 and space.take(1) is None
    space.reuse_emptied()
    assert space.take(1) == [0]
    space.put(2, (0,))
    space.check_integrity({2})
    with pytest.raises(RuntimeError, match=r"sequences \[2\] are in swap space, not \[3\]"):
        space.check_integrity({3})


def test_the_watermark_keeps_newcomers_out_but_never_says_never() -> None:
    manager = BlockManager(10, 4, watermark=0.3)
    assert manager.can_allocate(40) is Allocation.OK  # an idle pool has no watermark
    manager.reserve(1, 0, 4)
    assert [manager.can_allocate(n) for n in (24, 28, 40, 41)] == [
        Allocation.OK,
        Allocation.LATER,
        Allocation.LATER,
        Allocation.NEVER,
    ]
    assert manager.reserve(1, 4, 40)  # who is in may use it


def test_the_watermark_spares_preemptions() -> None:
    preemptions = {}
    for watermark in (0, 0.3):
        scheduler, source = make_scheduler(num_blocks=10, block_size=2, watermark=watermark), Source()
        add(scheduler, source, *[2] * 12, max_tokens=8)
        while scheduler.has_work:
            run(scheduler)
        preemptions[watermark] = scheduler.stats.preemptions
    assert preemptions[0.3] < preemptions[0]


def test_a_mode_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="preemption_mode='drop': must be one of recompute, swap"):
        Scheduler(BlockManager(4, 4), 4, 16, preemption_mode="drop")
    with pytest.raises(ValueError, match="watermark=1"):
        BlockManager(4, 4, watermark=1)

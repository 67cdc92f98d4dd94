"""Checkers of chapter 10, continuous batching."""

from __future__ import annotations

from my_engine.generate import Sequence
from my_engine.paged import BlockManager as MyBlockManager
from my_engine.sampler import SamplingParams as MyParams

from checks import checker, expect
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.policies import Policy
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.trace import Trace
from paged_infer.simulation.lengths import RequestLengths
from paged_infer.simulation.model_free import RequestFactory, carry_out


@checker
def kept_waiting(answer):
    """Steps that each row of a static batch is kept after its last token: outputs, seats -> list."""
    outputs = [2, 6, 3, 1, 4, 9, 5]  # batches [2, 6, 3], [1, 4, 9] and [5]
    right = [4, 0, 3, 8, 5, 0, 0]
    found = answer(list(outputs), 3)
    expect(found is not None, "kept_waiting gives None: is the `return` missing?")
    found = list(found)
    asked = f"outputs {outputs} with 3 seats"
    expect(len(found) == 7, f"{asked}: a list of {len(found)} and not of 7: the last batch counts, full or not")
    expect(
        found != [9 - tokens for tokens in outputs],
        f"{asked}: a row waits for the longest of its own batch, not of all requests",
    )
    expect(found != [6, 6, 6, 9, 9, 9, 5], f"{asked}: this is how long each batch lasts, own steps included")
    for row, (steps, wanted) in enumerate(zip(found, right, strict=True)):
        expect(steps == wanted, f"{asked}: request {row} is kept for {wanted} steps and not {steps}")


@checker
def promise(answer):
    """The largest budget within a gap, and the first token of a newcomer: five integers -> (tokens, microseconds)."""
    names = ("gap_us", "num_running", "num_prompt", "per_step_us", "per_token_us")
    case = (100_000, 8, 1500, 17_000, 130)  # chunks of 630, 630 and 240
    asked = "promise(" + ", ".join(f"{name}={value:_}" for name, value in zip(names, case, strict=True)) + ")"
    found = answer(*case)
    expect(found is not None, "promise gives None: is the `return` missing?")
    budget, ttft_us = found
    expect(budget != 769, f"{asked}: a step of {budget} tokens takes {17_000 + 130 * 769:,} us, over the promise")
    expect(budget != 639, f"{asked}: a step of 639 tokens takes {17_000 + 130 * 639:,} us, over the promise")
    expect(budget != 630, f"{asked}: the budget counts the decodes, too; 630 is what they leave to the prompt")
    expect(budget == 638, f"{asked}: the budget is 638, and not {budget}")
    expect(
        ttft_us != 2 * 99_940 + 17_000 + 130 * 232,
        f"{asked}: the decodes take 8 tokens of each step; the prompt gets 630",
    )
    expect(ttft_us != 3 * 99_940, f"{asked}: the last chunk has 240 tokens, so its step is not a full one")
    expect(
        ttft_us != 2 * 99_940 + 17_000 + 130 * 240, f"{asked}: in the step of the last chunk, too, 8 requests decode"
    )
    expect(ttft_us == 249_120, f"{asked}: the first token comes after 249,120 us, and not {ttft_us:,}")
    even = answer(50_000, 10, 300, 10_000, 1000)  # a budget of 40, chunks of 30: ten full steps
    expect(
        tuple(even) == (40, 500_000),
        f"a prompt of 300 in chunks of 30 takes ten full steps of 50,000 us, and yours gives {even[1]:,}",
    )


@checker
def StaticScheduler(answer):
    """my_engine's scheduler, with waiting sequences admitted only when none runs."""
    for lengths in ([(1, 2), (1, 6), (1, 3), (1, 1), (1, 4)], [(3, 4), (5, 1), (2, 7)]):
        steps, scheduler = _static_steps(answer, lengths, num_blocks=100, max_num_seqs=2)
        asked = f"prompts and outputs {lengths}, max_num_seqs 2"
        batches = [lengths[first : first + 2] for first in range(0, len(lengths), 2)]
        right = sum(max(num_output for _, num_output in batch) for batch in batches)
        expect(len(steps) == right, f"{asked}: {right} steps are needed, and this takes {len(steps)}")
        expect(len(scheduler.manager.free_blocks) == 100, f"{asked}: blocks are still held at the end")
    steps, scheduler = _static_steps(answer, [(8, 8)] * 3, num_blocks=6, max_num_seqs=2)
    expect(scheduler.num_preemptions > 0, "the pool is too small for two, and none is preempted")
    order = list(dict.fromkeys(request for step in steps[6:] for request in step if request))
    expect(order == [1, 2], "request 1 is preempted: it belongs to the next batch, before request 2 that has waited")


def _static_steps(answer, lengths, num_blocks, max_num_seqs):
    """What each step schedules, by request. Raises ``Wrong`` where a sequence is admitted into a batch that runs."""
    manager = MyBlockManager(num_blocks, 4)
    scheduler = answer(manager, max_num_seqs=max_num_seqs, max_num_batched_tokens=64)
    sequences = [Sequence([i + 1] * p, MyParams(max_tokens=o), 0, p, -1) for i, (p, o) in enumerate(lengths)]
    asked, steps = f"prompts and outputs {lengths}, max_num_seqs {max_num_seqs}", []
    scheduler.add(sequences)
    while not all(sequence.finish_reason for sequence in sequences):
        running = list(scheduler.running)
        plan = scheduler.schedule()
        expect(plan is not None, "schedule gives None: is the `return` missing?")
        plan = list(plan)
        known = [*scheduler.running, *scheduler.waiting]
        for place, sequence in enumerate(sequences):
            expect(sequence.finish_reason or sequence in known, f"{asked}: request {place} is in no queue any more")
            expect(
                not running or sequence in running or sequence not in scheduler.running,
                f"{asked}: request {place} is admitted in step {len(steps) + 1} while others run",
            )
        expect(bool(plan), f"{asked}: step {len(steps) + 1} is empty, and {len(known)} requests have not ended")
        steps.append([sequences.index(sequence) for sequence, _ in plan])
        for sequence, num_new in plan:
            sequence.num_computed_tokens += num_new
            if not sequence.num_uncomputed_tokens:
                sequence.token_ids.append(0)
                if len(sequence.output_token_ids) == sequence.params.max_tokens:
                    sequence.finish_reason = "length"
                    scheduler.finish(sequence)
    return steps, scheduler


@checker
def Alternate(answer):
    """Prompts whole, in steps of their own, and never twice in a row while any sequence decodes."""
    expect(isinstance(answer, type) and issubclass(answer, Policy), "Alternate is to be a class, a Policy")
    expect(not answer.chunks_prompts, "prompts are to be computed whole: keep chunks_prompts = False")
    arrivals = {0: [(4, 9), (5, 3)], 2: [(8, 4)], 3: [(6, 4)], 4: [(7, 2)], 12: [(40, 3), (41, 2)], 30: [(9, 5)]}
    manager, trace, crowd = BlockManager(100, 4), Trace(100), RequestFactory(200)
    scheduler = Scheduler(manager, 4, 64, policy=answer(), trace=trace)
    could_wait = []  # of each step, whether a sequence waited although there was a seat
    for place in range(200):
        for lengths in arrivals.get(place, ()):
            scheduler.add(crowd.request(RequestLengths(*lengths)))
        room = bool(scheduler.waiting) and len(scheduler.running) < 4
        decoding = bool(scheduler.running)
        carry_out(scheduler, scheduler.schedule(float(place)), place + 1.0)
        could_wait.append(room)
        _look_at(trace, place, decoding, could_wait)
    left = len(scheduler.waiting) + len(scheduler.running)
    expect(not left, f"after 200 steps {left} of the 8 requests have not ended")
    _look_at_swaps(answer)


def _look_at_swaps(answer):
    """Three requests in a pool for two, and others that keep coming: swapped sequences have to resume."""

    class Watched(answer):
        def plan(self, step):
            super().plan(step)
            num_swapped = len(step.swapped)
            expect(
                bool(step.scheduled) or not num_swapped,
                f"{num_swapped} sequence(s) are swapped out, no other sequence runs, and the step is empty: "
                "does any step call `resume_swapped`?",
            )

    manager, crowd = BlockManager(14, 4, num_swap_blocks=14, watermark=0), RequestFactory(64)
    options = {"preemption_mode": "swap", "enable_prefix_caching": False}
    scheduler = Scheduler(manager, 3, 64, policy=Watched(), **options)
    has_swapped = False
    for place in range(200):
        if place < 3:
            scheduler.add(crowd.request(RequestLengths(8, 20)))
        carry_out(scheduler, scheduler.schedule(float(place)), place + 1.0)
        has_swapped = has_swapped or bool(scheduler.swapped)
    left = len(scheduler.waiting) + len(scheduler.running) + len(scheduler.swapped)
    expect(not left, f"with a pool of 14 blocks, {left} of 3 requests have not ended after 200 steps")
    assert has_swapped, "this case is to swap"


def _look_at(trace, place, decoding, could_wait):
    """One step of a policy that takes turns, by what it computed."""
    step, before = trace.steps[place], trace.steps[place - 1] if place else None
    num_prompts = len(step.prefills)
    expect(
        num_prompts in (0, len(step.sequence_ids)),
        f"step {place} computes {num_prompts} prompt(s) and {len(step.sequence_ids) - num_prompts} decode(s)",
    )
    if before is None:
        return
    if num_prompts and decoding:
        expect(
            not before.prefills,
            f"steps {place - 1} and {place} both compute prompts, while a decoding sequence stands still",
        )
    if could_wait[place] and not num_prompts:
        expect(
            bool(before.prefills),
            f"steps {place - 1} and {place} compute no prompt, although a sequence waits and a seat is free",
        )

"""Checkers of chapter 10, continuous batching."""

from __future__ import annotations

import random

from checks import checker, expect
from paged_infer.bench.lengths import RequestLengths
from paged_infer.bench.model_free import RequestFactory, carry_out
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.policies import Policy
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.trace import Trace


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
    expect(budget != 630, f"{asked}: the budget counts who decodes too; 630 is what they leave to the prompt")
    expect(budget == 638, f"{asked}: the budget is 638, and not {budget}")
    expect(
        ttft_us != 2 * 99_940 + 17_000 + 130 * 232,
        f"{asked}: who decodes takes 8 tokens of each step; the prompt gets 630",
    )
    expect(ttft_us != 3 * 99_940, f"{asked}: the last chunk has 240 tokens, so its step is not a full one")
    expect(
        ttft_us != 2 * 99_940 + 17_000 + 130 * 240, f"{asked}: in the step of the last chunk, too, 8 requests decode"
    )
    expect(ttft_us == 249_120, f"{asked}: the first token comes after 249,120 us, and not {ttft_us:,}")
    even = answer(50_000, 10, 300, 10_000, 1000)  # a budget of 40, chunks of 30: ten full steps
    expect(
        tuple(even) == (40, 500_000),
        f"a prompt of 300 in chunks of 30 takes ten full steps of 50,000 us, and this says {even[1]:,}",
    )


@checker
def preempt(answer):
    """Who gives back blocks in a step: held, needed, free -> places, in the order in which they go."""

    def found(held, needed, free):
        gone = answer(list(held), list(needed), free)
        expect(gone is not None, "preempt gives None: is the `return` missing?")
        return list(gone)

    def check(held, needed, free, right, why):
        gone = found(held, needed, free)
        asked = f"held {held}, needed {needed}, free {free}"
        expect(gone == right, f"{asked}: {why}; {right} go, and not {gone}")

    check([3, 2, 2], [1, 1, 1], 3, [], "there are enough for all")
    gone = found([3, 2, 2], [1, 1, 0], 0)
    expect(gone[:1] != [0], "the oldest is preempted: it is the one who never is")
    check([3, 2, 2], [1, 1, 0], 0, [2], "the youngest gives back 2 blocks, enough for the other two")
    check([3, 1, 1], [2, 0, 0], 0, [2, 1], "one block is not enough for the oldest's two")
    check([4, 3], [0, 1], 0, [1], "the youngest who needs a block and finds none goes itself")
    check([3, 2, 2], [1, 1, 1], 0, [2], "who was preempted is served no more, and needs nothing")
    check([2, 2, 1], [1, 2, 1], 1, [2, 1], "1 had one block of 2's, needed two, and was then the youngest")
    rng = random.Random(0)
    for _ in range(200):
        held = [rng.randint(1, 6) for _ in range(rng.randint(1, 6))]
        needed = [rng.randint(0, 3) for _ in held]
        free = rng.randint(0, 3)
        check(held, needed, free, _preempted(held, needed, free), "a case drawn at random")


def _preempted(held, needed, free):
    last, gone, place = len(held) - 1, [], 0  # places 0 to ``last`` run
    while place <= last:
        if needed[place] <= free:
            free -= needed[place]
            place += 1
        else:
            free += held[last]
            gone.append(last)
            last -= 1
    return gone


@checker
def Alternate(answer):
    """Prompts whole, in steps of their own, and never twice in a row while anybody decodes."""
    expect(isinstance(answer, type) and issubclass(answer, Policy), "Alternate is to be a class, a Policy")
    expect(not answer.chunks_prompts, "prompts are to be computed whole: keep chunks_prompts = False")
    arrivals = {0: [(4, 9), (5, 3)], 2: [(8, 4)], 3: [(6, 4)], 4: [(7, 2)], 12: [(40, 3), (41, 2)], 30: [(9, 5)]}
    manager, trace, crowd = BlockManager(100, 4), Trace(100), RequestFactory(200)
    scheduler = Scheduler(manager, 4, 64, policy=answer(), trace=trace)
    could_wait = []  # of each step, whether somebody waited although there was a seat
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
            f"steps {place - 1} and {place} both compute prompts, while somebody who decodes stands still",
        )
    if could_wait[place] and not num_prompts:
        expect(
            bool(before.prefills),
            f"steps {place - 1} and {place} compute no prompt, although somebody waits and a seat is free",
        )

"""Checkers of chapter 20, from here to vLLM; the capstone's is in ``capstone``."""

from __future__ import annotations

import random
from typing import Any

from checks import Wrong, checker, expect
from checks.capstone import EvictionOrder, capstone  # noqa: F401 - as ch20.capstone
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.scheduler import Scheduler
from paged_infer.simulation.lengths import RequestLengths
from paged_infer.simulation.model_free import RequestFactory, carry_out


@checker
def v1_tokens(answer):
    """Tokens that V1's loop over running requests gives: uncomputed tokens, budget, threshold -> list."""

    def check(left, budget, threshold, right, why):
        found = answer(list(left), budget, threshold)
        expect(found is not None, "v1_tokens gives None: is the `return` missing?")
        asked = f"uncomputed {left}, budget {budget}, threshold {threshold}"
        expect(list(found) == right, f"{asked}: {why}; {right} are given, and not {list(found)}")

    check([1, 1, 1], 8, 0, [1, 1, 1], "the budget has enough for all")
    check([100, 1, 1], 64, 0, [64, 0, 0], "V1 reserves nothing for those that follow, and a threshold of 0 is none")
    check([100, 1, 1], 64, 32, [32, 1, 1], "the threshold cuts the long prompt, and leaves budget for the rest")
    check([20, 1], 64, 32, [20, 1], "a prompt below the threshold is not cut, and none gets more than it has left")
    check([40, 40, 40], 64, 32, [32, 32, 0], "after two chunks the budget is spent")
    check([30, 30], 16, 32, [16, 0], "the budget holds whatever the threshold says")
    rng = random.Random(0)
    for _ in range(200):
        left = [rng.choice((1, 1, 1, rng.randint(2, 90))) for _ in range(rng.randint(1, 8))]
        budget, threshold, right = rng.randint(1, 96), rng.choice((0, 8, 40)), []
        rest = budget
        for tokens in left:
            right.append(min(tokens, threshold or tokens, rest))
            rest -= right[-1]
        check(left, budget, threshold, right, "a case drawn at random")


@checker
def closed_gate(answer):
    """Why the head of the waiting queue is not admitted: "order", "budget", "seats", "blocks", or None."""
    names = ("preempted", "budget", "num_running", "max_num_seqs", "num_tokens", "num_hits", "num_free", "block_size")

    def check(case, right, why):
        found = answer(*case)
        asked = ", ".join(f"{name}={value}" for name, value in zip(names, case, strict=True))
        expect(found == right, f"closed_gate({asked}): {why}; {right!r} is asked for, and not {found!r}")

    check((False, 16, 2, 4, 40, 0, 10, 4), None, "10 blocks hold 40 tokens")
    check((False, 4, 2, 4, 40, 0, 3, 4), "blocks", "room is needed for the whole prompt, not for the first chunk of it")
    check((False, 16, 2, 4, 41, 0, 10, 4), "blocks", "41 tokens fill 10 blocks and a part of an eleventh")
    check((False, 16, 2, 4, 40, 7, 3, 4), None, "7 of its 10 blocks are hits that others hold: 3 more are needed")
    check((False, 16, 4, 4, 8, 0, 10, 4), "seats", "4 of 4 seats are taken")
    check((False, 0, 2, 4, 8, 0, 10, 4), "budget", "a step without tokens left admits nothing")
    check((True, 16, 1, 4, 8, 0, 10, 4), "order", "a running request was preempted in this step, and it comes first")
    check((True, 0, 4, 4, 8, 0, 0, 4), "order", "all gates are closed, and the preemption is looked at first")
    check((False, 0, 4, 4, 8, 0, 0, 4), "budget", "the budget is looked at before the seats")
    check((False, 5, 4, 4, 8, 0, 0, 4), "seats", "the seats are looked at before the blocks")


@checker
def delta(answer):
    """What to send of the block tables: held at the worker, tables now -> {id: (replaces, blocks)}."""
    found = answer({}, {7: (3, 1)})
    expect(found is not None, "delta gives None: is the `return` missing?")
    expect(_plain(found) == {7: (True, (3, 1))}, f"a sequence new to the worker is sent whole; yours gives {found}")
    found = _plain(answer({7: (3, 1)}, {7: (3, 1)}))
    expect(found == {7: (False, ())}, f"an unchanged table needs no blocks, and yours gives {found}")
    found = _plain(answer({7: (3, 1), 8: (2,)}, {7: (3, 1, 4)}))
    expect(8 not in found, "only sequences of this step are sent, and 8 is not in it")
    expect(found == {7: (False, (4,))}, f"(3, 1) has grown to (3, 1, 4), so (4,) is sent, and yours gives {found}")
    found = _plain(answer({7: (3, 1)}, {7: (5, 6, 1)}))
    expect(
        found == {7: (True, (5, 6, 1))},
        f"7 was preempted and has other blocks now: its table is replaced, and yours gives {found}",
    )
    held, sent, right = {}, 0, 0
    for step in _contended_steps():
        tables = {one.sequence_id: tuple(one.block_table) for one in step.sequences}
        message = _plain(answer(dict(held), dict(tables)))
        expect(message.keys() == tables.keys(), f"a step with {sorted(tables)} sends {sorted(message)}")
        for sequence_id, (replaces, blocks) in message.items():
            kept = held.get(sequence_id, ())
            right += len(tables[sequence_id]) - (len(kept) if tables[sequence_id][: len(kept)] == kept else 0)
            sent += len(blocks)
            held[sequence_id] = blocks if replaces else kept + blocks
            expect(
                held[sequence_id] == tables[sequence_id],
                f"in a run with preemptions the worker has table {held[sequence_id]} for {tables[sequence_id]}",
            )
    expect(sent == right, f"{sent} block numbers are sent in a run where {right} are enough")


def _plain(found: Any) -> dict[int, tuple[bool, tuple[int, ...]]]:
    try:
        return {i: (bool(replaces), tuple(blocks)) for i, (replaces, blocks) in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise Wrong(f"a dictionary {{id: (replaces, blocks)}} is asked for, and this is {found!r}") from None


def _contended_steps():
    scheduler, factory = Scheduler(BlockManager(24, 4), 6, 32), RequestFactory(200)
    for output in (30, 25, 20, 28, 9, 14):
        scheduler.add(factory.request(RequestLengths(10, output)))
    while scheduler.has_work:
        step = scheduler.schedule()
        yield step
        carry_out(scheduler, step)

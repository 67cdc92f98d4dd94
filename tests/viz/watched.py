"""Schedules without a model, and what an onlooker wrote down of each step: what pictures of the trace are held to."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass

from matplotlib.collections import PolyCollection

from paged_infer.control.admission import add_sequences
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.policies import make_policy
from paged_infer.control.request import Request
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import Sequence
from paged_infer.control.step import StepResult
from paged_infer.control.trace import Trace
from paged_infer.params import SamplingParams


@dataclass
class Seen:
    """The scheduler while one step was out, taken from the live objects and not from the trace."""

    queues: dict[int, str]  # by sequence id: "waiting", "running", "swapped", "held"
    computed: dict[int, int]  # before the step
    known: dict[int, int]  # tokens, prompt and output
    scheduled: dict[int, int]
    tables: dict[int, tuple[int, ...]]
    counts: list[int]
    findable: set[int]


def request(name: str, prompt: ReadOnlyList[int], first_id: int, **params) -> Request:
    made = Request(name, None, list(prompt), SamplingParams(ignore_eos=True, **params), 0.0)
    add_sequences(made, first_id, 0, 10_000, ())
    return made


def watch(
    requests: ReadOnlyList[tuple[int, Request]],
    *,
    num_blocks: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 32,
    num_swap_blocks: int = 0,
    policy: str = "chunked",
    fails: ReadOnlyList[int] = (),
) -> tuple[Trace, list[Seen]]:
    """Serve ``requests``, each with the step before which it arrives. Steps begin a second apart and take 0.25."""
    trace = Trace(num_blocks)
    scheduler = Scheduler(
        BlockManager(num_blocks, block_size, num_swap_blocks=num_swap_blocks),
        max_num_seqs,
        budget,
        preemption_mode="swap" if num_swap_blocks else "recompute",
        policy=make_policy(policy),
        trace=trace,
    )
    everybody = [sequence for _, one in requests for sequence in one.sequences]
    seen, number = [], 0
    while scheduler.has_work or number <= max(arrival for arrival, _ in requests):
        for arrival, one in requests:
            if arrival == number:
                scheduler.add(one.sequences)
        step = scheduler.schedule(float(number))
        seen.append(look(scheduler, everybody, {s.sequence_id: s.num_tokens for s in step.sequences}))
        if number not in fails:
            scheduler.advance(step)
            scheduler.settle(step, StepResult({i: 100_000 + 1000 * i + number for i in step.sampling}), number + 0.25)
        number += 1
    return trace, seen


def look(scheduler: Scheduler, sequences: ReadOnlyList[Sequence], scheduled: dict[int, int]) -> Seen:
    queues = {"waiting": scheduler.waiting, "running": scheduler.running, "swapped": scheduler.swapped}
    pool = scheduler.manager.pool
    return Seen(
        {s.sequence_id: name for name, queue in {**queues, "held": scheduler.queues.draining}.items() for s in queue},
        {s.sequence_id: s.num_computed_tokens for s in sequences},
        {s.sequence_id: s.num_tokens for s in sequences},
        scheduled,
        {s.sequence_id: table for s in sequences if (table := scheduler.manager.table(s.sequence_id))},
        [pool.reference_count(block) for block in range(pool.num_blocks)],
        {block for block in range(pool.num_blocks) if pool.hash_of(block) is not None},
    )


def crowd(*lengths: int, first: int = 1, max_tokens: int = 6) -> list[tuple[int, Request]]:
    """Requests of such prompts, no two alike, all there before the first step."""
    return [
        (0, request(f"{i}", range(first + 1000 * i, first + 1000 * i + n), i, max_tokens=max_tokens))
        for i, n in enumerate(lengths)
    ]


def uneven() -> list[tuple[int, Request]]:
    """Some end long before others."""
    return [
        (0, request(f"{i}", range(1000 * i, 1000 * i + 5 + i), i, max_tokens=n)) for i, n in enumerate((3, 9, 2, 6, 1))
    ]


def family() -> list[tuple[int, Request]]:
    """One prompt, two samples of it and one more word, and the same beginning with another end."""
    beginning = list(range(11))
    return [
        (0, request("a", beginning, 0, max_tokens=8)),
        (2, request("b", [*beginning, 50], 1, max_tokens=5, n=2, temperature=1.0)),
        (3, request("c", [*beginning[:9], 60, 61, 62], 3, max_tokens=4)),
    ]


def boxes(axes, name: str) -> list[tuple[float, float, float, float]]:
    """(left, low, right, high) of every rectangle, or other shape, drawn under this name."""
    found = [c for c in axes.collections if isinstance(c, PolyCollection) and c.get_label() == name]
    extents = [path.get_extents().extents for c in found for path in c.get_paths()]
    return [tuple(round(float(x), 6) for x in extent) for extent in extents]


def colours(axes, name: str) -> list[tuple[float, ...]]:
    (found,) = [c for c in axes.collections if c.get_label() == name]
    return [tuple(colour) for colour in found.get_facecolor()]


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]

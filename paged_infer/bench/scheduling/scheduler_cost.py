"""The cost of Scheduler.schedule and update with all places taken, in pools of a thousand to a million blocks.

Every pool gets the same traffic: sequences that decode, a few that end in every step, as many that arrive, half of
them with a shared prefix. To keep each pool 95 % full, tables that never run hold the blocks that the traffic does not,
and the rest are cached blocks that no request looks up, so that each block taken evicts one:

    [ running ... | held, never running ...     | cached, next to be evicted ]
      ------------------ 95 % ----------------    5 %
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from itertools import chain
from statistics import median, quantiles
from typing import Any

from paged_infer.bench.report import JsonReport
from paged_infer.control.blocks.hashing import extend_chain, root_hash
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.step import StepResult
from paged_infer.control.trace import Trace
from paged_infer.simulation.lengths import RequestLengths
from paged_infer.simulation.model_free import RequestFactory

BLOCK_SIZE = 16
FULL = 0.95  # share of the pool that is held
POOLS = (1_000, 10_000, 100_000, 1_000_000)  # blocks
BLOCKS_A_SEQUENCE = 3.4  # about what the traffic holds: 32 tokens of prompt, some shared, and half of 48 of output
PROMPTS = (256, 1024, 4096, 16384)  # tokens
MAX_MODEL_LEN = 1 << 20


@dataclass(frozen=True, slots=True)
class PoolReport:
    """One pool: milliseconds for ``schedule`` and ``update`` together, without a trace and with one."""

    num_blocks: int
    held: float  # share of the pool, at the end
    evictions_per_step: float
    hit_tokens_per_step: float
    preemptions: int
    plain_ms: float  # medians
    plain_p95_ms: float
    traced_ms: float
    traced_p95_ms: float
    trace_ms: float  # median of the differences between the two, step by step


@dataclass(frozen=True, slots=True)
class LookupReport:
    """A prompt looked up for the first time, and the same sequence one block later."""

    num_tokens: int
    first_us: float
    next_block_us: float


@dataclass(frozen=True, slots=True)
class ControlReport(JsonReport):
    num_seqs: int
    num_steps: int
    seed: int
    step_ms: float  # what the trace's cost is a share of
    step_is: str
    machine: dict[str, Any]
    pools: list[PoolReport]
    lookups: list[LookupReport]

    @property
    def flatness(self) -> float:
        """Time a step in the largest pool over that in the smallest."""
        return self.pools[-1].plain_ms / self.pools[0].plain_ms

    @property
    def trace_share(self) -> float:
        """Of a model's step, in the pool where the trace costs most."""
        return max(pool.trace_ms for pool in self.pools) / self.step_ms


class FullScheduler:
    """A scheduler whose ``num_seqs`` places are taken in every step, and the seconds of its timed steps."""

    def __init__(self, num_blocks: int, num_seqs: int, seed: int, *, traced: bool) -> None:
        self.num_seqs = num_seqs
        self.seconds: list[float] = []
        self._rng = random.Random(seed)
        self._factory = RequestFactory(MAX_MODEL_LEN)
        self._beginnings = [[10 + topic] * 2 * BLOCK_SIZE for topic in range(8)]
        self.num_blocks = num_blocks
        num_running = int(BLOCKS_A_SEQUENCE * num_seqs)
        if int(num_blocks * FULL) < num_running:
            raise ValueError(
                f"{num_blocks} blocks: {num_seqs} sequences need {num_running}, which is to be {FULL:.0%} of the pool"
            )
        manager = BlockManager(num_blocks, BLOCK_SIZE, watermark=0.0)
        self.scheduler = Scheduler(manager, num_seqs, 2048, trace=Trace(num_blocks) if traced else None)
        self._fill(manager, int(num_blocks * FULL) - num_running)

    def _fill(self, manager: BlockManager, num_resident: int) -> None:
        if num_resident:
            manager.reserve(-1, 0, num_resident * BLOCK_SIZE)
        num_rest = self.num_blocks - num_resident
        manager.reserve(-2, 0, num_rest * BLOCK_SIZE)
        manager.publish(-2, [b"%d" % block for block in range(num_rest)], 0, num_rest)
        manager.commit()
        manager.free(-2)
        manager.events.clear()

    def _arrive(self, num_output: int) -> None:
        lengths = RequestLengths(self._rng.randint(17, 47), num_output)
        shares = self._rng.random() < 0.5
        self.scheduler.add(self._factory.request(lengths, prefix=self._rng.choice(self._beginnings) if shares else ()))

    def open(self) -> None:
        """Fill all places with sequences of every age, so that later about as many end in each step."""
        for _ in range(self.num_seqs):
            self._arrive(self._rng.randint(1, 48))
        while self.scheduler.waiting:
            self.step()

    def step(self) -> float:
        """One step; sequences that have ended are replaced before the clock starts. Returns seconds."""
        for _ in range(self.num_seqs - len(self.scheduler.running) - len(self.scheduler.waiting)):
            self._arrive(self._rng.randint(32, 64))
        began = time.perf_counter()
        step = self.scheduler.schedule(began)
        scheduled = time.perf_counter()
        result = StepResult({sequence_id: sequence_id for sequence_id in step.sampling})
        resumed = time.perf_counter()
        self.scheduler.advance(step)
        self.scheduler.settle(step, result, resumed)
        return scheduled - began + time.perf_counter() - resumed

    def report_counts(self) -> tuple[int, int, int]:
        stats = self.scheduler.stats
        return self.scheduler.manager.pool.num_evictions, stats.prefix_hit_tokens, stats.preemptions


def measure_pools(num_blocks: ReadOnlyList[int], num_seqs: int, num_steps: int, seed: int) -> list[PoolReport]:
    """Each pool plain and traced, all of them one step after the other, so that they get the same load."""
    pairs = [
        (FullScheduler(n, num_seqs, seed, traced=False), FullScheduler(n, num_seqs, seed, traced=True))
        for n in num_blocks
    ]
    for one in chain(*pairs):
        one.open()
    before = [plain.report_counts() for plain, _ in pairs]
    for number in range(num_steps):
        for pair in pairs:
            for one in pair if number % 2 else pair[::-1]:
                one.seconds.append(one.step())
    return [_report(*pair, counts) for pair, counts in zip(pairs, before, strict=True)]


def _report(full: FullScheduler, traced: FullScheduler, before: tuple[int, int, int]) -> PoolReport:
    plain_s, traced_s = full.seconds, traced.seconds
    num_steps = len(plain_s)
    evictions, hits, preemptions = (now - then for now, then in zip(full.report_counts(), before, strict=True))
    return PoolReport(
        num_blocks=full.num_blocks,
        held=full.scheduler.manager.pool.num_used / full.num_blocks,
        evictions_per_step=evictions / num_steps,
        hit_tokens_per_step=hits / num_steps,
        preemptions=preemptions,
        plain_ms=1e3 * median(plain_s),
        plain_p95_ms=1e3 * quantiles(plain_s, n=20)[-1],
        traced_ms=1e3 * median(traced_s),
        traced_p95_ms=1e3 * quantiles(traced_s, n=20)[-1],
        trace_ms=1e3 * median(with_it - without for with_it, without in zip(traced_s, plain_s, strict=True)),
    )


def measure_lookups(prompts: ReadOnlyList[int] = PROMPTS, repeats: int = 15) -> list[LookupReport]:
    """Hash and find the blocks of prompts that are all cached, then one more block of each."""
    manager = BlockManager(2 * max(prompts) // BLOCK_SIZE, BLOCK_SIZE)
    tokens = list(range(max(prompts) + BLOCK_SIZE))
    hashes: list[bytes] = []
    extend_chain(hashes, root_hash(None), tokens, BLOCK_SIZE)
    manager.reserve(0, 0, len(hashes) * BLOCK_SIZE)
    manager.publish(0, hashes, 0, len(hashes))
    reports = []
    for num_tokens in prompts:
        first, more = [], []
        for _ in range(repeats):
            lengths = RequestLengths(num_tokens, 2 * BLOCK_SIZE)
            (sequence,) = RequestFactory(MAX_MODEL_LEN).request(lengths, prefix=tokens)
            sequence.token_ids[-1] = tokens[num_tokens - 1]
            began = time.perf_counter()
            found = manager.find_prefix(sequence.hash_chain(BLOCK_SIZE))
            first.append(time.perf_counter() - began)
            if len(found) != num_tokens // BLOCK_SIZE:
                raise RuntimeError(f"{len(found)} blocks found of a cached prompt of {num_tokens} tokens")
            sequence.token_ids += tokens[num_tokens : num_tokens + BLOCK_SIZE]
            began = time.perf_counter()
            sequence.hash_chain(BLOCK_SIZE)
            more.append(time.perf_counter() - began)
        reports.append(LookupReport(num_tokens, 1e6 * median(first), 1e6 * median(more)))
    return reports


def storyteller_step_ms(num_seqs: int, num_steps: int = 12) -> float:
    """Median step of the bundled model on this machine while ``num_seqs`` sequences decode."""
    from paged_infer.bench.timing import time_calls
    from paged_infer.llm import LLM
    from paged_infer.params import SamplingParams

    engine = LLM(max_num_seqs=num_seqs).engine
    params = SamplingParams(temperature=0, max_tokens=num_steps + 4, ignore_eos=True)
    for number in range(num_seqs):
        engine.add_request(str(number), [1 + number % 1000, 5, 6, 7], params)
    return 1e3 * time_calls(engine.step, repeats=num_steps, warm_up=3).median_s

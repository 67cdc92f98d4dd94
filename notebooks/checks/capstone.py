"""The capstone's checker, which measures what it accepts: a policy, an eviction order or an attention backend."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import mean
from time import perf_counter

import torch

from checks import Wrong, checker, device, expect
from paged_infer import LLM, SamplingParams
from paged_infer.bench.workloads import story_beginnings
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.blocks.pool import BlockPool
from paged_infer.control.policies import Chunked, Policy
from paged_infer.control.scheduler import Scheduler
from paged_infer.kernels import paged_attention_reference
from paged_infer.kernels.attention_backends import ATTENTION_BACKENDS, register_attention_backend
from paged_infer.simulation.costs import LinearCost
from paged_infer.simulation.lengths import RequestLengths
from paged_infer.simulation.model_free import RequestFactory, carry_out

MOST_STEPS = 100  # that a request may be overtaken by, or wait for its next token
COST = LinearCost(1.0, 0.02)  # seconds of a step and of each of its tokens


class EvictionOrder(BlockPool):
    """A pool that evicts the block that ``choose`` names."""

    def choose(self, cached: list[int]) -> int:
        """``cached``: free blocks with a hash, the least recently freed first. ``hash_of(block)`` is its hash."""
        return cached[0]

    def take(self) -> int:
        if not self._blank and self._cached:
            self._cached.move_to_end(self.choose(list(self._cached)), last=False)
        return super().take()


@checker
def capstone(answer):
    """A policy, an eviction order or an attention backend: the same tokens, no starvation, integrity, and a measure."""
    if isinstance(answer, type) and issubclass(answer, Policy):
        _judge_policy(answer)
    elif isinstance(answer, type) and issubclass(answer, BlockPool):
        _judge_eviction(answer)
    else:
        expect(
            callable(answer) and not isinstance(answer, type),
            "a class derived from Policy or EvictionOrder is asked for, or a function: an attention backend",
        )
        _judge_backend(answer)


def _run(scheduler: Scheduler, requests: list, name: str, limit: int = 4000) -> tuple[dict, dict, float]:
    """(arrival in steps, RequestLengths, prefix) -> steps of each sequence's tokens, their seconds, the last second."""
    factory, index, now, steps, seconds = RequestFactory(4096), 0, 0.0, {}, {}
    coming = sorted(requests, key=lambda request: request[0])
    while coming or scheduler.has_work:
        expect(index < limit, f"{name}: after {limit} steps {len(scheduler.waiting)} requests wait")
        while coming and coming[0][0] <= index:
            _, lengths, prefix = coming.pop(0)
            (sequence,) = factory.request(lengths, now, prefix)
            steps[sequence.sequence_id], seconds[sequence.sequence_id] = [index], [now]
            scheduler.add([sequence])
        step = scheduler.schedule(now)
        now += COST.seconds(step) if step.sequences else 1.0
        index += 1
        for sequence in carry_out(scheduler, step, now):
            steps[sequence.sequence_id].append(index)
            seconds[sequence.sequence_id].append(now)
        try:
            scheduler.check_integrity()
        except RuntimeError as error:
            raise Wrong(f"{name}: after step {index} the blocks are not in order: {error}") from None
    return steps, seconds, now


def _tokens(name: str, prepare: Callable[[LLM], None] | None = None, **options) -> list[list[int]]:
    """Greedy tokens of eight beginnings, with three seats, chunked prompts and few blocks."""
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 128, "num_blocks": 20, "max_model_len": 128}
    llm = LLM(dtype="float32", device=device.type, **{**limits, **options})
    if prepare is not None:
        prepare(llm)
    work = story_beginnings(llm, num_requests=8, max_tokens=24, seed=3)
    outputs = [out.outputs[0].token_ids for _ in range(2) for out in llm.generate(work.prompts, work.params, False)]
    expect(len(outputs) == 16, f"{name}: {len(outputs)} of 16 requests have an answer")
    return outputs


def _expect_same(found: list[list[int]], name: str) -> None:
    expected = _tokens("the engine")
    wrong = [place for place, (ours, theirs) in enumerate(zip(expected, found, strict=True)) if ours != theirs]
    allowed = 0 if device.type == "cpu" else 2  # on a GPU other sums are rounded otherwise: near ties
    expect(
        len(wrong) <= allowed,
        f"{name}: {len(wrong)} of {len(found)} requests have other tokens than the engine gives them",
    )


def _judge_policy(policy: type[Policy]) -> None:
    name, rng = policy.__name__, random.Random(1)
    for _ in range(20):  # few blocks: preemption and swapping
        mode = rng.choice(("recompute", "swap"))
        manager = BlockManager(rng.randint(24, 40), 4, num_swap_blocks=64 if mode == "swap" else 0)
        requests = [(rng.randint(0, 40), RequestLengths(rng.randint(1, 30), rng.randint(1, 40)), ()) for _ in range(14)]
        _run(Scheduler(manager, rng.randint(1, 6), 64, preemption_mode=mode, policy=policy()), requests, name)
    _expect_fair(policy, name)
    _expect_same(_tokens(name, scheduling_policy=policy()), name)
    load = [(4 * i, RequestLengths(rng.randint(4, 90), rng.randint(4, 40)), ()) for i in range(80)]
    table = []
    for other in (policy, Chunked):
        scheduler = Scheduler(BlockManager(200, 4), 6, 96, policy=other())
        _, seconds, end = _run(scheduler, load, other.__name__)
        first = mean(times[1] - times[0] for times in seconds.values())
        gap = max(b - a for times in seconds.values() for a, b in pairwise(times[1:]))
        table.append(f"{first:.1f} s to the first token on average, longest gap {gap:.1f} s, {end:.0f} s in all")
    print(f"{name}: {table[0]}\nChunked: {table[1]}")


def _expect_fair(policy: type[Policy], name: str) -> None:
    small = [(place, RequestLengths(8, 8), ()) for place in range(300)]
    crowded = [*small, (5, RequestLengths(60, 20), ())]  # more than four seats can serve
    for requests, seats, num_blocks in ((crowded, 4, 100), (small, 256, 1200)):
        steps, *_ = _run(Scheduler(BlockManager(num_blocks, 4), seats, 64, policy=policy()), requests, name)
        arrivals = sorted((times[0], times[1]) for times in steps.values())
        for place, (arrived, first) in enumerate(arrivals):
            later = min((one for at, one in arrivals[place:] if at > arrived + MOST_STEPS), default=first)
            expect(
                later >= first,
                f"{name}: a request of step {arrived} is overtaken by one that came more than {MOST_STEPS} steps later",
            )
        gap = max(b - a for times in steps.values() for a, b in pairwise(times[1:]))
        expect(gap <= MOST_STEPS, f"{name}: a request that decodes waits {gap} steps for its next token")


def _judge_eviction(pool: type[BlockPool]) -> None:
    name, rates = pool.__name__, []
    for kind in (pool, BlockPool):
        manager = BlockManager(60, 4)
        manager.pool = kind(60)
        scheduler = Scheduler(manager, 4, 64)
        _run(scheduler, _conversations(), kind.__name__)
        rates.append(scheduler.stats.prefix_hit_tokens / scheduler.stats.prefix_query_tokens)

    def replace(llm: LLM) -> None:
        own = llm.engine.scheduler.manager
        own.pool = pool(own.pool.num_blocks)

    _expect_same(_tokens(name, replace), name)
    print(f"{name}: {rates[0]:.1%} of prompt tokens are prefix cache hits, least recently used: {rates[1]:.1%}")


def _conversations() -> list:
    """240 prompts, each after one of twelve beginnings; a few of these are far more frequent than the others."""
    rng = random.Random(2)
    prefixes = [tuple(2_000_000_000 + 100 * i + j for j in range(rng.choice((12, 24, 36)))) for i in range(12)]
    picked = rng.choices(prefixes, [1 / (1 + i) for i in range(12)], k=240)
    return [(3 * i, RequestLengths(len(p) + rng.randint(4, 12), rng.randint(2, 10)), p) for i, p in enumerate(picked)]


@contextmanager
def _registered(attend: Callable) -> Iterator[None]:
    """As the backend "capstone", which no longer exists afterwards."""
    register_attention_backend("capstone")(attend)
    try:
        yield
    finally:
        del ATTENTION_BACKENDS["capstone"]


def _judge_backend(attend: Callable) -> None:
    name, faults, seconds = getattr(attend, "__name__", "the backend"), [], {}

    def held(q, k_cache, v_cache, step, *, window):
        for width in {window, 7}:
            found = attend(q, k_cache, v_cache, step, window=width)
            right = paged_attention_reference(
                q,
                k_cache,
                v_cache,
                block_tables=step.block_tables,
                seq_lens=step.seq_lens,
                query_start_loc=step.query_start_loc,
                window=width,
            )
            rows = f"{len(q)} rows of {len(step.seq_lens)} sequences, window={width}"
            if not isinstance(found, torch.Tensor) or found.shape != right.shape:
                faults.append(f"{rows}: a tensor of shape {tuple(right.shape)} is asked for")
            elif not torch.allclose(found, right, atol=1e-4, rtol=1e-3):
                faults.append(f"{rows}: off by up to {(found - right).abs().max():.2g}")
        return right

    with _registered(held):
        _tokens(name, attention_backend="capstone", max_num_batched_tokens=40)
    expect(not faults, f"{name}: {faults[0] if faults else ''}")
    with _registered(attend):
        _expect_same(_tokens(name, attention_backend="capstone"), name)
        greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        for kind in ("capstone", "torch"):
            llm = LLM(dtype="float32", device=device.type, attention_backend=kind, num_blocks=64, max_model_len=128)
            prompts, times = [[token] * 20 for token in range(20, 24)], []
            for salt in range(4):  # the first is a warm-up
                start = perf_counter()
                llm.generate(prompts, greedy, use_tqdm=False, cache_salt=str(salt))
                times.append(perf_counter() - start)
            seconds[kind] = min(times[1:])
    rates = {kind: 4 * 40 / s for kind, s in seconds.items()}
    print(f"{name}: {rates['capstone']:,.0f} tokens/s, the reference: {rates['torch']:,.0f} tokens/s")

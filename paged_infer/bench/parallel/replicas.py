"""Two replicas and three routings, on requests that share long prefixes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from statistics import median

from paged_infer.async_llm import AsyncLLM
from paged_infer.bench.load import poisson_moments
from paged_infer.bench.metrics import Percentiles, TokenTimes
from paged_infer.bench.parallel.report import ParallelReport, RoutingReport
from paged_infer.bench.workloads import Workload
from paged_infer.params import SamplingParams

BEGINNINGS, SHARED, OWN, OUTPUT = 8, 256, 16, 32
POOL_BLOCKS = 160  # of 16 tokens: room for five prefixes and what runs
RATE_SHARE = 0.6


def shared_beginnings(vocab_size: int, num_requests: int, seed: int) -> Workload:
    """Each prompt is one of ``BEGINNINGS`` prefixes of ``SHARED`` random tokens, and ``OWN`` more tokens."""
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    beginnings = [draw(SHARED) for _ in range(BEGINNINGS)]
    prompts = [rng.choice(beginnings) + draw(OWN) for _ in range(num_requests)]
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    name = f"{num_requests} requests, each one of {BEGINNINGS} beginnings of {SHARED} tokens and {OWN} of its own"
    return Workload(name, prompts, [params] * num_requests, seed)


async def serve_async(llm: AsyncLLM, workload: Workload, moments_s: list[float]) -> tuple[list[TokenTimes], float]:
    """Submit each request at its time. Returns its token times, and the share of prompt tokens found in the caches."""
    before, began_s = llm.stats(), time.perf_counter()

    async def one(prompt: list[int], params: SamplingParams, at_s: float) -> TokenTimes:
        await asyncio.sleep(max(0.0, at_s - (time.perf_counter() - began_s)))
        times = TokenTimes(at_s, len(prompt), num_output=params.max_tokens)
        async for _ in llm.generate(prompt, params):
            times.token_s.append(time.perf_counter() - began_s)
        return times

    requests = zip(workload.prompts, workload.params, moments_s, strict=True)
    times = await asyncio.gather(*(one(*request) for request in requests))
    found, asked = (llm.stats()[name] - before[name] for name in ("prefix_hit_tokens", "prefix_query_tokens"))
    return times, found / max(1, asked)


async def measure_replicas(
    report: ParallelReport,
    replicas: dict[str, AsyncLLM],
    vocab_size: int,
    num_requests: int,
    seed: int,
    on_run: Callable[[str], None],
) -> None:
    """Fill in ``report.routings``, and shut the replicas down. The routings take turns, each time with new prefixes."""
    rates, waits, hits = ({name: list[float]() for name in replicas} for _ in range(3))
    for number in range(report.repeats + 1):  # the first warms up
        for name, llm in replicas.items():
            workload = shared_beginnings(vocab_size, num_requests, seed + 2 * number)
            times, _ = await serve_async(llm, workload, [0.0] * num_requests)
            rate = OUTPUT * num_requests / max(one.token_s[-1] for one in times)
            if number:
                rates[name].append(rate)
            elif not report.per_s:  # the first routing decides for all
                report.per_s = RATE_SHARE * rate / OUTPUT
            workload = shared_beginnings(vocab_size, num_requests, seed + 2 * number + 1)
            moments_s = poisson_moments(num_requests, report.per_s, seed)
            times, share = await serve_async(llm, workload, moments_s)
            if number:
                waits[name] += [one.ttft_s for one in times]
                hits[name].append(share)
            report.workload = workload.name
            on_run(name)
    for name in replicas:
        ttft_s = Percentiles.of(waits[name])
        assert ttft_s is not None
        report.routings[name] = RoutingReport(median(rates[name]), ttft_s, median(hits[name]))
        await replicas[name].shutdown()

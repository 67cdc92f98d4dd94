"""The engine on a workload, stepped directly and timed: all requests at once, closed loops, or arrivals."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import replace
from functools import partial

from paged_infer.bench.load import EngineSystem, poisson_moments, serve
from paged_infer.bench.metrics import Run, System
from paged_infer.bench.speed.step_spans import cpu_overhead_share, watch_steps
from paged_infer.bench.workloads import Workload
from paged_infer.engine.engine import LLMEngine
from paged_infer.llm import LLM
from paged_infer.simulation.workloads import WorkloadRequest


def run_engine(
    engine: LLMEngine, workload: Workload, arrive_s: ReadOnlyList[float] | None = None, num_clients: int | None = None
) -> Run:
    """Serve ``workload``: all at once, or each request at its second of ``arrive_s``, or from so many clients.

    The run's seconds are from the first arrival to the last token.
    """
    engine.reset_stats()
    before = replace(engine.scheduler.stats)
    server = EngineSystem(engine, workload=workload)
    moments = arrive_s or [0.0] * len(workload.prompts)
    arrivals = [
        WorkloadRequest(at_s, len(prompt), params.max_tokens or 0)
        for at_s, prompt, params in zip(moments, workload.prompts, workload.params, strict=True)
    ]
    with watch_steps(engine) as span_s:
        times = serve(server, arrivals, num_clients)
    stats = engine.scheduler.stats
    num_drafted = stats.num_draft_tokens - before.num_draft_tokens
    num_accepted = stats.num_accepted_tokens - before.num_accepted_tokens
    return Run(
        token_ids=[list(sequence.output_token_ids) for sequence in server.sequences],
        times=times,
        seconds=max(one.token_s[-1] for one in times) - min(one.arrived_s for one in times),
        usage=engine.usage,
        kv_bytes_per_token=engine.memory.kv_bytes_per_token,
        span_s=span_s,
        step_s=server.step_s,
        overhead_share=cpu_overhead_share(span_s) if engine.device.type == "cpu" else None,
        acceptance_rate=num_accepted / num_drafted if num_drafted else None,
        num_steps=stats.steps - before.steps,
    )


def watched_engine(llm: LLM) -> System:
    """The engine as a system: all requests at once."""
    return lambda workload: run_engine(llm.engine, workload)


def closed_loops(run: Callable[..., Run], clients: list[int], suffix: str = "") -> dict[str, System]:
    """``run`` with so many clients, each of which sends its next request when its last one has ended."""
    return {f"{n} client{'s' * (n > 1)}{suffix}": partial(run, num_clients=n) for n in clients}


def open_loops(run: Callable[..., Run], workload: Workload, rates: list[float], suffix: str = "") -> dict[str, System]:
    """``run`` with Poisson arrivals, so many a second, whether or not earlier requests have ended."""
    moments = {rate: poisson_moments(len(workload.prompts), rate, workload.seed) for rate in rates}
    return {f"{rate:.3g} a second{suffix}": partial(run, arrive_s=arrive_s) for rate, arrive_s in moments.items()}

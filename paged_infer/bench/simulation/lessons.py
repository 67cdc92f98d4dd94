"""Experiments with the simulator: ``python -m paged_infer.bench.simulation.lessons [NAME ...]``.

Each is a function that returns a table. All use Llama-3.1-8B's shape. Seconds are those of the data sheet's roofline:
compare them with each other, not with a real server.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Annotated

import typer

from paged_infer.bench.tables import print_table
from paged_infer.bench.workloads import nano_vllm_requests
from paged_infer.simulation.cards import CARDS, LINKS
from paged_infer.simulation.cluster import disaggregate, least_loaded, prefix_aware, round_robin, simulate_replicas
from paged_infer.simulation.costs import Roofline
from paged_infer.simulation.lengths import Dataset, ShortLogNormal
from paged_infer.simulation.memory import estimate_pool
from paged_infer.simulation.shapes import WEIGHT_BITS, ModelShape
from paged_infer.simulation.simulate import Run, SchedulerOptions, simulate
from paged_infer.simulation.times import quantile
from paged_infer.simulation.workloads import WorkloadRequest, dataset_like
from paged_infer.terminal import run_command

SHAPE = ModelShape.named("llama-3.1-8b")
RTX, H100 = Roofline(CARDS["rtx-4090"], SHAPE), Roofline(CARDS["h100"], SHAPE)
# As long as the records' chats: 857 tokens in and 653 out on average.
CHATS = Dataset("chats", ShortLogNormal(857, 1.0, 4096), ShortLogNormal(653, 0.8, 2048))
# Between what a run may show at worst and at best: a small model's kernels use a large card badly; launches cost time.
H200_ASSUMPTIONS = {
    "low": (0.8, 0.5, 1.2),
    "middle": (0.9, 0.8, 0.8),
    "high": (0.9, 0.8, 0.4),
    "sheet": (0.9, 0.8, 0.0),
}
SMALL_POOL = SchedulerOptions(num_blocks=2588, watermark=0.0)


@dataclass(frozen=True, slots=True)
class Lesson:
    """A table: the first column is text, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def chats(num_requests: int, per_s: float) -> list[WorkloadRequest]:
    return dataset_like(CHATS, num_requests, per_s)


def gaps_s(run: Run) -> list[float]:
    """Between tokens, sorted."""
    return sorted(gap for one in run.times for gap in one.gaps_s)


def ttft_s(run: Run) -> float:
    return mean(one.ttft_s for one in run.times)


def tpot_s(run: Run) -> float:
    return mean(one.tpot_s for one in run.times if one.tpot_s is not None)


def pool_and_watermark(num_requests: int = 150) -> Lesson:
    """A quarter of the pool, or the watermark, changes the result more than a tenth of the bandwidth does."""
    workload, base = chats(num_requests, 10.0), simulate(chats(num_requests, 10.0), SMALL_POOL, RTX)
    others = {
        "0.8 of the bandwidth instead of 0.9": (SMALL_POOL, replace(RTX, share_of_bandwidth=0.8)),
        "1.5 ms more a step": (SMALL_POOL, replace(RTX, step_overhead_s=1.5e-3)),
        "a quarter more blocks": (replace(SMALL_POOL, num_blocks=3235), RTX),
        "a quarter fewer blocks": (replace(SMALL_POOL, num_blocks=1941), RTX),
        "watermark 0.02 instead of 0": (replace(SMALL_POOL, watermark=0.02), RTX),
    }
    rows = []
    for name, (options, cost) in others.items():
        run = simulate(workload, options, cost)
        changes = (run.makespan_s / base.makespan_s, ttft_s(run) / ttft_s(base), tpot_s(run) / tpot_s(base))
        rows.append((name, *(f"{change - 1:+.1%}" for change in changes), str(run.preemptions)))
    title = f"RTX 4090, 10 requests a second, 2,588 blocks ({base.preemptions} preemptions): what changes"
    return Lesson(title, ("", "makespan", "ttft", "tpot", "preemptions"), rows)


def saturation(num_requests: int = 200) -> Lesson:
    """If steps are a tenth slower than assumed, near saturation first tokens are late by far more than a tenth."""
    slow, rows = replace(RTX, share_of_bandwidth=0.81, share_of_peak=0.72), []
    for per_s in (0.5, 1.0, 1.5, 2.0, 3.0, 10.0):
        runs = [simulate(chats(num_requests, per_s), SMALL_POOL, cost) for cost in (RTX, slow)]
        changes = [measure(runs[1]) / measure(runs[0]) - 1 for measure in (lambda r: r.makespan_s, ttft_s, tpot_s)]
        rows.append((f"{per_s:g} a second", f"{ttft_s(runs[0]):.2f}", *(f"{change:+.0%}" for change in changes)))
    return Lesson("RTX 4090, steps 11 % slower", ("", "ttft, s", "makespan", "ttft", "tpot"), rows)


def chunk_budget(num_requests: int = 150) -> Lesson:
    """Smaller chunks of prompts stall decodes for a shorter time, but delay first tokens."""
    rows, options = [], SchedulerOptions(num_blocks=20_000)
    for budget in (256, 512, 1024, 2048, 8192):
        run = simulate(chats(num_requests, 8.0), replace(options, max_num_batched_tokens=budget), H100)
        gaps = gaps_s(run)
        numbers = (1e3 * quantile(gaps, 0.5), 1e3 * quantile(gaps, 0.99), 1e3 * gaps[-1], 1e3 * ttft_s(run))
        rows.append((f"{budget} tokens a step", *(f"{ms:.1f}" for ms in numbers), f"{run.tokens_per_s:,.0f}"))
    header = ("", "gap p50, ms", "gap p99", "longest", "ttft mean, ms", "tokens/s")
    return Lesson("H100, 8 requests a second", header, rows)


def prefill_apart(num_requests: int = 150) -> Lesson:
    """Two cards, as replicas, or one for prompts and one for decodes. The latter shortens the longest gaps."""
    options, rows = SchedulerOptions(num_blocks=20_000), []
    kv_bytes = H100.kv_bytes_per_token
    for per_s in (4.0, 16.0):
        workload = chats(num_requests, per_s)
        runs = {"two replicas": simulate_replicas(workload, options, [H100, H100], least_loaded)}
        for link in ("nvlink-4", "pcie-5"):
            rate = LINKS[link].bytes_per_s
            runs[f"apart, {link}"] = disaggregate(workload, options, H100, H100, kv_bytes, rate)
        for name, run in runs.items():
            gaps = gaps_s(run)
            numbers = (1e3 * quantile(gaps, share) for share in (0.5, 0.99, 0.999))
            times = (*(f"{ms:.1f}" for ms in numbers), f"{1e3 * ttft_s(run):.0f}", f"{run.tokens_per_s:,.0f}")
            rows.append((f"{per_s:g} a second, {name}", *times))
    header = ("", "gap p50, ms", "gap p99", "gap p99.9", "ttft mean, ms", "tokens/s")
    return Lesson("two H100", header, rows)


def shared_prefixes(num_requests: int, per_s: float, num_prefixes: int = 40) -> list[WorkloadRequest]:
    """Each prompt is one of ``num_prefixes`` prefixes of 2,048 tokens, and a question of its own."""
    rng, requests = random.Random(0), []
    for index, one in enumerate(dataset_like(CHATS, num_requests, per_s)):
        ids = (rng.randrange(num_prefixes),) * 2048 + (1000 + index,) * 64
        requests.append(WorkloadRequest(one.at_s, len(ids), max(1, one.num_output // 8), ids))
    return requests


def routing(num_requests: int = 300) -> Lesson:
    """Four replicas whose pools hold some of the prefixes each: routing decides what is computed twice."""
    workload, options = shared_prefixes(num_requests, 25.0), SchedulerOptions(num_blocks=2588)
    rows = []
    for name, route in (("round robin", round_robin()), ("least loaded", least_loaded), ("prefix-aware", prefix_aware)):
        run = simulate_replicas(workload, options, [RTX] * 4, route)
        hits = run.prefix_hit_tokens / sum(one.num_prompt for one in workload)
        late = quantile(sorted(one.ttft_s for one in run.times), 0.99)
        rows.append((name, f"{hits:.0%}", f"{1e3 * ttft_s(run):.0f}", f"{1e3 * late:.0f}", f"{run.tokens_per_s:,.0f}"))
    header = ("", "prompt tokens\nfound", "ttft mean, ms", "ttft p99", "tokens/s")
    return Lesson("four RTX 4090, 40 prefixes of 2,048 tokens", header, rows)


def tensor_or_data_parallel(num_requests: int = 120) -> Lesson:
    """Two cards share each layer (low latency, if the link is fast), or each serves half of the requests."""
    rows = []
    for per_s in (1.0, 20.0):
        workload = chats(num_requests, per_s)
        options = SchedulerOptions(num_blocks=20_000)
        runs = {"data parallel": simulate_replicas(workload, options, [H100] * 2, least_loaded)}
        for link in ("nvlink-4", "pcie-5"):
            pair = replace(H100, tensor_parallel=2, link=LINKS[link])
            runs[f"tensor parallel, {link}"] = simulate(workload, replace(options, num_blocks=40_000), pair)
        for name, run in runs.items():
            times = (f"{1e3 * tpot_s(run):.1f}", f"{1e3 * ttft_s(run):.0f}", f"{run.tokens_per_s:,.0f}")
            rows.append((f"{per_s:g} a second, {name}", *times))
    return Lesson("two H100", ("", "tpot mean, ms", "ttft mean, ms", "tokens/s"), rows)


def few_bits(num_requests: int = 150) -> Lesson:
    """Fewer bits mean fewer bytes to read, and also more blocks: requests queue less on a small card, and fewer are
    preempted."""
    rows = []
    for name, bits, kind in (
        ("bfloat16", None, "auto"),
        ("int8 KV", None, "int8"),
        ("W4A16", "w4a16", "auto"),
        ("W4A16, int8 KV", "w4a16", "int8"),
    ):
        kv_bytes = SHAPE.kv_element_bytes(kind, 2)
        cost = replace(RTX, weight_bits=None if bits is None else WEIGHT_BITS[bits], kv_bytes=kv_bytes)
        pool = estimate_pool(cost, max_num_seqs=256, max_num_batched_tokens=2048)
        run = simulate(chats(num_requests, 10.0), replace(SMALL_POOL, num_blocks=pool.num_blocks), cost)
        fixed = simulate(chats(num_requests, 10.0), SMALL_POOL, cost)
        numbers = (f"{pool.num_blocks:,}", f"{run.preemptions}", f"{run.tokens_per_s:,.0f}", f"{ttft_s(run):.1f}")
        rows.append((name, *numbers, f"{fixed.tokens_per_s:,.0f}"))
    header = ("", "blocks", "preemptions", "tokens/s", "ttft mean, s", "tokens/s with\n2,588 blocks")
    return Lesson("RTX 4090, 10 requests a second", header, rows)


def h200_throughput() -> Lesson:
    """The throughput workload of ``make gpu``, predicted before any run: 256 requests, Qwen3-0.6B's shape."""
    drawn = nano_vllm_requests(vocab_size=151_936)
    workload = [
        WorkloadRequest(0.0, len(prompt), params.max_tokens or 1)
        for prompt, params in zip(drawn.prompts, drawn.params, strict=True)
    ]
    shape, rows = ModelShape.named("qwen3-0.6b"), []
    for name, (bandwidth, peak, overhead_ms) in H200_ASSUMPTIONS.items():
        cost = Roofline(
            CARDS["h200"], shape, share_of_bandwidth=bandwidth, share_of_peak=peak, step_overhead_s=overhead_ms / 1e3
        )
        pool = estimate_pool(cost, max_num_seqs=256, max_num_batched_tokens=8192)
        options = SchedulerOptions(num_blocks=pool.num_blocks, max_num_batched_tokens=8192)
        run = simulate(workload, options, cost)
        assumed = (f"{bandwidth:g}", f"{peak:g}", f"{overhead_ms:g}")
        rows.append((name, *assumed, f"{run.makespan_s:.2f}", f"{run.tokens_per_s:,.0f}", f"{run.num_steps:,}"))
    header = ("", "of bandwidth", "of peak", "ms more a step", "seconds", "tokens/s", "steps")
    return Lesson("H200, all requests at once", header, rows)


LESSONS: dict[str, Callable[..., Lesson]] = {
    one.__name__: one
    for one in (
        pool_and_watermark,
        saturation,
        chunk_budget,
        prefill_apart,
        routing,
        tensor_or_data_parallel,
        few_bits,
        h200_throughput,
    )
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(LESSONS)}. Default: all.")] = None,
) -> None:
    """Print the tables of these experiments."""
    if unknown := [name for name in names or () if name not in LESSONS]:
        raise typer.BadParameter(f"{unknown[0]!r}: no such lesson; known: {', '.join(LESSONS)}")
    for name in names or LESSONS:
        lesson = LESSONS[name]()
        print_table(f"{name}: {lesson.title}", lesson.header, lesson.rows)


if __name__ == "__main__":
    run_command(main)

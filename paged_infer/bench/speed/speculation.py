"""Speculative decoding measured: the same texts without drafts, with prompt lookup, and with a draft model.

Whatever the drafts, in float32 every run gives the same tokens as the run without drafts, sampled ones included (see
``control.speculation``), so the runs are compared token for token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from paged_infer.bench.metrics import System
from paged_infer.bench.speed.engine_runs import watched_engine
from paged_infer.bench.speed.measure import Bench, Entry, SpeedReport, run_warm_ups
from paged_infer.bench.speed.rounds import Runs
from paged_infer.bench.workloads import Workload
from paged_infer.llm import LLM

PLAIN = "no drafts"


def open_texts(workload: Workload, max_tokens: int, temperature: float) -> Workload:
    """``workload``'s prompts, with exactly ``max_tokens`` to generate for each, by seeds of their own."""
    params = [
        replace(one, temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=index)
        for index, one in enumerate(workload.params)
    ]
    name = f"beginnings of texts, {max_tokens} tokens to follow each, temperature {temperature:g}"
    return Workload(name, workload.prompts, params, workload.seed)


def measure_speculation(
    bench: Bench, engines: Mapping[str, LLM], workload: Workload, batches: list[int]
) -> SpeedReport:
    """The first so many requests of ``workload`` at once, for each of ``batches``, on each engine; interleaved.

    Args:
        engines: by the names of their methods; ``PLAIN`` is one of them, and the others are held to its tokens.
    """
    systems = {name: watched_engine(llm) for name, llm in engines.items()}
    entries: list[Entry] = []
    for number, size in enumerate(batches):
        requests = replace(workload, prompts=workload.prompts[:size], params=workload.params[:size])
        run_warm_ups(systems, requests)
        for system in systems.values():
            system(requests.sample(size, 8))
        report_of = partial(_report, bench, systems, requests, entries[:])
        runs = bench.interleave(systems, requests, report_of, num_phases=len(batches) - number)
        entries = report_of(runs).entries
    return bench.report("speculation", workload, None, entries)


def _report(
    bench: Bench, systems: Mapping[str, System], requests: Workload, before: list[Entry], runs: Runs
) -> SpeedReport:
    size = len(requests.prompts)
    compared = bench.compare(systems, requests, runs)
    entries = [
        Entry.of(
            f"{name}, {size} at once",
            its_runs,
            requests,
            bench.floor(requests) if name == PLAIN else None,  # drafting may go below it
            compared=compared.get(name),
            load=float(size),
            series=name,
        )
        for name, its_runs in runs.items()
        if its_runs
    ]
    return bench.report("speculation", requests, None, before + entries)

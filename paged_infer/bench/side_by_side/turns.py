"""``bench peers``: engines on the same weights and token ids, each in a process of its own, taking turns.

A run beside which other processes were busy is repeated. Medians are over the runs that were not disturbed, or over
all if each was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from paged_infer.bench.metrics import System
from paged_infer.bench.peers.processes import watch_others
from paged_infer.bench.report import JsonReport
from paged_infer.bench.speed.rounds import nothing
from paged_infer.bench.tables import print_table
from paged_infer.bench.workloads import Workload, one_request, random_ids

BUSY_CORES, TRIES = 0.2, 3  # a run with more beside it is repeated, so often in all


def workloads(vocab_size: int, scale: float, seed: int) -> dict[str, Workload]:
    """a: one request. b: 32 at once. c: a long prompt and its first token. ``scale``: of all lengths."""
    short, long, longest = (max(2, round(n * scale)) for n in (16, 128, 1500))
    return {
        "a": one_request(vocab_size, long, long, seed),
        "b": random_ids(vocab_size, 32, short, long, seed),
        "c": one_request(vocab_size, longest, 1, seed),
    }


@dataclass(frozen=True, slots=True)
class TimedRun:
    seconds: float
    others_cores: float | None

    @property
    def is_disturbed(self) -> bool:
        return self.others_cores is not None and self.others_cores > BUSY_CORES


@dataclass(slots=True)
class PeerResult:
    """``equal``: of each workload, the requests with the tokens of the first system, as a share."""

    runs: dict[str, list[TimedRun]] = field(default_factory=dict)
    equal: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None

    def seconds(self, workload: str) -> float:
        runs = self.runs[workload]
        return median(run.seconds for run in [run for run in runs if not run.is_disturbed] or runs)


@dataclass(slots=True)
class PeersReport(JsonReport):
    """``output_tokens``: of each workload. ``left_out``: why. ``own_benches``: tokens/s of llama.cpp's benches."""

    model: str
    workloads: dict[str, str]
    output_tokens: dict[str, int]
    peers: dict[str, PeerResult]
    left_out: dict[str, str]
    own_benches: dict[str, float]
    machine: dict[str, Any]


def take_turns(
    systems: Mapping[str, System],
    given: Mapping[str, Workload],
    repeats: int,
    on_run: Callable[[str], None] = nothing,
    on_failure: Callable[[str, str], None] = lambda *_: None,
) -> dict[str, PeerResult]:
    """Each system once unclocked on each workload, then rounds, every second one in the opposite order.

    A system that fails is left out from then on, with all its runs; ``on_failure`` gets its name and the reason.
    """
    results: dict[str, PeerResult] = {}
    reference: dict[str, list[list[int]]] = {}
    for name, system in systems.items():
        result = PeerResult()
        try:
            for key, workload in given.items():
                ids = system(workload).token_ids
                expected = reference.setdefault(key, ids)
                result.equal[key] = sum(map(list.__eq__, ids, expected)) / len(ids)
        except ValueError as error:
            on_failure(name, str(error))
            continue
        results[name] = result
    for number in range(repeats):
        for key, workload in given.items():
            for name in list(results)[:: -1 if number % 2 else 1]:
                try:
                    _timed(systems[name], results[name], key, workload)
                except ValueError as error:
                    on_failure(name, str(error))
                    del results[name]
                on_run(f"{key}: {name}")
    return results


def _timed(system: System, result: PeerResult, key: str, workload: Workload) -> None:
    for attempt in range(TRIES):
        with watch_others() as others:
            run = system(workload)
        wanted = [params.max_tokens for params in workload.params]
        if run.num_outputs != wanted:
            raise ValueError(f"{workload.name}: {run.num_tokens} tokens instead of {sum(n or 0 for n in wanted)}")
        timed = TimedRun(run.seconds, others.cores)
        result.runs.setdefault(key, []).append(timed)
        result.peak_bytes = max(result.peak_bytes or 0, run.peak_bytes or 0) or None
        if not timed.is_disturbed:
            break
        if attempt + 1 < TRIES:
            time.sleep(0.5)


def print_peers(report: PeersReport) -> None:
    header = ["", "a: tokens/s", "b: tokens/s", "c: first token, s", "peak memory, GB", "others, cores", "same tokens"]
    rows = []
    for name, one in report.peers.items():
        rates = [f"{report.output_tokens[key] / one.seconds(key):.1f}" for key in ("a", "b")]
        beside = [run.others_cores for runs in one.runs.values() for run in runs if run.others_cores is not None]
        memory = "-" if one.peak_bytes is None else f"{one.peak_bytes / 1e9:.2f}"
        shares = " ".join(f"{share:.0%}" for share in one.equal.values())
        rows.append(
            [name, *rates, f"{one.seconds('c'):.3f}", memory, f"{median(beside):.1f}" if beside else "-", shares]
        )
    print_table(f"{report.model}: " + "; ".join(f"{k}: {v}" for k, v in report.workloads.items()), header, rows)
    for name, rate in report.own_benches.items():
        print(f"{name}, decoding alone: {rate:.1f} tokens/s")
    for name, reason in report.left_out.items():
        print(f"left out: {name}: {reason}")
    runs = [run for one in report.peers.values() for key in one.runs.values() for run in key]
    if num_disturbed := sum(run.is_disturbed for run in runs):
        print(f"{num_disturbed} of {len(runs)} runs had more than {BUSY_CORES} cores busy with other processes")

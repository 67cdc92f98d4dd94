"""The server over HTTP beside ``LLM.generate`` and a server of one request at a time, on one workload.

this process                 a process                       a process each
------------                 ---------                       --------------
LLM.generate                 http_load: asyncio, httpx  -->  paged-infer serve
one after the other     -->  (when did what come?)      -->  naive_server
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from paged_infer.bench.http.client import Job, Replies, ask
from paged_infer.bench.load import poisson_moments
from paged_infer.bench.machine import describe_machine
from paged_infer.bench.metrics import Percentiles, Run, System, TokenTimes
from paged_infer.bench.speed.baselines import our_baselines
from paged_infer.bench.speed.measure import CHECKED_TOKENS, Bench, Entry, SpeedReport, gave_all, interleave, lengths
from paged_infer.bench.workloads import Workload

OFFLINE = "LLM.generate"
SERVER, STREAMED, ARRIVALS = "the server", "the server, streaming", "Poisson arrivals, streaming"
_RUNS = itertools.count()


@contextmanager
def client_process() -> Iterator[Executor]:
    """One process that asks, for all runs."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@dataclass(frozen=True, slots=True)
class HttpSystem:
    """A server that listens at ``url``, and the process that asks it."""

    client: Executor
    url: str
    model: str
    api_key: str | None = None

    def run(
        self, workload: Workload, *, stream: bool, num_clients: int | None = None, arrive_s: list[float] | None = None
    ) -> Run:
        """Raises ValueError if the server refuses a request, or stops answering."""
        job = Job(self.url, self.api_key, self._bodies(workload, stream), num_clients, arrive_s)
        return _run(self.client.submit(ask, job).result(), workload, is_whole=not stream)

    def _bodies(self, workload: Workload, stream: bool) -> list[dict[str, Any]]:
        salt = f"run {next(_RUNS)}"  # what an earlier run left in the prefix cache is no merit
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return [
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": params.max_tokens,
                "temperature": params.temperature,
                "ignore_eos": params.ignore_eos,
                "cache_salt": salt,
                **streamed,
            }
            for prompt, params in zip(workload.prompts, workload.params, strict=True)
        ]


def _run(answered: Replies, workload: Workload, is_whole: bool) -> Run:
    replies = answered.replies
    begin_s = min(reply.arrived_s for reply in replies)
    times = [
        TokenTimes(
            reply.arrived_s - begin_s, len(prompt), [reply.first_s - begin_s, reply.end_s - begin_s], reply.num_output
        )
        for reply, prompt in zip(replies, workload.prompts, strict=True)
    ]
    return Run(
        token_ids=[],
        times=times,
        seconds=max(one.token_s[-1] for one in times),
        texts=[reply.text for reply in replies],
        is_whole=is_whole,
        loop_delay_s=bounds(answered.loop_delays),
    )


def bounds(counts: Mapping[float, int]) -> Percentiles | None:
    """Of values of which is known how many lie up to each bound, the percentiles' bounds; None where there are none.

    >>> bounds({0.001: 98, 0.01: 1, 0.1: 1})
    Percentiles(p50=0.001, p90=0.001, p99=0.01)
    """
    return Percentiles.of(bound for bound in sorted(counts) for _ in range(counts[bound]))


@dataclass(slots=True)
class HttpBench:
    """Closed loops, then open ones. ``expected``: the texts that everybody has to give; None where nobody knows."""

    target: HttpSystem
    workload: Workload
    repeats: int
    on_run: Callable[[str], None]
    bench: Bench | None = None  # the same model in this process; None with a server that ran before
    naive: tuple[str, HttpSystem] | None = None  # its name, and where it is
    expected: list[str] | None = None

    def report(self, clients: list[int], rates: list[float] | None, rate_shares: list[float]) -> SpeedReport:
        """Of ``LLM.generate``, of each number of clients, of each rate.

        Args:
            rates: arrivals a second; None: ``rate_shares`` of what the most clients were served at.
        """
        entries = self._entries(clients, rates, rate_shares)
        if self.bench is not None:
            return self.bench.report("serve", self.workload, None, entries)
        prompts, outputs = lengths(self.workload)
        return SpeedReport(
            command="serve",
            model=self.target.model,
            dtype="as served",
            load_format="auto",
            workload=self.workload.name,
            num_prompt_tokens=sum(prompts),
            num_output_tokens=sum(outputs),
            seed=self.workload.seed,
            repeats=self.repeats,
            machine=describe_machine(),
            roofline=None,
            floor=None,
            entries=entries,
        )

    def _entries(self, clients: list[int], rates: list[float] | None, rate_shares: list[float]) -> list[Entry]:
        """The naive server's runs are not repeated: they take long, and nothing is near them."""
        warm = self.workload.sample(max(clients), CHECKED_TOKENS)
        for target in [self.target, *([self.naive[1]] if self.naive else [])]:
            target.run(warm, stream=False, num_clients=max(clients))
        offline: dict[str, System] = {}
        if self.bench is not None:
            offline[OFFLINE] = our_baselines(self.bench.llm)["paged"]
            outputs = self.bench.llm.generate(self.workload.prompts, self.workload.params, use_tqdm=False)
            if self.bench.llm.tokenizer is not None:
                self.expected = [output.outputs[0].text for output in outputs]
        whole = self._closed(self.target, clients, "", stream=False)
        streamed = self._closed(self.target, clients, ", streaming", stream=True)
        runs = interleave({**offline, **whole, **streamed}, self.workload, self.repeats, self.on_run)
        entries = [self._entry(name, runs[name]) for name in offline]
        for series, names in ((SERVER, whole), (STREAMED, streamed)):
            for name, num_clients in zip(names, clients, strict=True):
                entries.append(self._entry(name, runs[name], float(num_clients), series))
        served_per_s = len(self.workload.prompts) / entries[-1].metrics.seconds
        if self.naive is not None:
            rung, target = self.naive
            slow = self._closed(target, clients, f", {rung}", stream=False)
            its_runs = interleave(slow, self.workload, 1, self.on_run)
            for name, num_clients in zip(slow, clients, strict=True):
                entries.append(self._entry(name, its_runs[name], float(num_clients), rung))
        return entries + self._arrivals(rates or [share * served_per_s for share in rate_shares])

    def _arrivals(self, rates: list[float]) -> list[Entry]:
        per_s = {f"{rate:.3g} a second, streaming": rate for rate in rates}
        opened: dict[str, System] = {}
        for name, rate in per_s.items():
            moments = poisson_moments(len(self.workload.prompts), rate, self.workload.seed)
            opened[name] = partial(self.target.run, stream=True, arrive_s=moments)
        runs = interleave(opened, self.workload, self.repeats, self.on_run)
        return [self._entry(name, runs[name], rate, ARRIVALS) for name, rate in per_s.items()]

    def _closed(self, target: HttpSystem, clients: list[int], suffix: str, *, stream: bool) -> dict[str, System]:
        return {
            f"{n} client{'s' * (n > 1)}{suffix}": partial(target.run, stream=stream, num_clients=n) for n in clients
        }

    def _entry(self, name: str, runs: list[Run], load: float | None = None, series: str = "") -> Entry:
        """An open loop waits for arrivals: it has no floor."""
        floor = None
        if self.bench is not None and series != ARRIVALS:
            floor = self.bench.floor(self.workload, None if load is None else int(load))
        same = None
        if self.expected is not None and series:
            same = all(run.texts == self.expected for run in runs)
        right = gave_all(runs, self.workload)
        return Entry.of(name, runs, floor, same_counts=right, same_tokens=same, load=load, series=series)

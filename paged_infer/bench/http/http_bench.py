"""The server over HTTP compared to ``LLM.generate`` and to a server of one request at a time, on one workload.

this process                 a process                       a process each
------------                 ---------                       --------------
LLM.generate                 client: asyncio, httpx     -->  paged-infer serve
one run after the other -->  (when did which token come) ->  paged-infer serve --max-num-seqs 1
                                                         ->  paged-infer serve --engine-process
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
from paged_infer.bench.metrics import Percentiles, Run, System, TokenTimes
from paged_infer.bench.speed.baselines import our_baselines
from paged_infer.bench.speed.engine_runs import closed_loops, open_loops
from paged_infer.bench.speed.measure import CHECKED_TOKENS, Bench, Entry, SpeedReport, lengths
from paged_infer.bench.speed.rounds import interleave
from paged_infer.bench.workloads import Workload, user_message
from paged_infer.execution.machine import describe_machine
from paged_infer.llm import LLM
from paged_infer.outputs import RequestOutput
from paged_infer.text.reasoning_parsers import ReasoningParser

OFFLINE = "LLM.generate"
SERVER, STREAMED, ARRIVALS = "the server", "the server, streaming", "Poisson arrivals, streaming"
ONE_AT_A_TIME = "one request at a time"
IN_PROCESS, IN_PROCESS_STREAMED = "the engine in a process of its own", "the engine in a process of its own, streaming"
_RUNS = itertools.count()


@contextmanager
def client_process() -> Iterator[Executor]:
    """One process for the clients of all runs."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@dataclass(frozen=True, slots=True)
class HttpSystem:
    """A server that listens at ``url``, and the process of its clients."""

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
        salt = f"run {next(_RUNS)}"  # no prefix of an earlier run is found in the cache
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        asked: list[dict[str, Any]] = [{"prompt": prompt} for prompt in workload.prompts]
        if workload.texts:
            asked = [{"messages": [user_message(text)]} for text in workload.texts]
        return [
            {
                "model": self.model,
                **prompt,
                "max_tokens": params.max_tokens,
                "temperature": params.temperature,
                "ignore_eos": params.ignore_eos,
                "cache_salt": salt,
                **({} if budget is None else {"thinking_token_budget": budget}),
                **streamed,
            }
            for prompt, params in zip(asked, workload.params, strict=True)
            for budget in (params.thinking_token_budget,)
        ]


def _run(answered: Replies, workload: Workload, is_whole: bool) -> Run:
    replies = answered.replies
    begin_s = min(reply.arrived_s for reply in replies)
    times = [
        TokenTimes(
            reply.arrived_s - begin_s,
            len(prompt) if reply.num_prompt is None else reply.num_prompt,
            [reply.first_s - begin_s, reply.end_s - begin_s],
            reply.num_output,
            *(None if at is None else at - begin_s for at in (reply.reasoned_s, reply.content_s)),
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


def joined_text(llm: LLM, output: RequestOutput, is_chat: bool) -> str:
    """The text of an answer as a ``Reply`` has it: a chat's reasoning and content come without the markers."""
    first, text = llm.engine.input_processor.reasoning_start(output.prompt_token_ids), output.outputs[0].text
    if first is None or not is_chat:
        return text
    found = ReasoningParser(first).finish(text)
    return found.reasoning + found.content


def bounds(counts: Mapping[float, int]) -> Percentiles | None:
    """The bounds of the percentiles of a histogram, {upper bound: count}; None if it is empty.

    >>> bounds({0.001: 98, 0.01: 1, 0.1: 1})
    Percentiles(p50=0.001, p90=0.001, p99=0.01)
    """
    return Percentiles.of(bound for bound in sorted(counts) for _ in range(counts[bound]))


@dataclass(slots=True)
class HttpBench:
    """Closed loops, then open ones. ``expected``: the texts that every system has to give; None: not known."""

    target: HttpSystem
    workload: Workload
    repeats: int
    on_run: Callable[[str], None]
    bench: Bench | None = None  # the same model in this process; None with a server that ran before
    one_at_a_time: HttpSystem | None = None
    expected: list[str] | None = None
    engine_process: HttpSystem | None = None  # the same server with the engine in a process of its own
    num_prompt_tokens: int = 0  # as the server counts them, after the first runs

    def report(self, clients: list[int], rates: list[float] | None, rate_shares: list[float]) -> SpeedReport:
        """Entries for ``LLM.generate``, for each number of clients and for each rate.

        Args:
            rates: arrivals a second; None: ``rate_shares`` of the rate at which the most clients were served.
        """
        entries = self._entries(clients, rates, rate_shares)
        if self.bench is not None:
            return self.bench.report("serve", self.workload, None, entries)
        workload, (_, outputs) = self.workload, lengths(self.workload)
        return SpeedReport(
            "serve", self.target.model, "as served", "auto", workload.name, self.num_prompt_tokens, sum(outputs),
            workload.seed, self.repeats, describe_machine(), entries=entries,
        )  # fmt: skip

    def _entries(self, clients: list[int], rates: list[float] | None, rate_shares: list[float]) -> list[Entry]:
        """The runs of one request at a time are not repeated: they take long, and nothing is close to them."""
        warm = self.workload.sample(max(clients), CHECKED_TOKENS)
        for target in filter(None, (self.target, self.engine_process, self.one_at_a_time)):
            target.run(warm, stream=False, num_clients=max(clients))
        offline: dict[str, System] = {}
        if self.bench is not None:
            offline[OFFLINE] = our_baselines(self.bench.llm)["paged"]
            outputs = self.bench.llm.generate(self.workload.prompts, self.workload.params, use_tqdm=False)
            if self.bench.llm.tokenizer is not None:
                is_chat = bool(self.workload.texts)
                self.expected = [joined_text(self.bench.llm, output, is_chat) for output in outputs]
        run, stream = partial(self.target.run, stream=False), partial(self.target.run, stream=True)
        whole, streamed = closed_loops(run, clients), closed_loops(stream, clients, ", streaming")
        apart: dict[str, dict[str, System]] = {}
        if self.engine_process is not None:
            run = partial(self.engine_process.run, stream=False)
            apart[IN_PROCESS] = closed_loops(run, clients, ", engine process")
            run = partial(self.engine_process.run, stream=True)
            apart[IN_PROCESS_STREAMED] = closed_loops(run, clients, ", engine process, streaming")
        systems = {**offline, **whole, **streamed}
        for named in apart.values():
            systems |= named
        runs = interleave(systems, self.workload, self.repeats, self.on_run)
        self.num_prompt_tokens = sum(one.num_prompt for one in runs[next(iter(whole))][0].times)
        entries = [self._entry(name, runs[name]) for name in offline]
        for series, names in ((SERVER, whole), (STREAMED, streamed)):
            entries += [self._entry(name, runs[name], n, series) for name, n in zip(names, clients, strict=True)]
        served_per_s = len(self.workload.prompts) / entries[-1].metrics.seconds
        for series, named in apart.items():
            entries += [self._entry(name, runs[name], n, series) for name, n in zip(named, clients, strict=True)]
        if self.one_at_a_time is not None:
            slow = closed_loops(partial(self.one_at_a_time.run, stream=False), clients, f", {ONE_AT_A_TIME}")
            runs = interleave(slow, self.workload, 1, self.on_run)
            entries += [self._entry(name, runs[name], n, ONE_AT_A_TIME) for name, n in zip(slow, clients, strict=True)]
        rates = rates or [share * served_per_s for share in rate_shares]
        opened = open_loops(stream, self.workload, rates, ", streaming")
        runs = interleave(opened, self.workload, self.repeats, self.on_run)
        return entries + [self._entry(name, runs[name], r, ARRIVALS) for name, r in zip(opened, rates, strict=True)]

    def _entry(self, name: str, runs: list[Run], load: float | None = None, series: str = "") -> Entry:
        """An open loop waits for arrivals: it has no floor."""
        floor = same = None
        if self.bench is not None and series != ARRIVALS:
            floor = self.bench.floor(self.workload, None if load is None else int(load))
        if self.expected is not None and series:
            same = all(run.texts == self.expected for run in runs)
        load = None if load is None else float(load)
        return Entry.of(name, runs, self.workload, floor, same_tokens=same, load=load, series=series)

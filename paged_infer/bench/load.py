"""Requests that arrive one after the other, served by an engine or by a simulated one, and the times of their tokens.

trace  ---->  serve  ---->  EngineSystem        a model, in real time
               ^   \\---->  simulation Server  the real Scheduler, and a clock that a cost model advances
               |
          TokenTimes of each request
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import replace
from itertools import accumulate, count
from typing import TYPE_CHECKING

from paged_infer.bench.metrics import TokenTimes
from paged_infer.control.reasoning import ReasoningMatcher
from paged_infer.control.sequence import Sequence
from paged_infer.params import SamplingParams
from paged_infer.simulation.simulate import Server
from paged_infer.simulation.workloads import WorkloadRequest

if TYPE_CHECKING:
    from paged_infer.bench.workloads import Workload
    from paged_infer.engine.engine import LLMEngine

_RUNS = count()


def poisson_arrivals(
    num_requests: int, per_s: float, prompts: tuple[int, int], outputs: tuple[int, int], seed: int
) -> list[WorkloadRequest]:
    """Poisson arrivals, ``per_s`` a second; lengths uniform in the ranges."""
    rng = random.Random(seed)
    arrivals, now = [], 0.0
    for _ in range(num_requests):
        now += rng.expovariate(per_s)
        arrivals.append(WorkloadRequest(now, rng.randint(*prompts), rng.randint(*outputs)))
    return arrivals


def poisson_moments(num_requests: int, per_s: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process of ``per_s`` requests a second."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(per_s) for _ in range(num_requests)))


class EngineSystem:
    """A model in real time: greedy on random prompts that share no prefix, or on the requests of ``workload``."""

    def __init__(self, engine: LLMEngine, seed: int = 0, workload: Workload | None = None) -> None:
        self.engine = engine
        self.sequences: list[Sequence] = []
        self.step_s: list[float] = []  # on its clock, when each step returned
        self._rng = random.Random(seed)
        self._requests = None if workload is None else zip(workload.prompts, workload.params, strict=True)
        self._salt = None if workload is None else f"run {next(_RUNS)}"  # it finds no prefix of an earlier run
        self._began_s = time.perf_counter()

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self._began_s

    @property
    def has_work(self) -> bool:
        return self.engine.has_unfinished_requests

    def submit(self, arrival: WorkloadRequest) -> Sequence:
        """A request of these lengths; of a workload, its next one, which has them."""
        if self._requests is not None:
            prompt, params = next(self._requests)
        else:
            vocab_size = self.engine.model_config.vocab_size
            prompt = [self._rng.randrange(vocab_size) for _ in range(arrival.num_prompt)]
            params = SamplingParams(temperature=0, max_tokens=arrival.num_output, ignore_eos=True)
        request = self.engine.prepare(f"bench {len(self.sequences)}", prompt, params, cache_salt=self._salt)
        self.engine.submit(request)
        (sequence,) = request.sequences
        self.sequences.append(sequence)
        return sequence

    def step(self, until_s: float = float("inf")) -> Iterable[Sequence]:
        """Returns a sequence once for each token that it got."""
        grown = self.engine.step().grown
        self.step_s.append(self.now_s)
        return grown

    def advance_to(self, moment_s: float) -> None:
        """Without work: wait until then."""
        time.sleep(max(0.0, moment_s - self.now_s))


SteppedSystem = Server | EngineSystem  # on a clock of its own; a step returns the sequences with a new token


def serve(
    server: SteppedSystem, arrivals: ReadOnlyList[WorkloadRequest], num_clients: int | None = None
) -> list[TokenTimes]:
    """Submit each request when it is due (after the step that runs at that time), and run until all have ended.

    Args:
        num_clients: None: an open loop, requests arrive whether or not earlier ones have ended. Else a closed loop:
            each client sends its next request, which arrives then, when its last one has ended.
    """
    begin_s = server.now_s  # an engine's clock runs while it loads
    times = [TokenTimes(arrival.at_s + begin_s, arrival.num_prompt) for arrival in arrivals]
    waiting = deque(zip(times, arrivals, strict=True))
    of_sequence: dict[int, TokenTimes] = {}
    running: set[int] = set()
    while waiting or server.has_work:
        while waiting and waiting[0][0].arrived_s <= server.now_s and len(running) != num_clients:  # None: no limit
            one, arrival = waiting.popleft()
            if num_clients is not None:
                one.arrived_s = server.now_s
            sequence_id = server.submit(replace(arrival, at_s=server.now_s)).sequence_id
            of_sequence[sequence_id] = one
            running.add(sequence_id)
        next_s = waiting[0][0].arrived_s if waiting else float("inf")
        if not server.has_work:
            server.advance_to(next_s)
            continue
        for sequence in server.step(next_s):
            one = of_sequence[sequence.sequence_id]
            one.token_s.append(server.now_s)
            if sequence.reasoning is not None:
                _note_reasoning(one, sequence.reasoning, server.now_s)
            if sequence.is_finished:
                running.discard(sequence.sequence_id)
    for one in times:
        one.arrived_s -= begin_s
        one.token_s = [moment - begin_s for moment in one.token_s]
        one.reasoned_s, one.content_s = (None if at is None else at - begin_s for at in (one.reasoned_s, one.content_s))
    return times


def _note_reasoning(times: TokenTimes, reasoning: ReasoningMatcher, now_s: float) -> None:
    if times.reasoned_s is None and reasoning.has_ended:
        times.reasoned_s = now_s
    if times.content_s is None and reasoning.has_content:
        times.content_s = now_s

"""Serve a workload with the real scheduler, and a clock that a cost model advances.

    workload ─▶ Server.submit ─▶ Scheduler.schedule ─▶ ScheduledStep ─▶ cost_model.seconds ─▶ the clock
                                        ▲                                                      │
                                        └───────────── settle: one token for each row ◀────────┘

Scheduler, BlockManager and policies are the engine's own; only the model is missing. So admission, chunks, sharing,
preemption and queues are not modelled but run, and the cost model gives one number: how long a step takes.
Steps follow each other without a gap. A request that arrives during a step is queued after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, replace
from statistics import mean

from paged_infer.control.admission import add_sequences, check_request
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.policies import make_policy
from paged_infer.control.request import Request
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import Sequence
from paged_infer.control.step import ScheduledStep
from paged_infer.params import SamplingParams
from paged_infer.simulation.costs import CostModel
from paged_infer.simulation.model_free import carry_out
from paged_infer.simulation.times import TokenTimes, quantile
from paged_infer.simulation.workloads import Workload, WorkloadRequest

ANY_TOKEN = 2**62  # a vocabulary that holds every id of a workload
MAX_NUM_BLOCKS = 2**24  # of a simulated pool: more than any card holds, and still a list that fits in memory
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Options of the scheduler and its pool, with the engine's names and defaults.

    ``watermark`` is the BlockManager's; vLLM V1 has none (0). Preempted requests are recomputed.
    """

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    scheduling_policy: str = "chunked"
    scheduler_delay_factor: float = 0.0
    watermark: float = 0.02

    def scheduler(self, longest: int) -> Scheduler:
        """The scheduler for sequences of up to ``longest`` tokens. Without chunks, a step can hold a whole one (vLLM).

        Raises:
            ValueError: an option is out of range; the message names it.
        """
        if not 1 <= self.num_blocks <= MAX_NUM_BLOCKS:
            raise ValueError(f"num_blocks={self.num_blocks}: must be at least 1 and at most {MAX_NUM_BLOCKS:,}")
        manager = BlockManager(self.num_blocks, self.block_size, watermark=self.watermark)
        policy = make_policy(self.scheduling_policy, self.scheduler_delay_factor)
        num_tokens = self.max_num_batched_tokens
        return Scheduler(
            manager,
            self.max_num_seqs,
            num_tokens if policy.chunks_prompts else max(num_tokens, longest),
            enable_prefix_caching=self.enable_prefix_caching,
            policy=policy,
        )


@dataclass(slots=True)
class Run:
    """The result of a workload. ``times`` has its requests in their order.

    ``prefix_query_tokens``: prompt tokens that were looked up in the prefix cache, each time after a preemption, too.
    ``pool_use``: share of the blocks held, averaged over the steps' time; ``peak_pool_use``: its maximum.
    """

    times: list[TokenTimes]
    num_blocks: int
    num_steps: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    pool_use: float
    peak_pool_use: float

    @property
    def makespan_s(self) -> float:
        """From the first arrival to the last token."""
        return makespan_s(self.times)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the makespan."""
        return sum(one.num_tokens for one in self.times) / self.makespan_s


def makespan_s(times: ReadOnlyList[TokenTimes]) -> float:
    return max(one.token_s[-1] for one in times) - min(one.arrived_s for one in times)


def summary(times: ReadOnlyList[TokenTimes]) -> dict[str, dict[str, float]]:
    """TTFT, TPOT and latency of the requests in seconds: mean, p50, p90, p99. Requests of one token have no TPOT."""
    found = {
        "ttft": [one.ttft_s for one in times],
        "tpot": [tpot for one in times if (tpot := one.tpot_s) is not None],
        "latency": [one.latency_s for one in times],
    }
    return {
        name: {"mean": mean(v), **{p: quantile(sorted(v), share) for p, share in PERCENTILES.items()}}
        for name, v in found.items()
        if v
    }


class Server:
    """One scheduler with a clock of its own.

    Args:
        longest: tokens of the longest sequence that will be submitted, prompt and output together.
        watch: called with each step before the clock advances.
    """

    def __init__(
        self,
        options: SchedulerOptions,
        cost_model: CostModel,
        longest: int,
        watch: Callable[[ScheduledStep], None] | None = None,
    ) -> None:
        self.now_s = 0.0
        self.scheduler = options.scheduler(longest)
        self.times: dict[int, TokenTimes] = {}  # by sequence id
        self._cost_model = cost_model
        self._longest = longest
        self._watch = watch
        self._busy_s = self._block_seconds = 0.0
        self._peak_blocks = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def submit(self, request: WorkloadRequest, index: int | None = None) -> Sequence:
        """Queue a request that has arrived, the ``index``-th of its workload (None: the next one).

        Raises:
            ValueError: it can never be served with these options.
        """
        index = len(self.times) if index is None else index
        manager, max_num_seqs = self.scheduler.manager, self.scheduler.max_num_seqs
        num_slots = manager.pool.num_blocks * manager.block_size
        if request.num_prompt > num_slots:  # checked before its ids are made, which may take all memory
            raise ValueError(
                f"request {index}: a prompt of {request.num_prompt} tokens can never fit the pool's {num_slots} slots: "
                f"num_blocks={manager.pool.num_blocks} of {manager.block_size}"
            )
        prompt, params = request.token_ids(index), SamplingParams(max_tokens=request.num_output, ignore_eos=True)
        try:
            check_request(
                prompt,
                params,
                vocab_size=ANY_TOKEN,
                max_model_len=self._longest + 1,
                max_num_seqs=max_num_seqs,
                manager=manager,
            )
        except ValueError as error:
            raise ValueError(f"request {index}: {error}") from None
        made = Request(f"r{index}", None, prompt, params, request.at_s)
        add_sequences(made, index, 0, self._longest + 1, eos_token_ids=())
        self.scheduler.add(made.sequences)
        self.times[index] = TokenTimes(request.at_s, request.num_prompt)
        return made.sequences[0]

    def step(self, until_s: float = float("inf")) -> list[Sequence]:
        """Run one step. Returns the sequences with a new token. A policy may wait for requests until ``until_s``."""
        step = self.scheduler.schedule(self.now_s)
        if not step.sequences:
            assert step.resume_at_s is not None, "a request that fits the pool was not scheduled"
            self.now_s = max(self.now_s, min(step.resume_at_s, until_s))
            return []
        if self._watch is not None:
            self._watch(step)
        seconds = self._cost_model.seconds(step)
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"step {step.index} takes {seconds} seconds by {type(self._cost_model).__name__}")
        num_used = self.scheduler.manager.pool.num_used
        self._busy_s += seconds
        self._block_seconds += seconds * num_used
        self._peak_blocks = max(self._peak_blocks, num_used)
        self.now_s += seconds
        grown = carry_out(self.scheduler, step, self.now_s)
        for sequence in grown:
            self.times[sequence.sequence_id].token_s.append(self.now_s)
        return grown

    def advance_to(self, moment_s: float) -> None:
        """Run steps until the clock reaches ``moment_s``; the last step may pass it. Without work, set the clock."""
        while self.has_work and self.now_s < moment_s:
            self.step(moment_s)
        if not self.has_work:
            self.now_s = max(self.now_s, moment_s)

    def finish(self) -> None:
        while self.has_work:
            self.step()

    def run(self) -> Run:
        """The result of the requests so far."""
        num_blocks, stats = self.scheduler.manager.pool.num_blocks, self.scheduler.stats
        return Run(
            [self.times[index] for index in sorted(self.times)],
            num_blocks,
            stats.steps,
            stats.preemptions,
            stats.prefix_hit_tokens,
            stats.prefix_query_tokens,
            self._block_seconds / (self._busy_s * num_blocks) if self._busy_s else 0.0,
            self._peak_blocks / num_blocks,
        )


def longest_of(workload: Workload) -> int:
    """Tokens of the longest request, prompt and output together.

    Raises:
        ValueError: an empty workload.
    """
    if not workload:
        raise ValueError("the workload is empty: at least one request is needed")
    return max(one.num_prompt + one.num_output for one in workload)


def simulate(
    workload: Workload,
    options: SchedulerOptions,
    cost_model: CostModel,
    *,
    concurrency: int | None = None,
    watch: Callable[[ScheduledStep], None] | None = None,
) -> Run:
    """Serve the workload. The result is the same on every machine.

    Args:
        concurrency: None: an open loop, in which requests arrive at their times. Otherwise a closed loop of this many
            clients, each of which sends its next request when the last one has ended; the times are not used.

    Raises:
        ValueError: an empty workload, a request that could never be served, or an option out of range.
    """
    if concurrency is not None and concurrency < 1:
        raise ValueError(f"concurrency={concurrency}: must be at least 1")
    server = Server(options, cost_model, longest_of(workload), watch)
    if concurrency is None:
        for index, request in enumerate(workload):
            server.advance_to(request.at_s)
            server.submit(request, index)
        server.finish()
        return server.run()
    waiting = deque(enumerate(workload))
    num_free = concurrency
    while waiting or server.has_work:
        for _ in range(min(num_free, len(waiting))):
            index, request = waiting.popleft()
            server.submit(replace(request, at_s=server.now_s), index)
        num_free = sum(sequence.is_finished for sequence in server.step())
    return server.run()

"""More than one server: replicas behind a router, and disaggregated prefill.

replicas         request ─▶ route ─▶ Server 0 | Server 1 | ...      each with a scheduler, a pool and a clock
disaggregation   request ─▶ prefill server ─▶ first token ─▶ link (keys and values) ─▶ decode server ─▶ the rest
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, replace
from itertools import count

from paged_infer.control.blocks.hashing import extend_chain, root_hash
from paged_infer.control.step import ScheduledStep
from paged_infer.simulation.costs import CostModel
from paged_infer.simulation.simulate import Run, SchedulerOptions, Server, longest_of, simulate
from paged_infer.simulation.times import TokenTimes
from paged_infer.simulation.workloads import Workload, WorkloadRequest

Route = Callable[[ReadOnlyList[Server], WorkloadRequest, int], int]
"""Chooses the server of a request, the ``index``-th of its workload."""

MOST_AHEAD = 8  # requests that a server may have more than the least loaded one and still be chosen for its cache


def num_unfinished(server: Server) -> int:
    return len(server.scheduler.waiting) + len(server.scheduler.running)


def round_robin() -> Route:
    turns = count()
    return lambda servers, request, index: next(turns) % len(servers)


def least_loaded(servers: ReadOnlyList[Server], request: WorkloadRequest, index: int) -> int:
    """The server with the fewest unfinished requests."""
    return min(range(len(servers)), key=lambda number: num_unfinished(servers[number]))


def prefix_aware(servers: ReadOnlyList[Server], request: WorkloadRequest, index: int) -> int:
    """The server with the most blocks of the prompt in its cache, unless it is much busier than the least loaded."""
    chain: list[bytes] = []
    extend_chain(chain, root_hash(None), request.token_ids(index), servers[0].scheduler.manager.block_size)
    limit = min(map(num_unfinished, servers)) + MOST_AHEAD
    free = [number for number, server in enumerate(servers) if num_unfinished(server) <= limit]

    def rank(number: int) -> tuple[int, int]:
        return -len(servers[number].scheduler.manager.find_prefix(chain)), num_unfinished(servers[number])

    return min(free, key=rank)


def simulate_replicas(
    workload: Workload, options: SchedulerOptions, cost_models: ReadOnlyList[CostModel], route: Route
) -> Run:
    """Serve the workload on as many servers as there are cost models, each with ``options``.

    Raises:
        ValueError: see ``simulate``; or there is no cost model.
    """
    if not cost_models:
        raise ValueError("cost_models is empty: at least one replica is needed")
    servers = [Server(options, cost, longest_of(workload)) for cost in cost_models]
    for index, request in enumerate(workload):
        for server in servers:
            server.advance_to(request.at_s)
        servers[route(servers, request, index)].submit(request, index)
    for server in servers:
        server.finish()
    times = {index: one for server in servers for index, one in server.times.items()}
    return _joined([server.run() for server in servers if server.times], [times[index] for index in sorted(times)])


def _joined(runs: ReadOnlyList[Run], times: list[TokenTimes]) -> Run:
    return Run(
        times,
        sum(run.num_blocks for run in runs),
        sum(run.num_steps for run in runs),
        sum(run.preemptions for run in runs),
        sum(run.prefix_hit_tokens for run in runs),
        sum(run.prefix_query_tokens for run in runs),
        sum(run.pool_use for run in runs) / len(runs),
        max(run.peak_pool_use for run in runs),
    )


@dataclass(frozen=True, slots=True)
class ReceivedPrompts:
    """The cost of a server that gets its prompts' keys and values over a link, and so computes only last tokens.

    A preempted request gets them again at no cost, so give such a server a pool that is large enough not to preempt.
    """

    cost_model: CostModel

    def seconds(self, step: ScheduledStep) -> float:
        last = [
            replace(one, token_ids=one.token_ids[-1:], num_computed_tokens=one.num_computed_tokens + one.num_tokens - 1)
            for one in step.sequences
        ]
        return self.cost_model.seconds(replace(step, sequences=last))


def disaggregate(
    workload: Workload,
    options: SchedulerOptions,
    prefill: CostModel,
    decode: CostModel,
    kv_bytes_per_token: float,
    link_bytes_per_s: float,
) -> Run:
    """One server computes prompts and first tokens, the other all further tokens (DistServe, Zhong et al. 2024).

    The link carries one request at a time, after its prompt has been computed.

    Raises:
        ValueError: see ``simulate``; or a link without a rate.
    """
    if not 0 < link_bytes_per_s < float("inf"):
        raise ValueError(f"link_bytes_per_s={link_bytes_per_s}: must be a number > 0")
    first = simulate([replace(one, num_output=1) for one in workload], options, prefill)
    order = sorted(range(len(workload)), key=lambda index: first.times[index].token_s[0])
    arriving: list[tuple[int, WorkloadRequest]] = []
    free_s = 0.0
    for index in order:
        one = workload[index]
        if one.num_output > 1:
            free_s = max(free_s, first.times[index].token_s[0]) + one.num_prompt * kv_bytes_per_token / link_bytes_per_s
            arriving.append((index, WorkloadRequest(free_s, one.num_prompt + 1, one.num_output - 1)))
    times = [TokenTimes(one.arrived_s, one.num_prompt, list(one.token_s)) for one in first.times]
    if not arriving:
        return first
    roomy = replace(options, max_num_batched_tokens=options.num_blocks * options.block_size)
    rest = simulate([request for _, request in arriving], roomy, ReceivedPrompts(decode))
    for (index, _), later in zip(arriving, rest.times, strict=True):
        times[index].token_s += later.token_s
    return _joined([first, rest], times)

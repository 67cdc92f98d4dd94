"""Several simulated engines behind one routing rule, as chapter 16 compares them. ``course`` has the names."""

from __future__ import annotations

import random
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass

from paged_infer.bench.load import poisson_moments
from paged_infer.bench.metrics import quantile
from paged_infer.bench.scheduling.policies import COST
from paged_infer.control.blocks.hashing import extend_chain, root_hash
from paged_infer.engine.routing import Load, Router
from paged_infer.simulation.cluster import simulate_replicas
from paged_infer.simulation.model_free import FIRST_PROMPT
from paged_infer.simulation.simulate import SchedulerOptions, Server
from paged_infer.simulation.workloads import WorkloadRequest

BLOCK_SIZE, PREFIX, OWN, OUTPUT = 16, 1024, 32, 64


@dataclass(frozen=True)
class Waits:
    """Of one routing: share of prompt tokens found in caches, seconds to the first token, and each replica's share."""

    hits: float
    ttft_s: list[float]  # ascending
    shares: list[float]

    def at(self, share: float) -> float:
        return quantile(self.ttft_s, share)


def load_of(server: Server) -> Load:
    return Load(len(server.scheduler.waiting), len(server.scheduler.running))


def routed_waits(
    routing: str, per_s: float, popularity: list[float], *, num_replicas: int = 4, num_blocks: int = 512
) -> Waits:
    """240 requests at ``per_s``, each of one of several long beginnings, through ``num_replicas`` engines.

    Args:
        popularity: of each beginning: how often, relative to the others.
        num_blocks: of each replica's pool.
    """
    rng, workload = random.Random(0), []
    for index, at_s in enumerate(poisson_moments(240, per_s, seed=0)):
        (beginning,) = rng.choices(range(len(popularity)), popularity)
        ids = (beginning,) * PREFIX + (FIRST_PROMPT + index,) * OWN
        workload.append(WorkloadRequest(at_s, len(ids), OUTPUT, ids))
    router, counts = Router(routing, num_replicas, num_blocks), [0] * num_replicas

    def route(servers: ReadOnlyList[Server], request: WorkloadRequest, index: int) -> int:
        chain: list[bytes] = []
        extend_chain(chain, root_hash(None), request.token_ids(index), BLOCK_SIZE)
        chosen = router.choose(chain, dict(enumerate(map(load_of, servers))))
        counts[chosen] += 1
        return chosen

    options = SchedulerOptions(num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=32)
    run = simulate_replicas(workload, options, [COST] * num_replicas, route)
    hits = run.prefix_hit_tokens / run.prefix_query_tokens
    return Waits(hits, sorted(one.ttft_s for one in run.times), [count / len(workload) for count in counts])

"""Several simulated engines behind one routing rule, as chapter 16 compares them. ``course`` has the names."""

from __future__ import annotations

import random
from dataclasses import dataclass

from paged_infer.bench.load import SimulatedSystem, StepCost, poisson_moments
from paged_infer.bench.metrics import quantile
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import Sequence
from paged_infer.engine.routing import Load, Router
from paged_infer.simulation.lengths import RequestLengths
from paged_infer.simulation.model_free import RequestFactory

BLOCK_SIZE, PREFIX, OWN, OUTPUT, MAX_MODEL_LEN = 16, 1024, 32, 64, 2048


@dataclass(frozen=True)
class Waits:
    """Of one routing: share of prompt tokens found in caches, seconds to the first token, and each replica's share."""

    hits: float
    ttft_s: list[float]  # ascending
    shares: list[float]

    def at(self, share: float) -> float:
        return quantile(self.ttft_s, share)


class Replica(SimulatedSystem):
    """The package's scheduler on a clock of its own: OPT-13B on an A100, without the model."""

    def __init__(self, num_blocks: int) -> None:
        self.scheduler = Scheduler(BlockManager(num_blocks, BLOCK_SIZE), 32, 2048)
        super().__init__(self.scheduler, StepCost(), MAX_MODEL_LEN)
        self.first_s: dict[int, float] = {}

    @property
    def load(self) -> Load:
        return Load(len(self.scheduler.waiting), len(self.scheduler.running))

    def run_until(self, moment_s: float) -> None:
        while self.has_work and self.now_s < moment_s:
            for sequence in self.step(moment_s):
                self.first_s.setdefault(sequence.sequence_id, self.now_s)
        if not self.has_work:
            self.wait_until(moment_s)


def routed_waits(
    routing: str, per_s: float, popularity: list[float], *, num_replicas: int = 4, num_blocks: int = 512
) -> Waits:
    """240 requests at ``per_s``, each of one of several long beginnings, through ``num_replicas`` engines.

    Args:
        popularity: of each beginning: how often, relative to the others.
        num_blocks: of each replica's pool.
    """
    rng, factory = random.Random(0), RequestFactory(MAX_MODEL_LEN)
    replicas = [Replica(num_blocks) for _ in range(num_replicas)]
    router, routed = Router(routing, num_replicas, num_blocks), list[tuple[Sequence, int]]()
    for moment_s in poisson_moments(240, per_s, seed=0):
        for replica in replicas:
            replica.run_until(moment_s)
        (beginning,) = rng.choices(range(len(popularity)), popularity)
        lengths = RequestLengths(PREFIX + OWN, OUTPUT)
        (sequence,) = sequences = factory.request(lengths, moment_s, prefix=[-1 - beginning] * PREFIX)
        chain = sequence.hash_chain(BLOCK_SIZE)
        chosen = router.choose(chain, {i: replica.load for i, replica in enumerate(replicas)})
        replicas[chosen].scheduler.add(sequences)
        routed.append((sequence, chosen))
    for replica in replicas:
        replica.run_until(float("inf"))
    ttft_s = [replicas[i].first_s[one.sequence_id] - one.arrival_time_s for one, i in routed]
    counts = [sum(i == number for _, i in routed) for number in range(num_replicas)]
    stats = [replica.scheduler.stats for replica in replicas]
    hits = sum(one.prefix_hit_tokens for one in stats) / sum(one.prefix_query_tokens for one in stats)
    return Waits(hits, sorted(ttft_s), [count / len(routed) for count in counts])

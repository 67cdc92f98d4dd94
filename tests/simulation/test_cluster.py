"""More than one server: replicas, routes, and prompts computed apart from decodes."""

from __future__ import annotations

import random

import pytest

from paged_infer.simulation.cluster import (
    ReceivedPrompts,
    disaggregate,
    least_loaded,
    prefix_aware,
    round_robin,
    simulate_replicas,
)
from paged_infer.simulation.costs import LinearCost
from paged_infer.simulation.simulate import SchedulerOptions, longest_of, simulate
from paged_infer.simulation.workloads import WorkloadRequest

COST = LinearCost(0.01, 0.0002)
OPTIONS = SchedulerOptions(num_blocks=2000)


def drawn(num_requests: int = 40) -> list[WorkloadRequest]:
    """Every fifth request is long; a prompt begins with one of four beginnings of 160 tokens."""
    rng, at_s, requests = random.Random(0), 0.0, []
    for index in range(num_requests):
        at_s += rng.expovariate(30.0)
        ids = [rng.randrange(4)] * 160 + [1000 + index] * 40
        requests.append(WorkloadRequest(at_s, 200, 100 if index % 5 == 0 else 10, tuple(ids)))
    return requests


def test_one_replica_is_one_server():
    workload = drawn()
    assert simulate_replicas(workload, OPTIONS, [COST], round_robin()) == simulate(workload, OPTIONS, COST)


@pytest.mark.parametrize("route", [round_robin(), least_loaded, prefix_aware])
def test_every_request_ends_once_on_some_replica(route):
    workload = drawn()
    run = simulate_replicas(workload, OPTIONS, [COST] * 3, route)
    for request, times in zip(workload, run.times, strict=True):
        assert len(times.token_s) == request.num_output and times.arrived_s == request.at_s
        assert times.token_s == sorted(times.token_s)


@pytest.mark.parametrize("seed", range(8))
def test_no_time_runs_backwards_and_every_request_ends_on_two_servers(seed):
    """In pools as small as the largest request allows, whole prompts or chunks, as replicas and apart."""
    rng, at_s, workload = random.Random(seed), 0.0, []
    for _ in range(12):
        at_s += rng.choice([0.0, 0.02, 0.3])
        workload.append(WorkloadRequest(at_s, rng.randint(1, 60), rng.randint(1, 20)))
    policy = rng.choice(["chunked", "prefill_first", "static"])
    pool = {"num_blocks": -(-longest_of(workload) // 4) + rng.randint(0, 9), "block_size": 4, "max_num_seqs": 4}
    options = SchedulerOptions(**pool, max_num_batched_tokens=rng.choice([7, 64]), scheduling_policy=policy)
    replicas = simulate_replicas(workload, options, [COST] * 2, rng.choice([round_robin(), least_loaded, prefix_aware]))
    for run in (replicas, disaggregate(workload, options, COST, COST, 1e5, 1e9)):
        for request, times in zip(workload, run.times, strict=True):
            moments = [times.arrived_s, *times.token_s]
            assert moments == sorted(moments) and moments[0] < moments[1] and len(moments) == 1 + request.num_output


def test_a_cluster_without_requests_servers_or_a_link_is_refused():
    with pytest.raises(ValueError, match="the workload is empty"):
        simulate_replicas([], OPTIONS, [COST], least_loaded)
    with pytest.raises(ValueError, match="cost_models is empty"):
        simulate_replicas(drawn(), OPTIONS, [], least_loaded)
    with pytest.raises(ValueError, match="link_bytes_per_s=0"):
        disaggregate(drawn(), OPTIONS, COST, COST, 1e5, 0)


def test_the_least_loaded_replica_waits_less_and_the_prefix_aware_computes_less():
    workload, crowded = drawn(), LinearCost(0.002, 0.0002, 0.01)  # a step is slow where many run
    runs = [simulate_replicas(workload, OPTIONS, [crowded] * 5, route) for route in (round_robin(), least_loaded)]
    slowest = [max(one.latency_s for one in run.times) for run in runs]
    assert slowest[1] < slowest[0]  # five replicas in turn give every long request to the first
    aware = simulate_replicas(workload, OPTIONS, [crowded] * 5, prefix_aware)
    assert aware.prefix_hit_tokens > 1.2 * runs[1].prefix_hit_tokens


def test_a_received_prompt_costs_its_last_token():
    workload = [WorkloadRequest(0.0, 1000, 2)]
    run = simulate(workload, SchedulerOptions(num_blocks=100), ReceivedPrompts(COST))
    assert run.times[0].token_s == pytest.approx([0.0102, 0.0204])


def test_disaggregated_prompts_do_not_stall_decodes():
    workload = [WorkloadRequest(0.0, 50, 60), WorkloadRequest(0.2, 8000, 3)]
    options = SchedulerOptions(num_blocks=2000, max_num_batched_tokens=4096)
    together = simulate(workload, options, COST)
    apart = disaggregate(workload, options, COST, COST, kv_bytes_per_token=1e5, link_bytes_per_s=1e10)
    assert max(together.times[0].gaps_s) > 0.8 and max(apart.times[0].gaps_s) < 0.02
    assert apart.times[1].gaps_s[0] > 8000 * 1e5 / 1e10  # the link, before the second token
    for request, times in zip(workload, apart.times, strict=True):
        assert len(times.token_s) == request.num_output and times.token_s == sorted(times.token_s)
    whole = disaggregate([WorkloadRequest(0.0, 50, 1)], options, COST, COST, 1e5, 1e10)
    assert len(whole.times[0].token_s) == 1

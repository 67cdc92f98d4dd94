"""The simulator: no time runs backwards, every request ends, and its steps are those that the engine takes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_infer import LLM, SamplingParams
from paged_infer.control.step import ScheduledStep
from paged_infer.simulation.cards import CARDS
from paged_infer.simulation.costs import LinearCost, RecordedSteps, Roofline
from paged_infer.simulation.lengths import SHAREGPT
from paged_infer.simulation.shapes import ModelShape
from paged_infer.simulation.simulate import SchedulerOptions, Server, longest_of, simulate, summary
from paged_infer.simulation.workloads import WorkloadRequest, dataset_like

COST = LinearCost(0.01, 0.001)
PINNED_COUNTS = (1094, 58)
PINNED_SECONDS = (20.524909, 5.388878, 0.01994777)
ROOMY = SchedulerOptions(num_blocks=10_000)


def plain(*requests: tuple[float, int, int]) -> list[WorkloadRequest]:
    return [WorkloadRequest(*one) for one in requests]


def drawn(seed: int, num_requests: int = 8) -> list[WorkloadRequest]:
    """Prompts that often begin alike, and come in bursts."""
    rng = random.Random(seed)
    beginning, at_s, requests = [rng.randrange(100) for _ in range(12)], 0.0, []
    for index in range(num_requests):
        at_s += rng.choice([0.0, 0.0, 0.02, 0.3])
        ids = beginning[: rng.randint(0, 12)] + [100 + index] + [rng.randrange(100) for _ in range(rng.randint(0, 9))]
        requests.append(WorkloadRequest(at_s, len(ids), rng.randint(1, 14), tuple(ids)))
    return requests


def test_one_request_alone_takes_the_sum_of_its_steps():
    run = simulate(plain((2.0, 100, 3)), ROOMY, COST)
    (times,) = run.times
    assert times.token_s == pytest.approx([2.11, 2.121, 2.132])  # the prompt, then two tokens
    assert (times.ttft_s, times.tpot_s, run.makespan_s) == pytest.approx((0.11, 0.011, 0.132))
    assert (run.num_steps, run.preemptions) == (3, 0)
    assert run.peak_pool_use == 7 / 10_000


def test_a_request_that_arrives_during_a_step_is_seen_after_it():
    run = simulate(plain((0.0, 100, 2), (0.05, 10, 1)), ROOMY, COST)
    assert run.times[1].token_s == pytest.approx([0.11 + 0.01 + 0.011])


def test_a_clock_without_work_is_set_to_the_next_arrival():
    run = simulate(plain((0.0, 10, 1), (9.0, 10, 1)), ROOMY, COST)
    assert run.times[1].token_s == pytest.approx([9.02])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    block_size=st.integers(1, 5),
    slack=st.integers(0, 12),
    budget=st.sampled_from([1, 3, 7, 64]),
    policy=st.sampled_from(["chunked", "prefill_first", "dynamic", "static"]),
    concurrency=st.sampled_from([None, 1, 3]),
)
def test_no_time_runs_backwards_and_every_request_ends(seed, block_size, slack, budget, policy, concurrency):
    workload = drawn(seed)
    options = SchedulerOptions(
        num_blocks=-(-(longest_of(workload) - 1) // block_size) + slack,  # as small as the largest request allows
        block_size=block_size,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        scheduling_policy=policy,
    )
    run = simulate(workload, options, COST, concurrency=concurrency)
    for request, times in zip(workload, run.times, strict=True):
        moments = [times.arrived_s, *times.token_s]
        assert moments == sorted(moments) and times.token_s[0] > times.arrived_s
        assert len(times.token_s) == request.num_output
    assert 0 < run.pool_use <= run.peak_pool_use <= 1
    again = simulate(workload, options, COST, concurrency=concurrency)
    assert again == run


def shown(step: ScheduledStep) -> list[tuple]:
    """What the scheduler decided. On both sides sequences are numbered as they are submitted."""
    return [
        (one.sequence_id, one.num_tokens, one.num_computed_tokens, tuple(one.block_table), one.sample is not None)
        for one in step.sequences
    ]


def engine_steps(engine, workload: list[WorkloadRequest], seconds: list[float], monkeypatch) -> list[list[tuple]]:
    """The engine's steps; each is said to take the next of ``seconds``, which decide what has arrived."""
    steps, schedule = [], engine.scheduler.schedule
    monkeypatch.setattr(
        engine.scheduler, "schedule", lambda now=0.0: (step := schedule(now), steps.append(shown(step)))[0]
    )
    now_s, waiting, clock = 0.0, list(enumerate(workload)), iter(seconds)
    while waiting or engine.has_unfinished_requests:
        if not engine.has_unfinished_requests:
            now_s = max(now_s, waiting[0][1].at_s)
        while waiting and waiting[0][1].at_s <= now_s:
            index, one = waiting.pop(0)
            params = SamplingParams(temperature=0, max_tokens=one.num_output, ignore_eos=True)
            engine.submit(engine.prepare(str(index), list(one.prompt_token_ids), params))
        engine.step()
        now_s += next(clock)
    monkeypatch.undo()
    return steps


@pytest.mark.parametrize(
    ("seed", "policy", "budget"),
    [*((seed, "chunked", 24) for seed in range(4)), (4, "prefill_first", 48), (5, "static", 48)],
)
def test_the_simulators_steps_are_the_engines(seed, policy, budget, monkeypatch):
    """Token for token and block for block, where preemption, chunks and sharing decide the steps."""
    workload, rng = drawn(seed, 12), random.Random(seed)
    seconds = [rng.uniform(0.001, 0.05) for _ in range(1000)]
    sizes = {"num_blocks": 11, "block_size": 4, "max_num_seqs": 5, "max_num_batched_tokens": budget}
    sizes["scheduling_policy"] = policy
    engine = LLM(**sizes, max_model_len=44).engine
    theirs = engine_steps(engine, workload, seconds, monkeypatch)
    ours: list[list[tuple]] = []
    run = simulate(workload, SchedulerOptions(**sizes), RecordedSteps(seconds), watch=lambda s: ours.append(shown(s)))
    assert ours == theirs
    stats = engine.scheduler.stats
    assert (run.preemptions, run.prefix_hit_tokens) == (stats.preemptions, stats.prefix_hit_tokens)
    assert run.preemptions and run.prefix_hit_tokens


def test_a_closed_loop_has_as_many_requests_at_once_as_clients():
    widths: list[int] = []
    workload = plain(*[(0.0, 10, 5)] * 9)
    run = simulate(workload, ROOMY, COST, concurrency=2, watch=lambda step: widths.append(len(step.sequences)))
    assert max(widths) == 2
    ends = sorted(one.token_s[-1] for one in run.times)
    assert sorted(one.arrived_s for one in run.times)[2:] == ends[:7]  # a client sends when its last one has ended


def test_simulated_seconds_are_the_same_on_every_machine():
    """Pinned: the numbers of simulation/README.md hold only while these do. A change here is one there."""
    shape = ModelShape.named("llama-3.1-8b")
    workload = dataset_like(SHAREGPT, 60, 20.0)
    options = SchedulerOptions(num_blocks=500, watermark=0)
    run = simulate(workload, options, Roofline(CARDS["rtx-4090"], shape))
    assert (run.num_steps, run.preemptions) == PINNED_COUNTS
    found = summary(run.times)
    assert (run.makespan_s, found["ttft"]["p90"], found["tpot"]["p50"]) == pytest.approx(PINNED_SECONDS, rel=1e-5)


def test_what_can_never_be_served_is_refused_with_its_index():
    with pytest.raises(ValueError, match=r"request 1: .*need 13 blocks of 16: the pool has num_blocks=12"):
        simulate(plain((0, 10, 5), (1, 100, 100)), SchedulerOptions(num_blocks=12), COST)
    with pytest.raises(ValueError, match="the workload is empty"):
        simulate([], ROOMY, COST)
    with pytest.raises(ValueError, match="concurrency=0"):
        simulate(plain((0, 1, 1)), ROOMY, COST, concurrency=0)
    with pytest.raises(ValueError, match=r"request 0: a prompt of 10{15} tokens .* 192 slots"):
        simulate(plain((0, 10**15, 1)), SchedulerOptions(num_blocks=12), COST)  # and no list of them is made
    for wrong in (0, 2**24 + 1):
        with pytest.raises(ValueError, match=f"num_blocks={wrong}"):
            simulate(plain((0, 1, 1)), SchedulerOptions(num_blocks=wrong), COST)
    with pytest.raises(ValueError, match="scheduling_policy='fifo'"):
        simulate(plain((0, 1, 1)), SchedulerOptions(num_blocks=9, scheduling_policy="fifo"), COST)


def test_a_step_without_a_time_is_refused():
    with pytest.raises(ValueError, match=r"step 1 takes -1.* by LinearCost"):
        simulate(plain((0, 1, 1)), ROOMY, LinearCost(-1.0))
    with pytest.raises(ValueError, match="step 2: no more steps were recorded"):
        simulate(plain((0, 1, 2)), ROOMY, RecordedSteps([0.5]))


def test_a_server_keeps_integrity_between_steps():
    workload = drawn(3)
    server = Server(SchedulerOptions(num_blocks=11, block_size=4, max_num_seqs=4), COST, longest_of(workload))
    for index, one in enumerate(workload):
        server.advance_to(one.at_s)
        server.submit(one, index)
        server.step()
        server.scheduler.check_integrity()
    server.finish()
    assert server.scheduler.manager.pool.num_used == 0

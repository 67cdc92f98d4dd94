"""The same requests through every scheduling policy: throughput, waiting times, and stalls."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, replace
from typing import Any

from paged_infer.bench import report
from paged_infer.bench.load import EngineSystem, SteppedSystem, poisson_arrivals, serve
from paged_infer.bench.metrics import TokenTimes, quantile
from paged_infer.control.admission import check_budget
from paged_infer.control.policies import make_policy
from paged_infer.execution.machine import describe_machine
from paged_infer.simulation.costs import LinearCost
from paged_infer.simulation.simulate import SchedulerOptions, Server
from paged_infer.simulation.workloads import WorkloadRequest

GAP_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """A policy, its options, and its name in the table."""

    name: str
    policy: str
    max_num_batched_tokens: int
    delay_factor: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """The requests. Lengths in tokens, uniform in their ranges; arrivals a second."""

    num_requests: int
    per_s: float
    prompts: tuple[int, int]
    outputs: tuple[int, int]
    seed: int

    def arrivals(self) -> list[WorkloadRequest]:
        return poisson_arrivals(self.num_requests, self.per_s, self.prompts, self.outputs, self.seed)

    def __str__(self) -> str:
        return (
            f"{self.num_requests} requests, {self.per_s:g} a second, prompts {self.prompts[0]}..{self.prompts[1]}, "
            f"outputs {self.outputs[0]}..{self.outputs[1]} tokens"
        )


# OPT-13B on an A100, from its size: 26 GB at 1.5 TB/s, and 26 GFLOP a token at 200 TFLOP/s.
COST = LinearCost(per_step_s=0.017, per_token_s=0.000130)
SIMULATED = f"simulated steps of {1e3 * COST.per_step_s:g} ms + {1e3 * COST.per_token_s:g} ms a token"
SIMULATED_LOAD = Load(200, 10.0, (128, 1024), (32, 256), 0)
STORYTELLER_LOAD = Load(200, 12.0, (64, 512), (16, 128), 0)


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """One policy. Seconds; a gap is from one token of a request to its next, from its second token on.

    ``longest_start_s`` is from a first token to the second: a static batch computes all its prompts before it
    decodes, so the first request of it has one token and waits. A stall comes later, in the middle of a text.
    """

    name: str
    max_num_batched_tokens: int
    tokens_per_s: float  # output tokens, from the first arrival to the last token
    ttft_p50_s: float
    ttft_p95_s: float
    gap_p50_s: float
    gap_p95_s: float
    gap_p99_s: float
    longest_start_s: float
    longest_stall_s: float
    gap_quantiles_s: list[float]  # at GAP_QUANTILES
    ttft_s: list[float]  # of all requests, sorted


@dataclass(frozen=True, slots=True)
class PoliciesReport(report.JsonReport):
    load: Load
    max_num_seqs: int
    served_by: str
    machine: dict[str, Any]  # empty where the clock was simulated
    policies: list[PolicyReport]

    def __getitem__(self, name: str) -> PolicyReport:
        return next(policy for policy in self.policies if policy.name == name)


def all_policies(whole_tokens: int, chunk_tokens: int, delays: Iterable[float]) -> list[PolicyOptions]:
    """Every policy; those that do not chunk need a step that holds a whole prompt."""
    return [
        PolicyOptions("static", "static", whole_tokens),
        PolicyOptions("dynamic", "dynamic", whole_tokens),
        *(PolicyOptions(f"prefill_first, delay {delay:g}", "prefill_first", whole_tokens, delay) for delay in delays),
        PolicyOptions("chunked", "chunked", chunk_tokens),
    ]


def simulated(policy: PolicyOptions, cost: LinearCost, max_num_seqs: int, max_model_len: int) -> Server:
    """With a pool that holds ``max_num_seqs`` sequences of ``max_model_len`` tokens."""
    check_budget(make_policy(policy.policy, policy.delay_factor), policy.max_num_batched_tokens, max_model_len)
    options = SchedulerOptions(
        num_blocks=max_num_seqs * -(-max_model_len // 16),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=policy.max_num_batched_tokens,
        scheduling_policy=policy.policy,
        scheduler_delay_factor=policy.delay_factor,
    )
    return Server(options, cost, max_model_len)


def served_by_model(
    policy: PolicyOptions, max_num_seqs: int, max_model_len: int, model: str | None = None, **options: Any
) -> EngineSystem:
    """A new engine, warmed up on a few requests."""
    from paged_infer.cli_options import open_llm

    llm = open_llm(
        model,
        scheduling_policy=policy.policy,
        scheduler_delay_factor=policy.delay_factor,
        max_num_batched_tokens=policy.max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        **options,
    )
    server = EngineSystem(llm.engine)
    longest = min(policy.max_num_batched_tokens, max_model_len) // 2
    serve(server, poisson_arrivals(4, 1000.0, (longest, longest), (4, 4), seed=-1))
    return server


def open_systems(
    policies: Iterable[PolicyOptions], simulate: bool, max_num_seqs: int, max_model_len: int, **model: Any
) -> list[SteppedSystem]:
    """A system for each policy: simulated with ``COST``, or a new engine on a model, the storyteller by default."""
    if simulate:
        return [simulated(one, COST, max_num_seqs, max_model_len) for one in policies]
    return [served_by_model(one, max_num_seqs, max_model_len, **model) for one in policies]


def report_policy(policy: PolicyOptions, times: ReadOnlyList[TokenTimes]) -> PolicyReport:
    gaps = sorted(gap for one in times for gap in one.gaps_s[1:])
    if not gaps:
        raise ValueError("no request has a third token, so there are no gaps to measure")
    ttfts = sorted(one.ttft_s for one in times)
    seconds = max(one.token_s[-1] for one in times) - min(one.arrived_s for one in times)
    return PolicyReport(
        policy.name,
        policy.max_num_batched_tokens,
        tokens_per_s=sum(len(one.token_s) for one in times) / seconds,
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p95_s=quantile(ttfts, 0.95),
        gap_p50_s=quantile(gaps, 0.5),
        gap_p95_s=quantile(gaps, 0.95),
        gap_p99_s=quantile(gaps, 0.99),
        longest_start_s=max(one.gaps_s[0] for one in times if len(one.token_s) > 1),
        longest_stall_s=gaps[-1],
        gap_quantiles_s=[quantile(gaps, share) for share in GAP_QUANTILES],
        ttft_s=ttfts,
    )


def run_policies(
    simulate: bool,
    num_requests: int,
    per_s: float | None,
    max_num_seqs: int,
    chunk_tokens: int | None,
    delays: ReadOnlyList[float],
    seed: int,
) -> PoliciesReport:
    """Serve the same requests with every policy. ``per_s`` and ``chunk_tokens`` None: the defaults.

    Raises:
        ValueError: a delay factor below 0, or no request long enough to have gaps.
    """
    usual, whole_tokens = (SIMULATED_LOAD, 2048) if simulate else (STORYTELLER_LOAD, 1024)
    load = replace(usual, num_requests=num_requests, per_s=per_s or usual.per_s, seed=seed)
    policies = all_policies(whole_tokens, chunk_tokens or whole_tokens // 4, delays)
    machine, served_by = ({}, SIMULATED) if simulate else (describe_machine(), "storyteller")
    systems = open_systems(policies, simulate, max_num_seqs, whole_tokens)
    arrivals = load.arrivals()
    reports = [report_policy(one, serve(system, arrivals)) for one, system in zip(policies, systems, strict=True)]
    return PoliciesReport(load, max_num_seqs, served_by, machine, reports)

"""The same requests through every scheduling policy: who is fast, who makes whom wait, and who stands still."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ReadOnlyList
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paged_infer.bench.load import (
    Arrival,
    EngineSystem,
    SimulatedSystem,
    StepCost,
    SteppedSystem,
    poisson_arrivals,
    serve,
)
from paged_infer.bench.metrics import TokenTimes, quantile
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.policies import check_budget, make_policy
from paged_infer.control.scheduler import Scheduler

GAP_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """A policy and its options, named as in the table."""

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

    def arrivals(self) -> list[Arrival]:
        return poisson_arrivals(self.num_requests, self.per_s, self.prompts, self.outputs, self.seed)

    def __str__(self) -> str:
        return (
            f"{self.num_requests} requests, {self.per_s:g} a second, prompts {self.prompts[0]}..{self.prompts[1]}, "
            f"outputs {self.outputs[0]}..{self.outputs[1]} tokens"
        )


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """One policy. Seconds; a gap is from one token of a request to its next, from its second token on.

    ``longest_start_s`` is from a first token to the second: a static batch computes all its prompts before any of it
    decodes, so whoever came in first has one token and waits. A stall comes later, in the middle of a text.
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
class PoliciesReport:
    load: Load
    max_num_seqs: int
    served_by: str
    machine: dict[str, Any]  # empty where the clock was simulated
    policies: list[PolicyReport]

    def __getitem__(self, name: str) -> PolicyReport:
        return next(policy for policy in self.policies if policy.name == name)

    def save(self, path: Path) -> None:
        """As JSON, so that the picture can be drawn again from its numbers."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load_from(cls, path: Path) -> PoliciesReport:
        fields = json.loads(path.read_text(encoding="utf-8"))
        load = fields["load"]
        fields["load"] = Load(**{**load, "prompts": tuple(load["prompts"]), "outputs": tuple(load["outputs"])})
        fields["policies"] = [PolicyReport(**policy) for policy in fields["policies"]]
        return cls(**fields)


def contenders(whole_tokens: int, chunk_tokens: int, delays: Iterable[float]) -> list[PolicyOptions]:
    """Every policy there is; those that do not chunk need a step that holds a whole prompt."""
    return [
        PolicyOptions("static", "static", whole_tokens),
        PolicyOptions("dynamic", "dynamic", whole_tokens),
        *(PolicyOptions(f"prefill_first, delay {delay:g}", "prefill_first", whole_tokens, delay) for delay in delays),
        PolicyOptions("chunked", "chunked", chunk_tokens),
    ]


def simulated(
    contender: PolicyOptions, cost: StepCost, max_num_seqs: int, max_model_len: int, num_blocks: int | None = None
) -> SimulatedSystem:
    """A pool that holds ``max_num_seqs`` sequences of ``max_model_len`` tokens unless told otherwise."""
    policy = make_policy(contender.policy, contender.delay_factor)
    check_budget(policy, contender.max_num_batched_tokens, max_model_len)
    manager = BlockManager(num_blocks or max_num_seqs * -(-max_model_len // 16), 16)
    scheduler = Scheduler(manager, max_num_seqs, contender.max_num_batched_tokens, policy=policy)
    return SimulatedSystem(scheduler, cost, max_model_len)


def served_by_model(
    contender: PolicyOptions, max_num_seqs: int, model: str | Path | None = None, **options: Any
) -> EngineSystem:
    """A fresh engine, run warm on a few requests."""
    from paged_infer.cli_options import open_llm

    llm = open_llm(
        None if model is None else str(model),
        scheduling_policy=contender.policy,
        scheduler_delay_factor=contender.delay_factor,
        max_num_batched_tokens=contender.max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        **options,
    )
    server = EngineSystem(llm.engine)
    longest = min(contender.max_num_batched_tokens, llm.engine.memory.max_model_len) // 2
    serve(server, poisson_arrivals(4, 1000.0, (longest, longest), (4, 4), seed=-1))
    return server


def report_policy(contender: PolicyOptions, times: ReadOnlyList[TokenTimes]) -> PolicyReport:
    gaps = sorted(gap for one in times for gap in one.gaps_s[1:])
    if not gaps:
        raise ValueError("no request has a third token: nothing to say about gaps")
    ttfts = sorted(one.ttft_s for one in times)
    seconds = max(one.token_s[-1] for one in times) - min(one.arrived_s for one in times)
    return PolicyReport(
        contender.name,
        contender.max_num_batched_tokens,
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


def compare_policies(
    load: Load,
    max_num_seqs: int,
    servers: Mapping[PolicyOptions, SteppedSystem],
    served_by: str,
    machine: dict[str, Any],
) -> PoliciesReport:
    """Serve the load with each, one after the other."""
    arrivals = load.arrivals()
    policies = [report_policy(contender, serve(server, arrivals)) for contender, server in servers.items()]
    return PoliciesReport(load, max_num_seqs, served_by, machine, policies)

"""A long prompt arrives while others decode: how long is each of them without a token?

whole prompt    d d d d [ P P P P P P P P ] d d d      nobody decodes while it is computed
in chunks       d d d d [P d][P d][P d][P d] d d d     each step takes longer, and everybody gets a token
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ReadOnlyList
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from paged_infer.bench.lengths import RequestLengths
from paged_infer.bench.load import SteppedSystem
from paged_infer.bench.scheduling.policies import PolicyOptions

TOKENS_BEFORE = 24  # of each running request, before the prompt arrives
TOKENS_AFTER = 24  # of the long request, so that the picture shows how it goes on
RUNNING_PROMPT = 16


@dataclass(frozen=True, slots=True)
class ArrivalRun:
    """One policy. Seconds; a gap is from one token of a running request to its next.

    ``moments``: when a step gave the running requests tokens, counted from the arrival, and the longest of their gaps.
    """

    name: str
    max_num_batched_tokens: int
    usual_gap_s: float  # median before the arrival
    longest_gap_s: float  # after it
    ttft_s: float  # of the long prompt
    moments: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class ArrivalReport:
    num_running: int
    num_prompt_tokens: int
    served_by: str
    machine: dict[str, Any]  # empty where the clock was simulated
    runs: list[ArrivalRun]

    def save(self, path: Path) -> None:
        """As JSON, so that the picture can be drawn again from its numbers."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ArrivalReport:
        fields = json.loads(path.read_text(encoding="utf-8"))
        for run in fields["runs"]:
            run["moments"] = [(moment_s, gap_s) for moment_s, gap_s in run["moments"]]
        fields["runs"] = [ArrivalRun(**run) for run in fields["runs"]]
        return cls(**fields)


def contenders(num_prompt_tokens: int, chunks: ReadOnlyList[int]) -> list[PolicyOptions]:
    """Prefill-first, which computes the prompt at one go, and chunked with several sizes of a step."""
    chunked = [PolicyOptions(f"chunked, {size} tokens a step", "chunked", size) for size in chunks]
    whole_tokens = longest_sequence(chunked, 0, num_prompt_tokens)
    return [PolicyOptions("whole prompt (prefill_first)", "prefill_first", whole_tokens), *chunked]


def longest_sequence(chosen: Iterable[PolicyOptions], num_running: int, num_prompt_tokens: int) -> int:
    """Tokens of the prompt and what follows it, or of a running request that goes on during all its chunks."""
    spare = min((one.max_num_batched_tokens - num_running for one in chosen), default=num_prompt_tokens)
    num_steps = TOKENS_BEFORE + TOKENS_AFTER + num_prompt_tokens // max(1, spare)
    return max(num_prompt_tokens, RUNNING_PROMPT + num_steps) + 2 * TOKENS_AFTER


def check_chunks(chosen: Iterable[PolicyOptions], num_running: int) -> None:
    """Raises ValueError where the running requests would take a step's every token."""
    smallest = min(one.max_num_batched_tokens for one in chosen)
    if smallest < 2 * num_running:
        raise ValueError(
            f"a step of {smallest} tokens beside {num_running} running requests: at least {2 * num_running} are needed"
        )


def watch_arrival(
    contender: PolicyOptions, server: SteppedSystem, num_running: int, num_prompt_tokens: int, max_tokens: int
) -> ArrivalRun:
    """Let ``num_running`` short requests decode, submit the long one, and go on until it has decoded for a while.

    ``max_tokens``: of a running request; more than the steps that all this takes.
    """
    running = {server.submit(RequestLengths(RUNNING_PROMPT, max_tokens)).sequence_id: [0.0] for _ in range(num_running)}
    while min(len(token_s) for token_s in running.values()) <= TOKENS_BEFORE:
        for sequence in server.step(float("inf")):
            running[sequence.sequence_id].append(server.now_s)
    arrived_s = server.now_s
    usual = [after - before for token_s in running.values() for before, after in pairwise(token_s[2:])]
    long = server.submit(RequestLengths(num_prompt_tokens, 2 * TOKENS_AFTER))
    first_s: float | None = None
    moments: list[tuple[float, float]] = []
    while long.num_output_tokens < TOKENS_AFTER:
        grown = {sequence.sequence_id for sequence in server.step(float("inf"))}
        if first_s is None and long.sequence_id in grown:
            first_s = server.now_s
        gaps = []
        for sequence_id in grown & running.keys():
            gaps.append(server.now_s - running[sequence_id][-1])
            running[sequence_id].append(server.now_s)
        if gaps:
            moments.append((server.now_s - arrived_s, max(gaps)))
    assert first_s is not None
    return ArrivalRun(
        contender.name,
        contender.max_num_batched_tokens,
        usual_gap_s=median(usual),
        longest_gap_s=max(gap for _, gap in moments),
        ttft_s=first_s - arrived_s,
        moments=moments,
    )


def compare_arrivals(
    servers: Mapping[PolicyOptions, SteppedSystem],
    num_running: int,
    num_prompt_tokens: int,
    served_by: str,
    machine: dict[str, Any],
) -> ArrivalReport:
    """The same arrival with each, one after the other."""
    check_chunks(servers, num_running)
    max_tokens = longest_sequence(servers, num_running, num_prompt_tokens) - RUNNING_PROMPT
    runs = [watch_arrival(c, s, num_running, num_prompt_tokens, max_tokens) for c, s in servers.items()]
    return ArrivalReport(num_running, num_prompt_tokens, served_by, machine, runs)

"""A long prompt arrives while other requests decode: how long does each of them wait for its next token?

whole prompt    d d d d [ P P P P P P P P ] d d d      no request decodes while it is computed
in chunks       d d d d [P d][P d][P d][P d] d d d     each step takes longer, and every request gets a token
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from paged_infer.bench.load import SteppedSystem
from paged_infer.bench.report import JsonReport
from paged_infer.bench.scheduling.policies import SIMULATED, PolicyOptions, open_systems
from paged_infer.bench.shapes import folder_of
from paged_infer.execution.machine import describe_machine
from paged_infer.simulation.workloads import WorkloadRequest

TOKENS_BEFORE = 24  # of each running request, before the prompt arrives
TOKENS_AFTER = 24  # of the long request: the picture shows some time after its first token
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
class ArrivalReport(JsonReport):
    num_running: int
    num_prompt_tokens: int
    served_by: str
    machine: dict[str, Any]  # empty where the clock was simulated
    runs: list[ArrivalRun]


def watch_arrival(
    policy: PolicyOptions, system: SteppedSystem, num_running: int, num_prompt_tokens: int, max_tokens: int
) -> ArrivalRun:
    """Let ``num_running`` short requests decode, submit the long one, and go on until it has decoded for a while.

    ``max_tokens``: of a running request; more than the steps that all this takes.
    """
    short = [WorkloadRequest(system.now_s, RUNNING_PROMPT, max_tokens)] * num_running
    running = {system.submit(one).sequence_id: [0.0] for one in short}
    while min(len(token_s) for token_s in running.values()) <= TOKENS_BEFORE:
        for sequence in system.step():
            running[sequence.sequence_id].append(system.now_s)
    arrived_s = system.now_s
    usual = [after - before for token_s in running.values() for before, after in pairwise(token_s[2:])]
    long = system.submit(WorkloadRequest(arrived_s, num_prompt_tokens, 2 * TOKENS_AFTER))
    first_s: float | None = None
    moments: list[tuple[float, float]] = []
    while long.num_output_tokens < TOKENS_AFTER:
        grown = {sequence.sequence_id for sequence in system.step()}
        if first_s is None and long.sequence_id in grown:
            first_s = system.now_s
        gaps = []
        for sequence_id in grown & running.keys():
            gaps.append(system.now_s - running[sequence_id][-1])
            running[sequence_id].append(system.now_s)
        if gaps:
            moments.append((system.now_s - arrived_s, max(gaps)))
    assert first_s is not None
    return ArrivalRun(
        policy.name,
        policy.max_num_batched_tokens,
        usual_gap_s=median(usual),
        longest_gap_s=max(gap for _, gap in moments),
        ttft_s=first_s - arrived_s,
        moments=moments,
    )


def run_arrival(simulate: bool, num_running: int, num_prompt_tokens: int, chunks: ReadOnlyList[int]) -> ArrivalReport:
    """The same arrival with prefill_first, which computes the prompt whole, and with chunked, for each size of a step.

    Raises:
        ValueError: the running requests alone fill a chunk.
    """
    # The longest sequence is the prompt and what follows it, or a running request that goes on during all its chunks.
    num_steps = TOKENS_BEFORE + TOKENS_AFTER + num_prompt_tokens // max(1, min(chunks) - num_running)
    longest = max(num_prompt_tokens, RUNNING_PROMPT + num_steps) + 2 * TOKENS_AFTER
    smallest = min(longest, *chunks)
    if smallest < 2 * num_running:
        raise ValueError(
            f"a step of {smallest} tokens with {num_running} running requests: at least {2 * num_running} are needed"
        )
    policies = [
        PolicyOptions("whole prompt (prefill_first)", "prefill_first", longest),
        *(PolicyOptions(f"chunked, {size} tokens a step", "chunked", size) for size in chunks),
    ]
    served_by, machine = (SIMULATED, {}) if simulate else ("random 3M decoder", describe_machine())
    with folder_of("qwen3-3m", "dummy") as model:
        systems = open_systems(policies, simulate, num_running + 1, longest, model=model, load_format="dummy")
        runs = [
            watch_arrival(policy, system, num_running, num_prompt_tokens, longest - RUNNING_PROMPT)
            for policy, system in zip(policies, systems, strict=True)
        ]
    return ArrivalReport(num_running, num_prompt_tokens, served_by, machine, runs)

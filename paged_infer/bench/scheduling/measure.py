"""``bench policies`` and ``bench arrival``: the loads, and whom they are served by."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList

from paged_infer.bench.load import StepCost
from paged_infer.bench.scheduling import arrival, policies
from paged_infer.bench.scheduling.arrival import ArrivalReport, compare_arrivals
from paged_infer.bench.scheduling.policies import Load, PoliciesReport, compare_policies, served_by_model, simulated

COST = StepCost()
SIMULATED = f"simulated steps of {1e3 * COST.per_step_s:g} ms + {1e3 * COST.per_token_s:g} ms a token"
SIMULATED_LOAD = Load(200, 10.0, (128, 1024), (32, 256), 0)
STORYTELLER_LOAD = Load(200, 12.0, (64, 512), (16, 128), 0)
SHAPE = "qwen3-3m"
RANDOM_MODEL = "random 3M decoder"


def run_policies(
    simulate: bool,
    num_requests: int,
    per_s: float | None,
    max_num_seqs: int,
    chunk_tokens: int | None,
    delays: ReadOnlyList[float],
    seed: int,
) -> PoliciesReport:
    """``per_s`` and ``chunk_tokens`` None stand for what suits whoever serves.

    Raises:
        ValueError: a delay factor below 0, or no request long enough to have gaps.
    """
    usual = SIMULATED_LOAD if simulate else STORYTELLER_LOAD
    load = Load(num_requests, per_s or usual.per_s, usual.prompts, usual.outputs, seed)
    whole_tokens = 2048 if simulate else 1024
    chosen = policies.contenders(whole_tokens, chunk_tokens or whole_tokens // 4, delays)
    if simulate:
        servers = {one: simulated(one, COST, max_num_seqs, whole_tokens) for one in chosen}
        return compare_policies(load, max_num_seqs, servers, SIMULATED, {})
    from paged_infer.bench.machine import describe_machine

    machine = describe_machine()
    engines = {one: served_by_model(one, max_num_seqs, max_model_len=whole_tokens) for one in chosen}
    return compare_policies(load, max_num_seqs, engines, "storyteller", machine)


def run_arrival(simulate: bool, num_running: int, num_prompt_tokens: int, chunks: ReadOnlyList[int]) -> ArrivalReport:
    """Raises ValueError for a chunk that the running requests fill by themselves."""
    chosen = arrival.contenders(num_prompt_tokens, chunks)
    arrival.check_chunks(chosen, num_running)
    longest = arrival.longest_sequence(chosen, num_running, num_prompt_tokens)
    if simulate:
        servers = {one: simulated(one, COST, num_running + 1, longest) for one in chosen}
        return compare_arrivals(servers, num_running, num_prompt_tokens, SIMULATED, {})
    from paged_infer.bench.machine import describe_machine
    from paged_infer.bench.shapes import folder_of

    machine = describe_machine()
    with folder_of(SHAPE, "dummy") as model:
        options = {"load_format": "dummy", "max_model_len": longest}
        engines = {one: served_by_model(one, num_running + 1, model, **options) for one in chosen}
        return compare_arrivals(engines, num_running, num_prompt_tokens, RANDOM_MODEL, machine)

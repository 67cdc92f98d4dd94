"""The priority of a request, from the caller to the policy."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from paged_infer import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from paged_infer.control.policies import Policy
from paged_infer.control.step_plan import StepPlan

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPTS = [[5, 6], [7, 8], [9, 10]]


class Recorder(Policy):
    """Keeps the priorities of what waits."""

    reads_priority = True

    def __init__(self) -> None:
        self.seen: list[int] = []

    def plan(self, step: StepPlan) -> None:
        self.seen += [sequence.priority for sequence in step.waiting]
        step.schedule_running()
        step.admit_waiting()


def ends(llm: LLM, outputs: list[Any]) -> list[int]:
    """The prompts in the order in which their requests ended."""
    return sorted(range(len(outputs)), key=lambda i: outputs[i].metrics.finished_time_s)


def test_the_lowest_number_is_served_first_and_no_token_changes(make_llm) -> None:
    llm = make_llm(max_num_seqs=1, scheduling_policy="priority")
    plain = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    urgent = llm.generate(PROMPTS, GREEDY, use_tqdm=False, priority=[2, 1, -1])
    assert ends(llm, plain) == [0, 1, 2] and ends(llm, urgent) == [2, 1, 0]
    assert [one.outputs[0].token_ids for one in plain] == [one.outputs[0].token_ids for one in urgent]


def test_a_priority_reaches_the_policy_from_everywhere(make_llm) -> None:
    policy = Recorder()
    llm = make_llm(scheduling_policy=policy)
    llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False, priority=7)
    llm.generate(PROMPTS[0], SamplingParams(n=2, max_tokens=1), use_tqdm=False, priority=6)
    llm.beam_search(PROMPTS[0], BeamSearchParams(2, 2), use_tqdm=False, priority=[5])
    list(llm.stream(PROMPTS[0], GREEDY, priority=4))
    llm.engine.add_request("mine", PROMPTS[0], GREEDY, priority=3)
    llm.engine.step()
    assert policy.seen == [7, 7, 6, 6, 5, 5, 4, 3]
    llm.engine.abort("mine")


def test_an_async_llm_passes_it_on_and_refuses_it_where_no_policy_reads_it(checkpoint) -> None:
    async def generate(priority: int, **options: Any) -> None:
        async with AsyncLLM(checkpoint("qwen3"), num_blocks=64, device="cpu", **options) as engine:
            [_ async for _ in engine.generate(PROMPTS[0], GREEDY, priority=priority)]

    policy = Recorder()
    asyncio.run(generate(2, scheduling_policy=policy))
    assert {*policy.seen} == {2}
    with pytest.raises(ValueError, match="priority=2: scheduling_policy='chunked' reads no priorities"):
        asyncio.run(generate(2))


def test_a_priority_that_would_be_ignored_and_lists_of_another_length_are_refused(llm) -> None:
    with pytest.raises(ValueError, match="prompt 0: priority=1: scheduling_policy='chunked' reads no priorities"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False, priority=1)
    with pytest.raises(ValueError, match="2 priorities for 3 prompts: pass one for all, or one for each"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False, priority=[0, 0])
    assert len(llm.generate(PROMPTS, GREEDY, use_tqdm=False, priority=0)) == 3

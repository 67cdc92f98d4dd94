"""LLMEngine: one step at a time, aborted at any moment, failing at any moment, nothing leaks."""

from __future__ import annotations

import itertools

import pytest
import torch
from effort import EFFORT
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paged_infer import SamplingParams
from paged_infer.engine.engine import LLMEngine
from paged_infer.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def serve(engine: LLMEngine) -> dict[str, list[int]]:
    said = {}
    while engine.has_unfinished_requests:
        said.update((o.request_id, o.outputs[0].token_ids) for o in engine.step().outputs)
        engine.check_integrity()
    return said


def is_idle(engine: LLMEngine) -> bool:
    stats = engine.stats()
    return (
        stats["free_blocks"] == stats["num_blocks"]
        and not stats["num_running"]
        and not stats["num_swapped"]
        and not stats["num_waiting"]
    )


def test_a_step_without_work_is_nothing(llm) -> None:
    assert llm.engine.step().outputs == [] and not llm.engine.has_unfinished_requests


def test_a_request_is_reported_once_when_it_finishes(llm) -> None:
    llm.engine.add_request("a", [5, 6], GREEDY)
    reports = [llm.engine.step().outputs for _ in range(8)]
    assert [len(r) for r in reports] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert reports[5][0].finished and reports[5][0].request_id == "a"


def test_a_streamed_request_is_reported_after_every_token(llm) -> None:
    llm.engine.add_request("a", [5, 6], GREEDY, streamed=True)
    reports = [llm.engine.step().outputs for _ in range(7)]
    assert [len(r[0].outputs[0].token_ids) for r in reports[:6]] == [1, 2, 3, 4, 5, 6]
    assert [r[0].finished for r in reports[:6]] == [False] * 5 + [True] and reports[6] == []


def test_an_id_is_served_once_at_a_time(llm) -> None:
    llm.engine.add_request("a", [5, 6], GREEDY)
    with pytest.raises(ValueError, match="request_id='a' is already being served"):
        llm.engine.add_request("a", [7], GREEDY)
    first = serve(llm.engine)
    llm.engine.add_request("a", [5, 6], GREEDY)
    assert serve(llm.engine) == first


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5, 9])
def test_an_abort_frees_everything_and_keeps_what_was_said(num_steps, make_llm) -> None:
    engine = make_llm(max_num_batched_tokens=7).engine  # the prompt of 20 takes three steps
    params = SamplingParams(temperature=0.9, n=2, seed=4, max_tokens=9, ignore_eos=True, prompt_logprobs=1, logprobs=0)
    engine.add_request("a", list(range(5, 25)), params)
    engine.add_request("b", [8, 9, 10], GREEDY)
    for _ in range(num_steps):
        engine.step()
    output = engine.abort("a")
    engine.check_integrity()
    assert output.finished and [o.finish_reason for o in output.outputs] == ["abort", "abort"]
    assert all(len(o.logprobs) == len(o.token_ids) for o in output.outputs)
    assert engine.abort("a") is None and engine.abort("never") is None
    serve(engine)
    assert is_idle(engine)


def test_the_neighbours_of_an_aborted_request_notice_nothing(make_llm) -> None:
    engine = make_llm(num_blocks=12, block_size=2).engine
    prompts = {"a": [5, 6, 7], "b": [9] * 6, "c": [11, 12]}
    alone = {}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
        alone |= serve(engine)
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
    for _ in range(3):
        engine.step()
    engine.abort("a")
    assert serve(engine) == {name: alone[name] for name in "bc"}
    assert is_idle(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_step_that_fails_can_be_tried_again(num_steps, make_llm, monkeypatch) -> None:
    engine = make_llm(max_num_batched_tokens=7, num_blocks=16, block_size=2).engine
    prompts = {str(i): [5 + i] * (3 + 4 * i) for i in range(3)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
    undisturbed = serve(engine)
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
    for _ in range(num_steps):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.executor.runner, "launch", lambda step: 1 / 0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                engine.step()
            engine.check_integrity()
    assert serve(engine) == undisturbed
    assert is_idle(engine)


def test_use_counts_the_step_in_which_a_request_ends(make_llm) -> None:
    llm = make_llm(block_size=4)
    llm.generate([5] * 9, SamplingParams(max_tokens=1), use_tqdm=False)
    stats = llm.stats()
    assert stats["peak_kv_bytes"] == 12 * llm.engine.memory.kv_bytes_per_token
    assert stats["kv_fill"] == 9 / 12


def test_block_rounding_is_all_that_memory_in_use_wastes(make_llm) -> None:
    llm = make_llm(block_size=1)
    llm.generate([[5] * 9, [6] * 4], GREEDY, use_tqdm=False)
    assert llm.stats()["kv_fill"] == 1.0
    assert llm.stats()["peak_kv_bytes"] == (14 + 9) * llm.engine.memory.kv_bytes_per_token


@pytest.fixture(scope="module", params=["recompute", "swap", "recompute-ahead", "swap-ahead"])
def small_engine(make_llm, request) -> LLMEngine:
    mode, _, ahead = request.param.partition("-")
    return make_llm(
        "gpt2-untied",
        num_blocks=9,
        block_size=3,
        max_num_seqs=3,
        max_num_batched_tokens=8,
        preemption_mode=mode,
        async_scheduling=bool(ahead),
    ).engine


POISON = 2  # its embedding is NaN, so no request that holds it can go on


@pytest.fixture(scope="module")
def poisoned_engine(small_engine) -> LLMEngine:
    with torch.no_grad():
        small_engine.decoder.embedding.weight[POISON] = torch.nan
    return small_engine


class EngineMachine(RuleBasedStateMachine):
    """Requests come, go, fail and are aborted in any order; each that ends by itself has the tokens it has alone."""

    engine: LLMEngine
    alone: dict[tuple[int, ...], list[int]]
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.num_added = 0
        self.live: dict[str, tuple[int, ...]] = {}
        self.may_fail = False
        self.cache_salt = str(next(self.numbers))  # so that no example depends on what those before it have cached

    @rule(num_prompt=st.integers(1, 20), streamed=st.booleans(), poison_at=st.integers(0, 40))
    def add(self, num_prompt: int, streamed: bool, poison_at: int) -> None:
        prompt = tuple(POISON if at == poison_at else 3 + at for at in range(num_prompt))
        self.num_added += 1
        name, salt = str(self.num_added), self.cache_salt
        self.engine.add_request(name, list(prompt), GREEDY, streamed=streamed, cache_salt=salt)
        self.live[name] = prompt

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        said = self.engine.abort(name).outputs[0].token_ids
        assert said == self.alone.get(self.live[name], said)[: len(said)]
        del self.live[name]

    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            for output in self.engine.step().outputs:
                if output.finished:
                    self.check(output, self.live.pop(output.request_id))

    def check(self, output: RequestOutput, prompt: tuple[int, ...]) -> None:
        said, is_poisoned = output.outputs[0].token_ids, POISON in prompt
        if not self.may_fail or is_poisoned:
            assert (output.outputs[0].finish_reason == "error") == is_poisoned, output
        if output.outputs[0].finish_reason == "error":
            assert said == self.alone.get(prompt, said)[: len(said)]
            assert output.request_id in output.outputs[0].error
        else:
            assert said == self.alone.setdefault(prompt, said)

    @rule(late=st.booleans())
    def fail(self, late: bool) -> None:
        """The device refuses a step, or (where steps are begun ahead) no row of one under way can be drawn from."""
        _, begun = self.engine._running or (None, None)
        if late and begun is not None and begun._sampled is not None:
            begun._sampled.host = torch.full_like(begun._sampled.host, -1)
            self.may_fail = True
            self.step(1)
            self.may_fail = False
            return
        launch = self.engine.executor.runner.launch
        self.engine.executor.runner.launch = lambda step: 1 / 0
        try:
            self.step(1)  # which may have nothing to begin
        except ZeroDivisionError:
            pass
        finally:
            self.engine.executor.runner.launch = launch

    @invariant()
    def law_2_holds(self) -> None:
        self.engine.check_integrity()
        assert self.engine.has_unfinished_requests == bool(self.live)

    def teardown(self) -> None:
        for _ in range(100 * len(self.live)):  # law 3: far more steps than they need
            if self.live:
                self.step(1)
        assert not self.live and is_idle(self.engine)


def test_requests_that_share_blocks_and_are_nan_do_not_recompute_each_other_for_ever(poisoned_engine) -> None:
    prompts = [list(range(3, 10)), [3, 4, 5, 6, 7, 8, POISON, *range(10, 16)], [3, 4, 5, 6, POISON]]
    for name, prompt in enumerate(prompts):
        poisoned_engine.add_request(str(name), prompt, GREEDY)
    outputs = [output for _ in range(100) for output in poisoned_engine.step().outputs if output.finished]
    reasons = {output.request_id: output.outputs[0].finish_reason for output in outputs}
    assert reasons == {"0": "length", "1": "error", "2": "error"}
    assert is_idle(poisoned_engine)


def test_any_order_of_adding_stepping_failing_and_aborting_leaks_nothing(poisoned_engine) -> None:
    small_engine = poisoned_engine
    machine = type("Machine", (EngineMachine,), {"engine": small_engine, "alone": {}})
    machine.TestCase.settings = settings(max_examples=25 * EFFORT, stateful_step_count=25, deadline=None)
    machine.TestCase("runTest").runTest()
    stats = small_engine.stats()
    assert stats["preemptions"] > 0 and stats["prefix_hit_tokens"] > 0
    assert (stats["blocks_swapped_in"] > 0) == (small_engine.config.preemption_mode == "swap")

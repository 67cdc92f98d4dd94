"""The door: what could never be served is refused there, with the value and the limit; nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import update

from paged_infer.control.admission import add_sequences, check_request, truncated
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.request import Request
from paged_infer.control.scheduler import Scheduler
from paged_infer.params import SamplingParams


def check(prompt, *, num_blocks=10, block_size=4, max_model_len=30, max_num_seqs=4, eos_token_ids=(), **params) -> None:
    check_request(
        prompt,
        SamplingParams(**params),
        vocab_size=100,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        manager=BlockManager(num_blocks, block_size),
        eos_token_ids=eos_token_ids,
    )


@pytest.mark.parametrize(
    ("prompt", "options", "parts"),
    [
        ([], {}, ["empty", "0 tokens", "at least 1"]),
        ([5] * 30, {}, ["30 tokens", "max_model_len=30"]),
        ([5, 100], {}, ["100", "[0, 100)"]),
        ([5, -1], {}, ["-1", "[0, 100)"]),
        ([5, 2.0], {}, ["2.0", "[0, 100)"]),
        ([5, True], {}, ["True", "[0, 100)"]),
        (["5"], {}, ["'5'", "[0, 100)"]),
        ([5], {"stop_token_ids": [100]}, ["stop_token_ids", "100", "[0, 100)"]),
        ([5], {"logit_bias": {123: 1.0}}, ["logit_bias", "123", "[0, 100)"]),
        ([5], {"stop_token_ids": range(100), "min_tokens": 1}, ["min_tokens=1", "stop_token_ids", "all 100 tokens"]),
        (
            [5],
            {"stop_token_ids": range(1, 100), "min_tokens": 2, "eos_token_ids": (0, 385)},
            ["min_tokens=2", "end-of-sequence"],
        ),
        ([5], {"logprobs": 101}, ["logprobs=101", "100"]),
        ([5], {"prompt_logprobs": 101}, ["prompt_logprobs=101", "100"]),
        ([5], {"n": 16_385}, ["n=16385", "16384"]),
        ([5] * 5, {"max_tokens": 8, "num_blocks": 2}, ["5 prompt", "8 output", "3 blocks", "num_blocks=2"]),
        ([5] * 5, {"max_tokens": None, "num_blocks": 7}, ["25 output", "8 blocks", "num_blocks=7"]),
        (
            [5] * 5,
            {"n": 9, "max_num_seqs": 3, "num_blocks": 8, "max_tokens": 8},
            ["3 sample", "9 blocks", "num_blocks=8"],
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_value_and_limit(prompt, options, parts) -> None:
    with pytest.raises(ValueError) as refusal:
        check(prompt, **options)
    assert all(part in str(refusal.value) for part in parts), refusal.value


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([5] * 29, {}),
        ([0, 99], {"stop_token_ids": [99], "logit_bias": {99: 1.0}}),
        ([5], {"logprobs": 100, "prompt_logprobs": 100}),
        ([5], {"n": 4, "max_tokens": 8}),
        ([5], {"n": 100, "max_tokens": 8}),  # samples come in as there are places: no more than 4 run at once
        ([5], {"stop_token_ids": range(100)}),
        ([5], {"stop_token_ids": range(99), "min_tokens": 1}),
        ([5], {"stop_token_ids": range(99), "min_tokens": 1, "eos_token_ids": (3, 385)}),
        ([5], {"stop_token_ids": range(1, 100), "min_tokens": 1, "eos_token_ids": (0,), "ignore_eos": True}),
        ([5] * 5, {"max_tokens": 4, "num_blocks": 2}),  # the ninth token is drawn and never stored
        ([5] * 29, {"max_tokens": 1000, "num_blocks": 8}),  # max_model_len clamps first
    ],
)
def test_the_limits_themselves_are_served(prompt, options) -> None:
    check(prompt, **options)


@given(
    num_prompt=st.integers(1, 30),
    max_tokens=st.one_of(st.none(), st.integers(1, 30)),
    num_blocks=st.integers(1, 12),
    block_size=st.integers(1, 5),
    max_model_len=st.integers(2, 40),
    n=st.integers(1, 7),
)
def test_what_the_door_lets_in_runs_to_its_end_and_what_it_refuses_cannot(
    num_prompt, max_tokens, num_blocks, block_size, max_model_len, n
) -> None:
    """The pool gate is exact: the samples that run at once fit it at their greatest length, or it is a refusal."""
    params = SamplingParams(max_tokens=max_tokens, n=n)
    manager = BlockManager(num_blocks, block_size)
    longest = min(max_model_len, num_prompt + (max_tokens or max_model_len))
    try:
        check_request(
            [5] * num_prompt, params, vocab_size=100, max_model_len=max_model_len, max_num_seqs=3, manager=manager
        )
    except ValueError:
        assert num_prompt >= max_model_len or min(n, 3) * -(-(longest - 1) // block_size) > num_blocks
        return
    assert min(n, 3) * -(-(longest - 1) // block_size) <= num_blocks
    request = Request("r", None, [5] * num_prompt, params, arrival_time_s=0.0)
    add_sequences(request, 0, 0, max_model_len, ())
    scheduler = Scheduler(manager, 3, 7)
    scheduler.add(request.sequences)
    while scheduler.has_work:
        step = scheduler.schedule()
        update(scheduler, step, dict.fromkeys(step.sampling, 5))
    assert [s.finish_reason for s in request.sequences] == ["length"] * n
    assert {s.num_tokens for s in request.sequences} == {longest}
    assert scheduler.stats.preemptions == 0


@pytest.mark.parametrize(
    ("keep", "kept"), [(None, 20), (1, 1), (5, 5), (20, 20), (50, 20), (-1, 9)]
)  # of 20, context 10
def test_truncation_keeps_the_last_tokens(keep: int | None, kept: int) -> None:
    prompt = list(range(20))
    assert truncated(prompt, SamplingParams(truncate_prompt_tokens=keep), max_model_len=10) == prompt[20 - kept :]

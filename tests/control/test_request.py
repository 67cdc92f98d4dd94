"""Sequence and Request: which moves are legal, and which token is the last."""

from __future__ import annotations

from itertools import product

import pytest

from paged_infer.control.admission import add_sequences
from paged_infer.control.request import Request
from paged_infer.control.sequence import Sequence
from paged_infer.control.sequence_state import SequenceState
from paged_infer.params import SamplingParams

WAITING, RUNNING, SWAPPED, FINISHED = SequenceState
LEGAL = {
    *((WAITING, RUNNING), (WAITING, FINISHED)),
    *((RUNNING, WAITING), (RUNNING, SWAPPED), (RUNNING, FINISHED)),
    *((SWAPPED, RUNNING), (SWAPPED, WAITING), (SWAPPED, FINISHED)),
}


def make_request(num_prompt: int = 4, max_model_len: int = 100, eos: tuple[int, ...] = (1,), **params) -> Request:
    request = Request("r", None, list(range(10, 10 + num_prompt)), SamplingParams(**params), arrival_time_s=0.0)
    add_sequences(request, 0, 5, max_model_len, eos)
    return request


def make_sequence(**options) -> Sequence:
    return make_request(**options).sequences[0]


@pytest.mark.parametrize(("start", "end"), [*product(SequenceState, repeat=2)])
def test_only_the_drawn_moves_are_legal(start: SequenceState, end: SequenceState) -> None:
    sequence = make_sequence()
    sequence.state = start
    if (start, end) in LEGAL:
        sequence.transition_to(end)
        assert sequence.state is end
    else:
        with pytest.raises(RuntimeError, match=f"cannot go from {start.value} to {end.value}"):
            sequence.transition_to(end)


def test_a_restarted_sequence_keeps_its_tokens_and_forgets_what_it_computed() -> None:
    sequence = make_sequence()
    sequence.transition_to(RUNNING)
    sequence.num_computed_tokens = 4
    sequence.append_output_token(7)
    sequence.restart()
    assert (sequence.state, sequence.num_computed_tokens) == (WAITING, 0)
    assert sequence.output_token_ids == [7] and sequence.num_uncomputed_tokens == 5


def test_any_of_several_end_tokens_ends_it() -> None:
    for token in (1, 2):
        assert make_sequence(eos=(1, 2)).append_output_token(token) == ("stop", None)
    assert make_sequence(eos=(1, 2)).append_output_token(3) is None


def test_ignore_eos_ignores_the_end_token_but_no_stop_token() -> None:
    assert make_sequence(ignore_eos=True).append_output_token(1) is None
    assert make_sequence(ignore_eos=True, stop_token_ids=[1]).append_output_token(1) == ("stop", 1)


def test_no_end_is_honoured_before_min_tokens() -> None:
    sequence = make_sequence(min_tokens=3, stop_token_ids=[9])
    assert [sequence.append_output_token(t) for t in (1, 9, 9)] == [None, None, ("stop", 9)]


def test_the_last_allowed_token_ends_it_by_length_unless_it_is_an_end_token() -> None:
    sequence = make_sequence(max_tokens=2)
    assert [sequence.append_output_token(t) for t in (5, 5)] == [None, ("length", None)]
    sequence = make_sequence(max_tokens=2)
    assert [sequence.append_output_token(t) for t in (5, 1)] == [None, ("stop", None)]


@pytest.mark.parametrize("max_tokens", [50, None])
def test_max_model_len_clamps_the_output(max_tokens: int | None) -> None:
    sequence = make_sequence(num_prompt=4, max_model_len=6, max_tokens=max_tokens)
    assert [sequence.append_output_token(t) for t in (5, 5)] == [None, ("length", None)]


def test_each_sample_grows_its_own_copy_of_the_prompt() -> None:
    request = make_request(n=3)
    request.sequences[0].append_output_token(5)
    assert [s.num_tokens for s in request.sequences] == [5, 4, 4]
    assert len(request.prompt_token_ids) == 4
    assert [(s.sequence_id, s.sample_index, s.seed) for s in request.sequences] == [(0, 0, 5), (1, 1, 5), (2, 2, 5)]


def test_a_request_is_finished_with_its_last_sample() -> None:
    request = make_request(n=2)
    request.sequences[1].finish("abort")
    assert not request.is_finished
    request.sequences[0].finish("stop", "x")
    assert request.is_finished
    assert [(s.finish_reason, s.stop_reason) for s in request.sequences] == [("stop", "x"), ("abort", None)]

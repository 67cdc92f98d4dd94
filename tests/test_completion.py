"""Completion: stop strings cut where they begin, and a stream never shows what it takes back."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_infer.completion import Completion
from paged_infer.control.request import Request, Sequence, SequenceState
from paged_infer.outputs import CompletionOutput, Logprob
from paged_infer.params import SamplingParams
from paged_infer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(text_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(text_checkpoint)


def make_sequence(**params) -> Sequence:
    request = Request("r", None, [5], SamplingParams(**{"max_tokens": None, **params}), arrival_time_s=0.0)
    request.add_sequences(0, 0, 10_000, (0,))
    request.sequences[0].move_to(SequenceState.RUNNING)
    return request.sequences[0]


def speak(
    tokenizer: Tokenizer, token_ids: list[int], *, streamed: bool = True, **params
) -> tuple[list[CompletionOutput], Sequence]:
    """Feed tokens until the sequence ends, as the engine does; its output after each of them."""
    sequence = make_sequence(**params)
    completion, outputs = Completion(sequence, tokenizer, streamed), []
    for token_id in token_ids:
        ended = sequence.append(token_id)
        if ended is not None:
            sequence.finish(*ended)
        stop = completion.advance()
        if stop is not None and not sequence.is_finished:
            sequence.finish("stop", stop)
        outputs.append(completion.output())
        if sequence.is_finished:
            break
    return outputs, sequence


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a character."""
    return [token for char in text for token in tokenizer.encode(char)]


def test_the_text_ends_before_the_first_stop_string(tokenizer) -> None:
    outputs, _ = speak(tokenizer, letters(tokenizer, "one two three"), stop=["three", "two"])
    assert outputs[-1].text == "one " and len(outputs) == len("one two")
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "two")
    assert len(outputs[-1].token_ids) == len("one two")


def test_of_two_stop_strings_in_one_token_the_earlier_place_wins(tokenizer) -> None:
    (token,) = [t for t in range(1003) if tokenizer.token_text(t) == "ab"][:1]
    outputs, _ = speak(tokenizer, [token], stop=["b", "ab"])
    assert (outputs[-1].text, outputs[-1].stop_reason) == ("", "ab")


def test_text_that_may_begin_a_stop_string_is_held_back(tokenizer) -> None:
    outputs, _ = speak(tokenizer, letters(tokenizer, "xSTOx STOP"), stop=["STOP"])
    assert [o.text for o in outputs] == ["x", "x", "x", "x", "xSTOx", *["xSTOx "] * 5]


def test_as_much_is_held_back_as_may_begin_a_stop_string(tokenizer) -> None:
    outputs, _ = speak(tokenizer, letters(tokenizer, "xaaab"), stop=["aab"])
    assert [o.text for o in outputs] == ["x", "x", "x", "xa", "xa"]


def test_what_was_held_back_comes_out_when_the_output_ends(tokenizer) -> None:
    outputs, _ = speak(tokenizer, letters(tokenizer, "a STO"), stop=["STOP"], max_tokens=5)
    assert outputs[-2].text == "a " and outputs[-1].text == "a STO"
    assert outputs[-1].finish_reason == "length"


def test_a_stop_string_completed_by_the_very_last_token_is_a_stop(tokenizer) -> None:
    outputs, _ = speak(tokenizer, letters(tokenizer, "a STOP"), stop=["STOP"], max_tokens=6)
    assert (outputs[-1].text, outputs[-1].finish_reason, outputs[-1].stop_reason) == ("a ", "stop", "STOP")


def test_no_stop_string_is_honoured_before_min_tokens(tokenizer) -> None:
    ids = letters(tokenizer, "abXcdXef")
    for min_tokens, text in ((0, "ab"), (3, "ab"), (4, "abXcd"), (6, "abXcd"), (7, "abXcdXef")):
        outputs, _ = speak(tokenizer, ids, stop=["X"], min_tokens=min_tokens)
        assert outputs[-1].text == text, min_tokens


def test_the_end_token_is_in_the_ids_and_not_in_the_text(tokenizer) -> None:
    for streamed in (True, False):
        outputs, _ = speak(tokenizer, [*letters(tokenizer, "abc"), 0], streamed=streamed)
        assert outputs[-1].text == "abc" and outputs[-1].token_ids[-1] == 0
        outputs, _ = speak(
            tokenizer, letters(tokenizer, "abc"), streamed=streamed, stop_token_ids=letters(tokenizer, "c")
        )
        assert outputs[-1].text == "ab" and len(outputs[-1].token_ids) == 3
        assert outputs[-1].stop_reason == outputs[-1].token_ids[-1]


def test_half_a_character_is_shown_when_the_output_ends_there(tokenizer) -> None:
    ids = tokenizer.encode("é!")
    for streamed in (True, False):
        outputs, _ = speak(tokenizer, ids, streamed=streamed, max_tokens=1)
        assert outputs[-1].text == tokenizer.decode(ids[:1])


def test_an_abort_shows_what_was_held_back(tokenizer) -> None:
    sequence = make_sequence(stop=["STOP"])
    completion = Completion(sequence, tokenizer, True)
    for token in [*letters(tokenizer, "a STO"), *tokenizer.encode("é")[:1]]:
        sequence.append(token)
        completion.advance()
    assert completion.output().text == "a "
    sequence.finish("abort")
    assert completion.output().text == completion.output().text == "a STO\N{REPLACEMENT CHARACTER}"


@given(
    text=st.text("abcX é你", max_size=25),
    stops=st.lists(st.text("abcX ", min_size=1, max_size=4), max_size=3),
    min_tokens=st.integers(0, 6),
)
def test_a_stream_only_grows_and_ends_as_the_whole_does(tokenizer, text, stops, min_tokens) -> None:
    ids = [*tokenizer.encode(text), 0]
    min_tokens = min(min_tokens, len(ids))
    streamed, _ = speak(tokenizer, ids, stop=stops, min_tokens=min_tokens)
    at_once, _ = speak(tokenizer, ids, streamed=False, stop=stops, min_tokens=min_tokens)
    assert streamed[-1] == at_once[-1]
    for before, after in itertools.pairwise(streamed):
        assert after.text.startswith(before.text)
        assert before.finish_reason is None
    last = streamed[-1]
    if last.stop_reason is None:
        assert last.text == text and last.finish_reason == "stop"
    else:
        assert text.startswith(last.text + last.stop_reason)
    if not min_tokens:
        assert not any(stop in last.text for stop in stops)


def test_cumulative_logprob_is_the_sum_over_the_chosen_tokens() -> None:
    sequence = make_sequence(logprobs=1)
    completion = Completion(sequence, None, False)
    for token, logprob in ((7, -0.5), (8, -2.0)):
        sequence.append(token)
        completion.advance([{token: Logprob(logprob, 3), 9: Logprob(-0.1, 1)}])
    output = completion.output()
    assert output.cumulative_logprob == -2.5 and [list(row) for row in output.logprobs] == [[7, 9], [8, 9]]
    assert output.text == ""

"""OutputProcessor: stop strings cut where they begin, and a stream never shows what it takes back."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from checkpoints import save_llama_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from paged_infer.control.admission import add_sequences
from paged_infer.control.request import Request
from paged_infer.control.sequence import Sequence
from paged_infer.control.sequence_state import SequenceState
from paged_infer.outputs import CompletionOutput, Logprob
from paged_infer.params import SamplingParams
from paged_infer.text.output_processor import OutputProcessor
from paged_infer.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(text_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(text_checkpoint)


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Its decoder strips the first space of a text."""
    path = tmp_path_factory.mktemp("llama")
    save_llama_tokenizer(path)
    return Tokenizer.from_pretrained(path)


def make_sequence(prompt: list[int] | None = None, **params) -> Sequence:
    """After a prompt, or after an end token, which has no text."""
    params = SamplingParams(**{"max_tokens": None, **params})
    request = Request("r", None, prompt or [0], params, arrival_time_s=0.0)
    add_sequences(request, 0, 0, 10_000, (0,))
    request.sequences[0].transition_to(SequenceState.RUNNING)
    return request.sequences[0]


def speak(
    tokenizer: Tokenizer, token_ids: list[int], *, streamed: bool = True, prompt: list[int] | None = None, **params
) -> tuple[list[CompletionOutput], Sequence]:
    """Feed tokens until the sequence ends, as the engine does; its output after each of them."""
    sequence = make_sequence(prompt, **params)
    completion, outputs = OutputProcessor(sequence, tokenizer, streamed), []
    for token_id in token_ids:
        ended = sequence.append_output_token(token_id)
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


@pytest.mark.parametrize("streamed", [True, False])
def test_a_stop_string_that_is_a_special_token_ends_the_text(tokenizer, streamed) -> None:
    (turn,) = [t for t in range(10) if tokenizer.token_text(t) == "<|turn|>"]
    ids = [*letters(tokenizer, "ab"), *tokenizer.encode("é")[:1], turn, *letters(tokenizer, "cd")]
    outputs, sequence = speak(tokenizer, ids, streamed=streamed, stop=["x", "<|turn|>"], ignore_eos=True)
    last = outputs[-1]
    assert (last.text, last.finish_reason, last.stop_reason) == ("ab\N{REPLACEMENT CHARACTER}", "stop", "<|turn|>")
    assert last.token_ids == sequence.output_token_ids == ids[:4]
    assert all(last.text.startswith(output.text) for output in outputs)


def test_a_stop_string_that_is_a_special_token_waits_for_min_tokens(tokenizer) -> None:
    ids = [0, *letters(tokenizer, "ab"), 0, *letters(tokenizer, "cd")]
    outputs, _ = speak(tokenizer, ids, stop=["<|end|>"], ignore_eos=True, min_tokens=2)
    assert (outputs[-1].text, outputs[-1].stop_reason, len(outputs)) == ("ab", "<|end|>", 4)


def test_text_held_back_that_is_a_stop_string_comes_before_the_special_token(tokenizer) -> None:
    ids = [*tokenizer.encode("a👍"), 0]
    outputs, _ = speak(tokenizer, ids, stop=["<|end|>", "👍"], ignore_eos=True)
    assert (outputs[-1].text, outputs[-1].stop_reason) == ("a", "👍")


def test_an_end_token_that_is_also_a_stop_string_is_the_reason_by_its_name(tokenizer) -> None:
    outputs, _ = speak(tokenizer, [*letters(tokenizer, "a"), 0], stop=["<|end|>"])
    assert (outputs[-1].text, outputs[-1].finish_reason, outputs[-1].stop_reason) == ("a", "stop", "<|end|>")


@pytest.mark.parametrize("streamed", [True, False])
def test_the_first_space_of_a_llama_text_is_kept_and_can_stop_it(llama_tokenizer, streamed) -> None:
    prompt = llama_tokenizer.encode("once")
    ids = llama_tokenizer.encode("once upon. a")[len(prompt) :]
    outputs, _ = speak(llama_tokenizer, ids, streamed=streamed, prompt=prompt, max_tokens=len(ids))
    assert outputs[-1].text == " upon. a"
    outputs, _ = speak(llama_tokenizer, ids, streamed=streamed, prompt=prompt, stop=[" up"])
    assert (outputs[-1].text, outputs[-1].stop_reason) == ("", " up")


def test_a_character_that_the_prompt_begins_is_whole_in_the_text(tokenizer) -> None:
    ids = tokenizer.encode("a你b")
    for streamed, stop in ((True, ()), (False, ()), (False, ["你"])):
        outputs, _ = speak(tokenizer, ids[2:], streamed=streamed, prompt=ids[:2], stop=stop, max_tokens=len(ids) - 2)
        assert outputs[-1].text == ("" if stop else "你b")


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
    completion = OutputProcessor(sequence, tokenizer, True)
    for token in [*letters(tokenizer, "a STO"), *tokenizer.encode("é")[:1]]:
        sequence.append_output_token(token)
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
    completion = OutputProcessor(sequence, None, False)
    for token, logprob in ((7, -0.5), (8, -2.0)):
        sequence.append_output_token(token)
        completion.advance([{token: Logprob(logprob, 3), 9: Logprob(-0.1, 1)}])
    output = completion.output()
    assert output.cumulative_logprob == -2.5 and [list(row) for row in output.logprobs] == [[7, 9], [8, 9]]
    assert output.text == ""

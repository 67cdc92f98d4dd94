"""StreamingDecoder: the pieces join to the whole text, cut only where no later token changes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    ENDLESS,
    ENDLESS_BYTES,
    EVERY_KIND,
    FAMILY,
    KINDS,
    LINES,
    TEXTS,
    CountingTokenizer,
    byte_fallback,
    byte_id,
    byte_level,
    metaspace,
    word_pieces,
    words,
)

from paged_infer.text.continuation import continuation, num_shared, prompt_text
from paged_infer.text.detokenizer import StreamingDecoder, num_settled
from paged_infer.text.tokenizer import Tokenizer


def stream(tokenizer: Tokenizer, token_ids: Sequence[int], chunk: int = 1) -> list[str]:
    decoder = StreamingDecoder(tokenizer)
    pieces = [decoder.push(token_ids[i : i + chunk]) for i in range(0, len(token_ids), chunk)]
    return [*pieces, decoder.finish()]


def cuts(pieces: Sequence[str]) -> Iterator[int]:
    """Positions in the joined text where one piece ends and another, not empty, begins."""
    position = 0
    for piece in pieces:
        if piece and position:
            yield position
        position += len(piece)


class TestStreamingDecoder:
    @KINDS
    @settings(max_examples=100, deadline=None)
    @given(text=TEXTS, chunk=st.integers(1, 5))
    def test_the_pieces_join_to_the_whole_text(self, make: Any, text: str, chunk: int) -> None:
        ids = make().encode(text)
        assert "".join(stream(make(), ids, chunk)) == make().decode(ids)

    @KINDS
    @settings(max_examples=100, deadline=None)
    @given(data=st.data(), chunk=st.integers(1, 5))
    def test_the_pieces_join_to_the_whole_for_ids_that_are_no_text(
        self, make: Any, data: st.DataObject, chunk: int
    ) -> None:
        tokenizer = make()
        any_id = st.integers(0, tokenizer.vocab_size + 3)  # a padded vocabulary has ids that name no token
        utf8 = st.sampled_from(["é", "你", "😀", FAMILY]).map(
            lambda text: [byte_id(tokenizer, b) for b in text.encode()]
        )
        some_byte = st.integers(0, 255).map(lambda byte: [byte_id(tokenizer, byte)])
        parts = data.draw(st.lists(any_id.map(lambda i: [i]) | some_byte | utf8, max_size=40))
        ids = [token_id for part in parts for token_id in part]
        assert "".join(stream(tokenizer, ids, chunk)) == tokenizer.decode(ids)

    @KINDS
    @settings(max_examples=100, deadline=None)
    @given(text=TEXTS)
    @example(text=f"a{FAMILY}b")
    def test_a_cluster_is_cut_only_after_a_base_that_goes_out_at_once(self, make: Any, text: str) -> None:
        tokenizer = make()
        pieces = stream(tokenizer, tokenizer.encode(text))
        whole = "".join(pieces)
        bounds = {match.end() for match in regex.finditer(r"\X", whole)}
        at_once = regex.compile(r"[\p{ASCII}\p{Latin}\p{Cyrillic}\p{Greek}\p{Han}\p{Hiragana}\p{Katakana}가-힣。]")
        for cut in cuts(pieces):
            assert cut in bounds or at_once.match(whole[cut - 1]), (whole[:cut], whole[cut:])

    @KINDS
    def test_an_emoji_of_several_code_points_comes_out_in_one_piece(self, make: Any) -> None:
        for emoji in (FAMILY, "👍🏽", "🇩🇪", "✈️"):
            ids = make().encode(f"a {emoji} b")
            pieces = stream(make(), ids)
            assert sum(emoji in piece for piece in pieces) == 1, pieces

    @pytest.mark.parametrize("text", [LINES[0], LINES[1], LINES[2], "Жили-были", "`x` ^ 2 ```python\nprint(1)\n```"])
    def test_text_without_marks_or_emoji_streams_with_no_delay(self, text: str) -> None:
        tokenizer = byte_level()
        ids = tokenizer.encode(text)
        decoder = StreamingDecoder(tokenizer)
        so_far = ""
        for count, token_id in enumerate(ids, start=1):
            so_far += decoder.push([token_id])
            assert so_far == tokenizer.decode(ids[:count]).removesuffix("\ufffd")
        assert decoder.finish() == ""

    def test_an_open_run_of_byte_tokens_is_held_because_one_bad_byte_spoils_all_of_it(self) -> None:
        tokenizer = byte_fallback()
        ids = [byte_id(tokenizer, byte) for byte in "好".encode()]
        decoder = StreamingDecoder(tokenizer)
        assert [decoder.push([token_id]) for token_id in ids] == ["", "", ""]
        assert decoder.push([byte_id(tokenizer, 0xFF)]) + decoder.finish() == "\ufffd" * 4
        closed = StreamingDecoder(tokenizer)
        assert closed.push(ids) == ""
        assert closed.push(tokenizer.encode("a")) == "好 a"

    @KINDS
    def test_special_tokens_and_unknown_ids_in_the_middle_leave_no_trace(self, make: Any) -> None:
        tokenizer = make()
        first, second, *rest = [byte_id(tokenizer, byte) for byte in "é!".encode()]
        silent = [tokenizer.eos_token_id, tokenizer.vocab_size + 7]
        ids = [*silent, first, *silent, second, *silent, *rest, *silent]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "é!"

    @KINDS
    def test_a_leading_space_is_what_the_whole_decode_makes_of_it(self, make: Any) -> None:
        tokenizer = make()
        for text in (" the the", "  the", "the", " "):
            ids = tokenizer.encode(text) * 12
            assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)

    @KINDS
    @pytest.mark.parametrize("text", [*ENDLESS, *ENDLESS_BYTES])
    def test_the_cost_of_a_token_does_not_grow_with_the_text(self, make: Any, text: str | bytes) -> None:
        tokenizer = make()
        ids = tokenizer.encode(text) if isinstance(text, str) else [byte_id(tokenizer, byte) for byte in text]
        ids = (ids * 1000)[:1000]
        counting = CountingTokenizer(tokenizer._hf)
        decoder = StreamingDecoder(counting)
        so_far = "".join(decoder.push([token_id]) for token_id in ids)
        is_open_run = all(token_id in tokenizer.byte_tokens for token_id in ids) and so_far == ""
        assert is_open_run or len(decoder._window_ids) < 160
        assert so_far + decoder.finish() == tokenizer.decode(ids)
        assert counting.num_decoded <= 64 * len(ids)

    def test_finish_gives_the_rest_once(self) -> None:
        decoder = StreamingDecoder(byte_level())
        assert decoder.push(byte_level().encode("👍")) == ""
        assert [decoder.finish(), decoder.finish()] == ["👍", ""]

    def test_an_endless_cluster_goes_out_in_parts(self) -> None:
        assert num_settled("é" + "\u0301" * 20) == 0
        assert num_settled("é" + "\u0301" * 40) == 41


def streamed_after(tokenizer: Tokenizer, prompt: Sequence[int], token_ids: Sequence[int], chunk: int) -> list[str]:
    decoder = StreamingDecoder(tokenizer, prompt)
    pieces = [decoder.push(token_ids[i : i + chunk]) for i in range(0, len(token_ids), chunk)]
    return [*pieces, decoder.finish()]


def token_ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Tokens of texts, tokens that are no text, ids that name none, and where there are such, bytes."""
    parts = TEXTS.map(tokenizer.encode) | st.integers(0, tokenizer.vocab_size + 3).map(lambda i: [i])
    if tokenizer.byte_tokens or tokenizer is byte_level():
        utf8 = st.sampled_from(["é", "你", "😀", FAMILY, "\ufffd"]).map(str.encode)
        spelled = utf8 | st.integers(0, 255).map(lambda byte: bytes([byte]))
        parts |= spelled.map(lambda data: [byte_id(tokenizer, byte) for byte in data])
    return st.lists(parts, max_size=20).map(lambda found: [i for part in found for i in part])


class TestContinuation:
    @EVERY_KIND
    @settings(max_examples=100, deadline=None)
    @given(data=st.data(), chunk=st.integers(1, 5))
    def test_prompt_and_text_are_the_decode_of_the_whole(self, make: Any, data: st.DataObject, chunk: int) -> None:
        tokenizer = make()
        ids = data.draw(token_ids_of(tokenizer))
        split = data.draw(st.integers(0, len(ids)))
        prompt, output = ids[:split], ids[split:]
        before, text, whole = (
            prompt_text(tokenizer, prompt),
            continuation(tokenizer, prompt, output),
            tokenizer.decode(ids),
        )
        assert "".join(streamed_after(tokenizer, prompt, output, chunk)) == text
        if before + text != whole:  # only where the output spoils a run of bytes that the prompt has begun
            assert before[: num_shared(before, whole)] + text == whole
            spoiled = [i for i in prompt if not tokenizer.is_silent(i)][-1]
            assert spoiled in tokenizer.byte_tokens and text.startswith("\ufffd")

    @KINDS
    @pytest.mark.parametrize("text", ["你", "😀", f"the {FAMILY}!", "a\ufffd你"])
    def test_a_split_inside_a_character_leaves_it_whole_to_the_output(self, make: Any, text: str) -> None:
        tokenizer = make()
        ids = [byte_id(tokenizer, byte) for byte in text.encode()]
        for split in range(len(ids) + 1):
            prompt, output = ids[:split], ids[split:]
            joined = prompt_text(tokenizer, prompt) + continuation(tokenizer, prompt, output)
            assert joined == text
            streamed = "".join(streamed_after(tokenizer, prompt, output, 1))
            assert prompt_text(tokenizer, prompt) + streamed == text

    @pytest.mark.parametrize("make", [byte_fallback, metaspace, word_pieces, words], ids=lambda make: make.__name__)
    def test_the_first_space_of_an_output_is_kept(self, make: Any) -> None:
        tokenizer = make()
        prompt = tokenizer.encode("the")
        (fox,) = {tuple(tokenizer.encode("the the fox")[len(tokenizer.encode("the the")) :])}
        assert continuation(tokenizer, prompt, fox) == " fox"
        assert "".join(streamed_after(tokenizer, prompt, fox, 1)) == " fox"

    @EVERY_KIND
    def test_a_text_prompt_and_its_text_are_the_whole(self, make: Any) -> None:
        tokenizer = make()
        ids = tokenizer.encode("the fox a")
        for split in range(len(ids) + 1):
            assert (
                prompt_text(tokenizer, ids[:split]) + continuation(tokenizer, ids[:split], ids[split:]) == "the fox a"
            )

    @KINDS
    @pytest.mark.parametrize("text", [*ENDLESS, *ENDLESS_BYTES])
    def test_the_cost_of_a_prompt_is_that_of_its_end(self, make: Any, text: str | bytes) -> None:
        tokenizer = make()
        data = text.encode() if isinstance(text, str) else text
        ids = tokenizer.encode(text) if isinstance(text, str) else [byte_id(tokenizer, byte) for byte in data]
        ids = [tokenizer.encode("a")[-1], *(ids * 1000)[:1000]]
        counting = CountingTokenizer(tokenizer._hf)
        decoder = StreamingDecoder(counting, ids)
        so_far = "".join(decoder.push([token_id]) for token_id in ids[:200]) + decoder.finish()
        assert so_far == continuation(tokenizer, ids, ids[:200])
        ends_in_run = ids[-1] in tokenizer.byte_tokens  # all of which has to be seen
        assert counting.num_decoded <= 64 * (200 + (len(ids) if ends_in_run else 0)) + 600

"""Calls are found in an answer wherever its text is split; what is no call stays content."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_infer.text.reasoning_parsers import AnswerParser, ReasoningParser
from paged_infer.text.tool_parsers import Delta, HermesParser, JsonParser, NamedParser, ToolCallDelta, ToolParser


class Parsed(NamedTuple):
    reasoning: str
    content: str
    calls: list[tuple[str, str]]  # name, arguments


def parsed(parser: ToolParser | ReasoningParser | AnswerParser, pieces: Iterable[str]) -> Parsed:
    """The deltas of the pieces joined as a client joins them."""
    reasoning = content = ""
    calls: list[list[str]] = []
    ids = []
    for delta in itertools.chain(map(parser.feed, pieces), (parser.finish() for _ in range(1))):
        reasoning, content = reasoning + delta.reasoning, content + delta.content
        for call in delta.tool_calls:
            if call.id is not None:
                assert call.index == len(calls) and call.name
                calls.append([call.name, ""])
                ids.append(call.id)
            else:
                assert call.name is None and call.arguments
            calls[call.index][1] += call.arguments
    assert len(set(ids)) == len(calls)
    return Parsed(reasoning, content, [(name, arguments) for name, arguments in calls])


def hermes(text: str) -> Parsed:
    return parsed(HermesParser(), [text])


def llama(text: str) -> Parsed:
    return parsed(JsonParser(), [text])


OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TAGGED = f"<tool_call>\n{OSLO}\n</tool_call>"
WEATHER = ("weather", '{"city": "Oslo"}')


# -- hermes ------------------------------------------------------------------------------------------------------------


def test_a_call_is_taken_out_of_the_content_around_it() -> None:
    assert hermes(f"Let me look.\n{TAGGED}") == ("", "Let me look.", [WEATHER])
    assert hermes(TAGGED + "\n") == ("", "", [WEATHER])
    assert hermes(f"A{TAGGED}\nB") == ("", "A\nB", [WEATHER])


def test_several_calls_are_numbered_in_order() -> None:
    other = TAGGED.replace("Oslo", "Rome")
    assert hermes(f"{TAGGED}\n{other}").calls == [WEATHER, ("weather", '{"city": "Rome"}')]
    assert hermes(f"{TAGGED}\n{other}").content == ""


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ('{"name": "f", "arguments": {}}', "{}"),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": {"a": {}}}', '{"a": {}}'),
        ('{"arguments": {"a": [1, {"b": "}"}]}, "name": "f"}', '{"a": [1, {"b": "}"}]}'),
        ('{"id": 7, "name": "f", "arguments": {"a": 1 } , "x": null}', '{"a": 1 }'),
        ('{"name": "f", "parameters": {"name": "g", "arguments": {}}}', '{"name": "g", "arguments": {}}'),
        ('{"name": "f", "arguments": {"a": "</tool_call>\\" {"}}', '{"a": "</tool_call>\\" {"}'),
        ('{"name": "f", "arguments": {"a": "é\\u00e9你😀"}}', '{"a": "é\\u00e9你😀"}'),
        ('{"name": "f", "arguments": {"a": 1}', '{"a": 1}'),  # without its last brace, as small models write it
        ('{"name": "f", "arguments": {"a": 1}}}', '{"a": 1}'),
    ],
)
def test_arguments_are_passed_on_as_they_were_written(call: str, arguments: str) -> None:
    assert hermes(f"<tool_call>{call}</tool_call>!") == ("", "!", [("f", arguments)])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>weather(Oslo)</tool_call>",
        '<tool_call>{"name": "f", "arguments": "Oslo"}</tool_call> ',
        '<tool_call>{"name": "f", "arguments": null}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
        '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>',
        '<tool_call> {"name": "f", ',
        "<tool_call>",
        "a < b, <tool",
        "  <tool_call></tool_call>\n\n",
    ],
)
def test_what_is_no_call_stays_content(text: str) -> None:
    assert hermes(text) == ("", text, [])


def test_a_call_after_a_broken_one_is_found() -> None:
    broken = "<tool_call>{oops}</tool_call>\n"
    assert hermes(broken + TAGGED) == ("", broken.rstrip(), [WEATHER])


def test_arguments_that_stop_being_json_are_passed_on_as_they_are() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call> and more'
    assert hermes(text) == ("", " and more", [("f", '{"a": oops}}')])


def test_a_truncated_call_has_the_beginning_of_its_arguments() -> None:
    assert hermes('<tool_call>{"name": "f", "arguments": {"a": "Os').calls == [("f", '{"a": "Os')]


def test_a_call_without_its_end_marker_ends_at_the_next() -> None:
    assert hermes(f"<tool_call>{OSLO}\n{TAGGED}") == ("", "", [WEATHER, WEATHER])


def test_arguments_are_streamed_as_they_come() -> None:
    parser = HermesParser(lambda: "call_1")
    first = parser.feed('Hi <tool_call>{"name": "f", "arguments": {"a')
    assert first == Delta("Hi", (ToolCallDelta(0, "call_1", "f", '{"a'),))
    assert parser.feed('": 1') == Delta("", (ToolCallDelta(0, arguments='": 1'),))
    assert parser.feed("}}</tool") == Delta("", (ToolCallDelta(0, arguments="}"),))
    assert parser.feed("_call>") == parser.finish() == Delta()


def test_content_is_streamed_as_it_comes() -> None:
    parser = HermesParser()
    assert [parser.feed(piece).content for piece in ("One", " two ", "<to", "p", " late")] == [
        "One",
        " two",
        "",
        " <top",
        " late",
    ]


# -- llama3_json -------------------------------------------------------------------------------------------------------


def test_an_answer_of_objects_is_calls() -> None:
    call = OSLO.replace("arguments", "parameters")
    assert llama(call) == llama(f" {OSLO}\n") == ("", "", [WEATHER])
    assert llama(f'{{"type": "function", {call[1:]}; {call}').calls == [WEATHER, WEATHER]


@pytest.mark.parametrize(
    "text", ["It is cold.", f"Say {OSLO}", '{"city": "Oslo"} ', '{"name": "f"', "[1]", " ; ", "", "{oops}; {}"]
)
def test_other_answers_are_content(text: str) -> None:
    assert llama(text) == ("", text, [])


def test_text_after_the_calls_is_content() -> None:
    assert llama(f"{OSLO}; then {{}}") == ("", "; then {}", [WEATHER])
    assert llama(f'{OSLO} {{"a": 1}}') == ("", ' {"a": 1}', [WEATHER])


# -- chosen by the request ---------------------------------------------------------------------------------------------


def test_a_list_of_calls_as_the_grammar_of_required_has_them() -> None:
    text = '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {"a": [1]}}]'
    assert parsed(JsonParser(between="[,]"), [text]) == ("", "", [("f", "{}"), ("g", '{"a": [1]}')])


def test_the_answer_to_a_named_choice_is_the_arguments() -> None:
    assert parsed(NamedParser("f"), ['{"a', '": 1}']) == ("", "", [("f", '{"a": 1}')])
    assert parsed(NamedParser("f"), []) == ("", "", [])


# -- reasoning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "text", "reasoning", "content"),
    [
        ("opening", "<think>\nHm.\n</think>\n\nYes", "\nHm.\n", "\n\nYes"),
        ("opening", "Yes <think>", "", "Yes <think>"),
        ("opening", "<thi", "", "<thi"),
        ("opening", "<think>\n\n</think>Yes", "\n\n", "Yes"),
        ("reasoning", "Hm.</think>Yes</think>", "Hm.", "Yes</think>"),
        ("reasoning", "<think>Hm.</think>", "Hm.", ""),
        ("reasoning", "Hm. </thi", "Hm. </thi", ""),  # cut off by max_tokens
        ("reasoning", "", "", ""),
        ("content", "<think>Yes</think>", "", "<think>Yes</think>"),
    ],
)
def test_reasoning_ends_at_its_marker(first: str, text: str, reasoning: str, content: str) -> None:
    assert parsed(ReasoningParser(first), [text]) == (reasoning, content, [])


def test_calls_are_looked_for_only_in_the_content() -> None:
    parser = AnswerParser(ReasoningParser("reasoning"), HermesParser())
    assert parsed(parser, [f"I could {TAGGED}.</think>\n\n{TAGGED}"]) == (f"I could {TAGGED}.", "", [WEATHER])
    assert parser.has_calls


def test_calls_beyond_max_calls_are_dropped() -> None:
    parser = AnswerParser(None, HermesParser(), max_calls=1)
    assert parsed(parser, [TAGGED, TAGGED]).calls == [WEATHER]


# -- the law -----------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("</tool_call>"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=2)
CALLS = st.builds(
    lambda name, arguments, key, ascii_only, indent: json.dumps(
        {"name": name, key: arguments}, ensure_ascii=ascii_only, indent=indent
    ),
    st.sampled_from(["f", "wettér"]),
    ARGUMENTS,
    st.sampled_from(["arguments", "parameters"]),
    st.booleans(),
    st.sampled_from([None, 1]),
)
NOISE = st.sampled_from(
    [*'{}[]",:;<\\ \n', "<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "', '"arguments": {', "你", "x"]
)
TAGGED_CALLS = CALLS.map(lambda call: f"<tool_call>\n{call}\n</tool_call>")
STREAMS = st.lists(NOISE | CALLS | TAGGED_CALLS, max_size=8).map("".join)
PARSERS: dict[str, Callable[[], ToolParser | AnswerParser]] = {
    "hermes": HermesParser,
    "llama3_json": JsonParser,
    "list": lambda: JsonParser(between="[,]"),
    "named": lambda: NamedParser("f"),
    "reasoning and hermes": lambda: AnswerParser(ReasoningParser("reasoning"), HermesParser()),
    "opening and llama3_json": lambda: AnswerParser(ReasoningParser("opening"), JsonParser()),
}


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=40)
@given(STREAMS, st.data())
def test_every_split_of_a_stream_is_parsed_as_the_whole(name: str, text: str, data) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole = parsed(PARSERS[name](), [text])
    assert parsed(PARSERS[name](), pieces) == parsed(PARSERS[name](), text) == whole


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["f", "g"]), ARGUMENTS), min_size=1, max_size=3), st.booleans())
def test_written_calls_are_read_back(calls: list[tuple[str, dict]], ascii_only: bool) -> None:
    objects = [json.dumps({"name": n, "arguments": a}, ensure_ascii=ascii_only) for n, a in calls]
    tagged = "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
    for found in (
        hermes(tagged),
        llama("; ".join(objects)),
        parsed(JsonParser(between="[,]"), [f"[{','.join(objects)}]"]),
    ):
        assert found.content == "" and [(n, json.loads(a)) for n, a in found.calls] == calls


@settings(max_examples=30)
@given(st.lists(NOISE.filter(lambda text: "name" not in text), max_size=12).map("".join))
def test_an_answer_without_calls_is_content_to_the_last_character(text: str) -> None:
    assert hermes(text) == llama(text) == ("", text, [])


def test_many_beginnings_of_calls_take_time_in_proportion() -> None:
    """Each is given up at its first character that is not JSON, not at the end of the answer."""
    parser, text = HermesParser(), '<tool_call>{"name": "' * 2_000
    fed = 0

    class Counted(type(parser._call)):  # type: ignore[misc]
        def feed(self, char: str) -> bool:
            nonlocal fed
            fed += 1
            return super().feed(char)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paged_infer.text.tool_parsers.CallScanner", Counted)
        assert parsed(parser, [text]).content == text
    assert fed < 3 * len(text)

"""Tools over HTTP, with OpenAI's client: see ``tool_serving`` for what makes the model call them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from serving import Served, error_of
from tool_serving import ADD, NOW, call_text, scripted, tool_serving

ASK: list[dict[str, Any]] = [{"role": "user", "content": "What is 2 + 3?"}]
BODY: dict[str, Any] = {"model": "storyteller", "messages": ASK, "tools": [ADD, NOW]}
ADD_2_3 = call_text("add", '{"a": 2, "b": 3}')
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with tool_serving(tmp_path_factory.mktemp("tools")) as one:
        yield one


@pytest.fixture
def served(tool_server: Served) -> Iterator[Served]:
    yield tool_server
    tool_server.check_idle()


def prompt_of(served: Served, **body: Any) -> str:
    """What the model was asked, after the template."""
    answer = served.post(PATH, **{**BODY, **body}, max_tokens=1, return_token_ids=True)
    assert answer.status_code == 200, answer.text
    return served.engine.tokenizer.decode(answer.json()["prompt_token_ids"])  # type: ignore[union-attr]


def test_a_tool_loop(served) -> None:
    client, messages = served.openai(), list[Any](ASK)
    with scripted(served, f"Let me add.\n{ADD_2_3}", "It is 5."):
        choice = client.chat.completions.create(**BODY).choices[0]
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content, call.type) == ("tool_calls", "Let me add.", "function")
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 2, "b": 3})
        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
        last = client.chat.completions.create(**{**BODY, "messages": messages}).choices[0]
    assert (last.finish_reason, last.message.content, last.message.tool_calls) == ("stop", "It is 5.", None)
    shown = prompt_of(served, messages=[m if isinstance(m, dict) else m.model_dump() for m in messages])
    lines = shown.splitlines()
    assert json.loads(lines[0].removeprefix("T ")) == ADD
    assert lines[3:] == [
        "user: What is 2 + 3?",
        'assistant: Let me add.<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>',
        "tool: 5",
        "assistant:",
    ]


def test_a_stream_has_the_call_in_pieces_that_join_to_the_whole(served) -> None:
    client, text = served.openai(), f"Sum:\n{ADD_2_3}\n{call_text('now', '{}')}"
    with scripted(served, text, text):
        whole = client.chat.completions.create(**BODY).choices[0]
        with client.chat.completions.stream(**BODY) as stream:
            chunks = [event.chunk for event in stream if event.type == "chunk"]
            joined = stream.get_final_completion().choices[0]
    for choice in (whole, joined):
        assert choice.message.content == "Sum:" and choice.finish_reason == "tool_calls"
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert calls == [("add", '{"a": 2, "b": 3}'), ("now", "{}")]
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.function.name for call in deltas if call.id is not None] == ["add", "now"]
    assert len({call.id for call in deltas} - {None}) == 2
    assert len([call for call in deltas if call.index == 0]) > 3, "the arguments came in one piece"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]


@pytest.mark.parametrize("stream", [False, True])
def test_only_one_call_where_parallel_calls_are_not_wanted(served, stream: bool) -> None:
    with scripted(served, ADD_2_3 + ADD_2_3):
        answer = served.openai().chat.completions.create(**BODY, parallel_tool_calls=False, stream=stream)
        pieces = [c.choices[0].delta for c in answer] if stream else [answer.choices[0].message]
    assert {getattr(call, "index", 0) for piece in pieces for call in piece.tool_calls or []} == {0}


@pytest.mark.parametrize(
    "text", ["It is 5.", "<tool_call>add(2, 3)</tool_call>", '<tool_call>{"name": "add", "arguments": 5}</tool_call> ?']
)
def test_an_answer_that_calls_nothing_is_content(served, text: str) -> None:
    with scripted(served, text, text):
        choice = served.openai().chat.completions.create(**BODY).choices[0]
        pieces = [chunk.choices[0].delta for chunk in served.openai().chat.completions.create(**BODY, stream=True)]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
    assert "".join(piece.content or "" for piece in pieces) == text and not any(piece.tool_calls for piece in pieces)


def test_a_name_that_was_not_offered_is_passed_on(served) -> None:
    """As in vLLM: the client has to check it, as it has to check the arguments."""
    with scripted(served, call_text("sub", '{"a": 1}')):
        (call,) = served.openai().chat.completions.create(**BODY).choices[0].message.tool_calls
    assert call.function.name == "sub"


def test_a_call_that_max_tokens_cuts_off_ends_with_length(served) -> None:
    with scripted(served, call_text("add", json.dumps({"a": "2" * 100}))):
        answer = served.openai().chat.completions.create(**BODY, max_tokens=60)
    choice = answer.choices[0]
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == 60
    assert choice.message.tool_calls[0].function.arguments.startswith('{"a": "2')


def test_without_tools_or_with_none_calls_are_text(served) -> None:
    with scripted(served, ADD_2_3, ADD_2_3):
        for more in ({"tools": None}, {"tool_choice": "none"}):
            message = served.openai().chat.completions.create(**{**BODY, **more}).choices[0].message
            assert (message.content, message.tool_calls) == (ADD_2_3, None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [False, None])
def test_required_calls_follow_the_schemas(served, parallel: bool | None, stream: bool) -> None:
    """Here the model chooses freely what the grammar of the tools allows."""
    body = {**BODY, "tool_choice": "required", "parallel_tool_calls": parallel, "seed": 4, "max_tokens": 900}
    (closing,) = served.engine.tokenizer.encode("]")
    body["logit_bias"] = {closing: 20}  # else the model goes on with calls for long
    if stream:
        with served.openai().chat.completions.stream(**body) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = served.openai().chat.completions.create(**body).choices[0]
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    calls = choice.message.tool_calls
    assert len(calls) == 1 if parallel is False else calls
    for call in calls:
        arguments = json.loads(call.function.arguments)
        schema = ADD["function"]["parameters"] if call.function.name == "add" else {"const": {}}
        jsonschema.validate(arguments, schema)


def test_a_named_call_is_made_and_ends_with_stop(served) -> None:
    """OpenAI's finish_reason for it, and vLLM's."""
    choice = served.openai().chat.completions.create(
        **BODY, tool_choice={"type": "function", "function": {"name": "add"}}
    )
    (call,) = choice.choices[0].message.tool_calls
    assert call.function.name == "add" and choice.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(call.function.arguments), ADD["function"]["parameters"])


def with_parameters(**schema: Any) -> list[dict[str, Any]]:
    return [NOW, {"type": "function", "function": {"name": "f", "parameters": schema}}]


DEEP: dict[str, Any] = {}
for _ in range(100):
    DEEP = {"items": DEEP}
CALLED = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": "{oops"}}]}
REQUIRED = {"tool_choice": "required"}


@pytest.mark.parametrize(
    ("more", "param", "reason"),
    [
        ({"tools": None, "tool_choice": "auto"}, "tool_choice", "tool_choice='auto': needs tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "tool_choice='required': needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice", "add, now"),
        ({"tools": [ADD, ADD]}, "tools", r"tools[1]: the name 'add' must be unique"),
        ({"tools": with_parameters(**DEEP)}, "tools", "nested deeper than 64"),
        (
            {"tools": with_parameters(type="string"), **REQUIRED},
            "tools",
            r"tools[1].function.parameters: type='string'",
        ),
        (
            {"tools": with_parameters(anyOf=[{"type": "object"}, {"type": "null"}]), **REQUIRED},
            "tools",
            r"tools[1].function.parameters: must be 'object'",
        ),
        (
            {"tools": with_parameters(properties={"a": {"type": "strin"}}), **REQUIRED},
            "tools",
            r"tools[1].function.parameters/properties/a: type=",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported with tools"),
        ({**REQUIRED, "structured_outputs": {"regex": "a"}}, "structured_outputs", "not supported with tools"),
        ({**REQUIRED, "use_beam_search": True, "max_tokens": 9}, "tools", "use_beam_search"),
        ({"messages": [*ASK, CALLED]}, "messages", "arguments='{oops': is not valid JSON"),
        ({"functions": [{"name": "f"}]}, "functions", "tools and tool_choice"),
        ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs", "no variable 'thinking'"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", "'tokenize' is not a variable"),
        ({"include_reasoning": False}, "include_reasoning", "needs --reasoning-parser"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_it(served, more: Any, param: str, reason: str) -> None:
    error = error_of(served.post(PATH, **{**BODY, **more}), 400)
    assert error["param"] == param and reason in error["message"], error


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant"},
        {"role": "user", "content": None},
        {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]},
    ],
)
def test_a_malformed_message_is_a_422(served, message: Any) -> None:
    assert error_of(served.post(PATH, messages=[message]), 422)["param"] == "messages"


def test_variables_reach_the_chat_template(served) -> None:
    assert prompt_of(served, chat_template_kwargs={"enable_thinking": True}).endswith("assistant:<think>")
    assert prompt_of(served, chat_template_kwargs={"enable_thinking": False}).endswith("assistant:")

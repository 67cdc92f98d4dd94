"""``reasoning`` beside ``content``, and what is bound by a grammar behind it; see ``tool_serving`` for the answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from serving import Served, error_of
from tool_serving import ADD, call_text, scripted, tool_serving

from paged_infer import AsyncLLM, storyteller
from paged_infer.server.app import create_app
from paged_infer.server.service import Settings

BUDGET = 6
CHAT: dict[str, Any] = {
    "model": "storyteller",
    "messages": [{"role": "user", "content": "Where is the key?"}],
    "max_tokens": 200,
    "seed": 3,
}
OPEN = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": BUDGET}
"""The template opens the reasoning; the budget ends it, in the middle of what the storyteller thinks."""
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def reasoning_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with tool_serving(tmp_path_factory.mktemp("reasoning"), reasoning_parser="qwen3") as one:
        yield one


@pytest.fixture
def served(reasoning_server: Served) -> Iterator[Served]:
    yield reasoning_server
    reasoning_server.check_idle()


def answered(served: Served, **more: Any) -> tuple[dict[str, Any], str]:
    """The message and its finish reason; its stream joins to the same."""
    response = served.post(PATH, **{**CHAT, **more})
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    lines = served.post(PATH, **{**CHAT, **more}, stream=True).text.split("\n\n")
    pieces = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    for name in ("reasoning", "content"):
        joined = "".join(piece["delta"].get(name) or "" for piece in pieces)
        assert joined == (choice["message"].get(name) or "")
    assert pieces[-1]["finish_reason"] == choice["finish_reason"]
    return choice["message"], choice["finish_reason"]


def test_what_comes_before_the_marker_is_reasoning(served) -> None:
    with scripted(served, "In the box.", "In the box."):
        message, finish_reason = answered(served, **OPEN)
    assert message["content"] == "In the box." and finish_reason == "stop"
    assert message["reasoning"] and "think" not in message["reasoning"]


def test_the_reasoning_of_a_stream_comes_before_its_content(served) -> None:
    with scripted(served, "In the box."):
        stream = served.openai().chat.completions.create(
            **CHAT, extra_body=OPEN, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks]
    kinds = [name for delta in deltas for name in ("reasoning", "content") if delta.get(name)]
    assert kinds == sorted(kinds, reverse=True) and set(kinds) == {"reasoning", "content"}
    assert last.usage.completion_tokens_details.reasoning_tokens >= BUDGET


def test_an_answer_that_opens_no_reasoning_is_content(served) -> None:
    with scripted(served, "In the box.", "In the box."):
        message, _ = answered(served)
    assert (message["content"], message["reasoning"]) == ("In the box.", None)


def test_reasoning_can_be_left_out(served) -> None:
    with scripted(served, "In the box.", "In the box."):
        message, _ = answered(served, **OPEN, include_reasoning=False)
    assert message["content"] == "In the box." and "reasoning" not in message


def test_calls_are_looked_for_only_in_the_content(served) -> None:
    text = call_text("add", '{"a": 2, "b": 3}')
    with scripted(served, text, text):
        message, finish_reason = answered(served, **OPEN, tools=[ADD])
    (call,) = message["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": 2, "b": 3} and finish_reason == "tool_calls"
    assert message["reasoning"] and message["content"] is None


def test_a_required_call_comes_after_the_reasoning(served) -> None:
    body = {**OPEN, "tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}
    message, finish_reason = answered(served, **body)
    jsonschema.validate(json.loads(message["tool_calls"][0]["function"]["arguments"]), ADD["function"]["parameters"])
    assert message["reasoning"] and finish_reason == "tool_calls"


def test_a_document_comes_after_the_reasoning(served) -> None:
    schema = {"enum": ["red", "blue"]}
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}}
    message, finish_reason = answered(served, **OPEN, response_format=form)
    jsonschema.validate(json.loads(message["content"]), schema)
    assert message["reasoning"] and finish_reason == "stop"


def test_an_answer_that_ends_within_its_reasoning_has_no_content(served) -> None:
    message, finish_reason = answered(served, **OPEN, max_tokens=3)
    assert (message["content"], finish_reason) == ("", "length") and message["reasoning"]


def test_a_message_with_its_reasoning_can_be_sent_back(served) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "In the box.", "reasoning": "Hm."}]
    assert served.post(PATH, **{**CHAT, "messages": messages, "max_tokens": 1}).status_code == 200
    messages[0] = {**messages[0], "reasoning": "Hm."}
    assert error_of(served.post(PATH, messages=messages), 422)["param"] == "messages"


def test_a_marker_that_is_no_text_is_refused_before_the_server_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A special token is left out of the text, so nothing could be told from it."""
    engine = AsyncLLM(storyteller.PATH, num_blocks=32)
    monkeypatch.setattr(type(engine.tokenizer), "special_tokens", {"<tool_call>": 5})
    with pytest.raises(ValueError, match="<tool_call> is a special token"):
        create_app(engine, Settings(tool_call_parser="hermes"))

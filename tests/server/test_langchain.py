"""langchain's client runs a tool loop and reads answers into a model; see ``tool_serving`` for what the model says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from holding import LIMIT_S
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import DefaultHttpxClient
from pydantic import BaseModel
from serving import NO_TLS, Served
from tool_serving import call_text, scripted, tool_serving


@tool
def add(a: int, b: int) -> int:
    """a + b"""
    return a + b


class Car(BaseModel):
    """A car."""

    colour: Literal["red", "blue"]
    is_old: bool


@pytest.fixture(scope="module")
def tool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with tool_serving(tmp_path_factory.mktemp("langchain")) as one:
        yield one


@pytest.fixture
def chat(tool_server: Served) -> Iterator[ChatOpenAI]:
    client = DefaultHttpxClient(timeout=LIMIT_S, **NO_TLS)
    options: dict[str, Any] = {"base_url": f"{tool_server.url}/v1", "api_key": "unused", "model": "storyteller"}
    yield ChatOpenAI(**options, max_retries=0, http_client=client, max_tokens=200)
    tool_server.check_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop(tool_server: Served, chat: ChatOpenAI, stream: bool) -> None:
    bound, question = chat.bind_tools([add]), HumanMessage("What is 2 + 3?")
    with scripted(tool_server, call_text("add", '{"a": 2, "b": 3}'), "It is 5."):
        if stream:
            first, *rest = list(bound.stream([question]))
            asked: AIMessage = sum(rest, first)  # type: ignore[arg-type]
        else:
            asked = bound.invoke([question])
        (call,) = asked.tool_calls
        assert (call["name"], call["args"]) == ("add", {"a": 2, "b": 3}) and not asked.invalid_tool_calls
        result = add.invoke(call)
        assert isinstance(result, ToolMessage) and result.content == "5"
        assert bound.invoke([question, asked, result]).content == "It is 5."


def test_arguments_that_are_not_json_are_invalid_calls(tool_server: Served, chat: ChatOpenAI) -> None:
    with scripted(tool_server, call_text("add", '{"a": two}')):
        answer = chat.bind_tools([add]).invoke("What is 2 + 3?")
    assert not answer.tool_calls and answer.invalid_tool_calls[0]["name"] == "add"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_answers_are_read_into_a_model(chat: ChatOpenAI, method: Any) -> None:
    assert isinstance(chat.with_structured_output(Car, method=method).invoke("A car?"), Car)

"""Tools, their calls and variables reach the chat template, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from small_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast

from paged_infer.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.reasoning_content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.a }}){% endfor %};{% endfor %}"
    "{% if thinks is defined and not thinks %}quick{% endif %}"
)
ASK = {"role": "user", "content": "x"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


@pytest.fixture
def tokenizer() -> Tokenizer:
    backend = byte_level()._hf.backend_tokenizer
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE))


def called(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}], **more}


def rendered(tokenizer: Tokenizer, *messages: Any, **more: Any) -> str:
    return tokenizer.decode(tokenizer.apply_chat_template(messages, **more))


def test_the_template_describes_the_tools(tokenizer: Tokenizer) -> None:
    assert rendered(tokenizer, ASK, tools=[TOOL]) == "[f]user:x;"
    assert rendered(tokenizer, ASK, tools=[]) == rendered(tokenizer, ASK) == "user:x;"


def test_a_template_without_a_place_for_tools_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer._hf.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"tools\[0\]: the chat template has no place for tools: it leaves out 'f'"):
        rendered(tokenizer, {**ASK, "content": "f"}, tools=[TOOL])


def test_a_call_has_its_arguments_as_a_dict(tokenizer: Tokenizer) -> None:
    """However they are given: templates read their members, or write them as JSON."""
    for arguments in ('{"a": 1}', {"a": 1}):
        assert rendered(tokenizer, ASK, called(arguments)) == "user:x;assistant:(f 1);"
    for nothing in ("", None, "{}"):
        assert rendered(tokenizer, called(nothing, content=None)) == "assistant:(f );"
    assert rendered(tokenizer, called({"a": 1}, content="y", reasoning_content="z")) == "assistant:yz(f 1);"


def test_an_answer_of_a_tool_is_a_message(tokenizer: Tokenizer) -> None:
    assert rendered(tokenizer, {"role": "tool", "tool_call_id": "1", "content": "5"}) == "tool:5;"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (called("{"), r"\['tool_calls'\]\[0\]: arguments='{': is not valid JSON"),
        (called("[1]"), r"arguments=\[1\]: must be a JSON object"),
        ({"role": "assistant", "content": "x", "tool_calls": {}}, "must be a list, not dict"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"function": {}}]}, r"\[0\] must be {'function'"),
        ({"role": "assistant"}, "has no 'content'"),
    ],
)
def test_a_malformed_call_is_named(tokenizer: Tokenizer, message: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"messages\[1\].*{reason}"):
        rendered(tokenizer, ASK, message)


def test_a_template_that_leaves_out_a_call_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer._hf.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template leaves out this 'assistant' message"):
        rendered(tokenizer, ASK, called({}, content="f"))


def test_variables_reach_the_template(tokenizer: Tokenizer) -> None:
    assert rendered(tokenizer, ASK, chat_template_kwargs={"thinks": False}) == "user:x;quick"
    assert rendered(tokenizer, ASK, chat_template_kwargs={"thinks": True}) == "user:x;"


@pytest.mark.parametrize("name", ["think", "tokenize", "messages", "self", "tools", "chat_template"])
def test_a_variable_that_is_not_the_templates_own_is_refused(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(ValueError, match=rf"chat_template_kwargs: .*'{name}'"):
        rendered(tokenizer, ASK, chat_template_kwargs={name: 1})


@pytest.mark.parametrize("tool", ["f", {}, {"function": {"name": 3}}])
def test_a_malformed_tool_is_named(tokenizer: Tokenizer, tool: Any) -> None:
    with pytest.raises(ValueError, match=r"tools\[1\] must be {'type': 'function'"):
        rendered(tokenizer, ASK, tools=[TOOL, tool])

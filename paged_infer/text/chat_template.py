"""Check a conversation and adapt it to a tokenizer's chat template, so that the template drops no message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
NO_TEXT = ("file", "image_url", "input_audio", "refusal", "video_url")  # kinds of content parts
MARK = "m9e3779b97f4a7c15m"  # placeholder for a message's content; letters and digits survive trimming


def check_text(text: str, where: str = "") -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise ValueError(
            f"{where}character {lone!r} at position {error.start} is an unpaired surrogate, not text"
        ) from None


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages, each with its content as one str. A ValueError names the first malformed one."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of {{'role', 'content'}}, not {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty: a conversation needs at least one message")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{index}] must be a dict, not {type(message).__name__}")
        calls = _checked_calls(message.get("tool_calls"), f"messages[{index}]['tool_calls']")
        missing = [key for key in ("role", "content") if key not in message and not (calls and key == "content")]
        if missing:
            raise ValueError(f"messages[{index}] has no {missing[0]!r}; it has {sorted(map(str, message))}")
        if message["role"] not in ROLES:
            raise ValueError(f"messages[{index}]['role']={message['role']!r}: must be one of {', '.join(ROLES)}")
        where, content = f"messages[{index}]['content']", message.get("content")
        text = "" if content is None and calls else content_text(content, where)
        check_text(text, f"{where}: ")
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        checked.append({**kept, "content": text, **({"tool_calls": calls} if calls else {})})
    return checked


def _checked_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The tool calls of an assistant's message, with their arguments as dicts, as chat templates expect them."""
    if not isinstance(calls, (list, tuple, type(None))):
        raise ValueError(f"{where} must be a list, not {type(calls).__name__}")
    checked = []
    for index, call in enumerate(calls or ()):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}[{index}] must be {{'function': {{'name': str, 'arguments': JSON}}}}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            check_text(arguments, f"{where}[{index}]: arguments: ")
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}[{index}]: arguments={arguments!r:.80}: is not valid JSON: {error}") from None
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{where}[{index}]: arguments={arguments!r:.80}: must be a JSON object")
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def checked_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools. A ValueError names the first malformed one."""
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            form = "{'type': 'function', 'function': {'name': str, 'description': str, 'parameters': dict}}"
            raise ValueError(f"tools[{index}] must be {form}")
    return [dict(tool) for tool in tools]


def check_shows_tools(tools: list[dict[str, Any]], render: Callable[..., str]) -> None:
    """Raises ValueError if the template leaves out a tool. ``render`` applies it to a conversation and ``tools``."""
    marked = [{**tool, "function": {**tool["function"], "name": f"{MARK}{i}m"}} for i, tool in enumerate(tools)]
    shown = set(re.findall(rf"{MARK}(\d+)m", render(tools=marked)))
    for index, tool in enumerate(tools):
        if str(index) not in shown:
            name = tool["function"]["name"]
            raise ValueError(f"tools[{index}]: the chat template has no place for tools: it leaves out {name!r}")


def check_variables(variables: Mapping[str, Any], template: str, reserved: Container[str]) -> None:
    """Raises ValueError for a variable that the template does not read, or that is set by the renderer."""
    for name in variables:
        if not isinstance(name, str) or name in reserved or name in ("messages", "self"):
            raise ValueError(f"chat_template_kwargs: {name!r} is not a variable of the chat template")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"chat_template_kwargs: the chat template has no variable {name!r}")


def content_text(content: Any, where: str) -> str:
    """The text of a message's content: a str, or OpenAI's list of text parts, which are joined by newlines.

    Raises:
        ValueError: anything else; the message begins with ``where`` and names the type of a part that is not text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(f"{where} must be a str or a list of text parts, not {type(content).__name__}")
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind in NO_TEXT:
            raise ValueError(f"{where}: content of type {kind} is not supported")
        if kind != "text" or not isinstance(part.get("text"), str):
            form = "{'type': 'text', 'text': str}"
            raise ValueError(f"{where}[{index}]: a part of type {kind!r} must be {form}")
    return "\n".join(part["text"] for part in content)


def fitted_messages(
    messages: list[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str]
) -> list[dict[str, Any]]:
    """The messages in roles that the template renders: "developer" becomes "system" if the template needs it.

    Args:
        render: applies the template; raises ValueError where the template raises.

    Raises:
        ValueError: the template rejects the messages, or leaves one out; the error names it.
    """
    candidates = [messages]
    if any(message["role"] == "developer" for message in messages):
        known = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        candidates.append(known)
    errors = []
    for candidate in candidates:
        try:
            lost = _first_lost(candidate, render)
        except ValueError as error:
            errors.append(error)
            continue
        if lost is None:
            return candidate
        role = messages[lost]["role"]
        errors.append(ValueError(f"messages[{lost}]: the chat template leaves out this {role!r} message"))
    raise errors[0]


def _first_lost(messages: list[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str]) -> int | None:
    """Index of the first message with content that is missing from the rendered conversation."""
    # A template may change a message's content (trim it, cut its reasoning), and a short content may occur in the
    # template's own text. So render unique marks in place of the contents and of the names of called functions, and
    # look for those.
    marks = [f"{MARK}{index}m" if message["content"] else "" for index, message in enumerate(messages)]
    calls = [[f"{MARK}{i}c{j}m" for j, _ in enumerate(m.get("tool_calls", ()))] for i, m in enumerate(messages)]
    try:
        text = render([_marked(*one) for one in zip(messages, marks, calls, strict=True)])
    except ValueError:  # the template depends on the contents, or rejects the messages in any case
        text, marks = render(messages), [message["content"].strip() for message in messages]
        calls = [[call["function"]["name"] for call in message.get("tool_calls", ())] for message in messages]
    text = text.lower()
    wanted = ([mark, *names] for mark, names in zip(marks, calls, strict=True))
    return next((index for index, each in enumerate(wanted) if any(one.lower() not in text for one in each)), None)


def _marked(message: dict[str, Any], mark: str, names: list[str]) -> dict[str, Any]:
    marked = {**message, "content": mark}
    if names:
        pairs = zip(message["tool_calls"], names, strict=True)
        marked["tool_calls"] = [{**call, "function": {**call["function"], "name": name}} for call, name in pairs]
    return marked

"""Check a conversation and fit it to a tokenizer's chat template, so that the template drops no message."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        missing = [key for key in ("role", "content") if key not in message]
        if missing:
            raise ValueError(f"messages[{index}] has no {missing[0]!r}; it has {sorted(map(str, message))}")
        if message["role"] not in ROLES:
            raise ValueError(f"messages[{index}]['role']={message['role']!r}: must be one of {', '.join(ROLES)}")
        where = f"messages[{index}]['content']"
        text = content_text(message["content"], where)
        check_text(text, f"{where}: ")
        checked.append({**message, "content": text})
    return checked


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
    # A template may change a content (trim it, cut its reasoning), and a short content may occur in the template's
    # own text. So render unique marks in place of the contents and look for those.
    marks = [f"{MARK}{index}m" if message["content"] else "" for index, message in enumerate(messages)]
    try:
        text = render([{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
    except ValueError:  # the template depends on the contents, or rejects the messages in any case
        text, marks = render(messages), [message["content"].strip() for message in messages]
    text = text.lower()
    return next((index for index, mark in enumerate(marks) if mark.lower() not in text), None)

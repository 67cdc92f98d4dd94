"""One message of a conversation in ``/v1/chat/completions``: a role and text."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from paged_infer.server.openai.base_model import ListOf, StrictModel
from paged_infer.server.openai.errors import APIError
from paged_infer.server.openai.fields import TEXT, TOOLS, Refused, is_harmless
from paged_infer.text.chat_template import NO_TEXT

UNSUPPORTED = {
    "annotations": Refused(TEXT, ([],)),
    "audio": Refused(TEXT),
    "function_call": Refused(TOOLS),
    "refusal": Refused("a refusal is not passed to the chat template"),
    "tool_call_id": Refused(TOOLS),
    "tool_calls": Refused(TOOLS, ([],)),
}
"""Fields of OpenAI's messages that are refused by name. ``null`` is harmless in all of them: clients send answers back
unchanged, and ours contain ``"refusal": null``."""


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    refused_by_name: ClassVar[Container[str]] = UNSUPPORTED

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[TextPart]
    name: str | None = None  # passed to the chat template

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        for name, refused in UNSUPPORTED.items():
            if not is_harmless(message.get(name), refused):
                raise _unsupported(name, refused.why)
        for part in content if isinstance(content := message.get("content"), list) else ():
            if isinstance(part, dict) and part.get("type") in NO_TEXT:
                raise _unsupported(f"content of type {part['type']}", TEXT)
        return {name: value for name, value in message.items() if name not in UNSUPPORTED}

    def as_dict(self) -> dict[str, Any]:
        """The form that ``LLM.chat`` takes."""
        content: Any = self.content
        if not isinstance(self.content, str):
            content = [part.model_dump() for part in self.content]
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


def _unsupported(what: str, why: str) -> APIError:
    message = f"messages: {what} is not supported: {why}"
    return APIError(400, message, param="messages", code="unsupported_field")

"""One message of a conversation in ``/v1/chat/completions``: a role, text, and tool calls."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from paged_infer.server.openai.base_model import ListOf, StrictModel
from paged_infer.server.openai.errors import APIError
from paged_infer.server.openai.fields import FUNCTIONS, TEXT, Refused, is_harmless
from paged_infer.text.chat_template import NO_TEXT

UNSUPPORTED = {
    "annotations": Refused(TEXT, ([],)),
    "audio": Refused(TEXT),
    "function_call": Refused(FUNCTIONS),
    "refusal": Refused("a refusal is not passed to the chat template"),
}
"""Fields of OpenAI's messages that are refused by name. ``null`` is harmless in all of them: clients send answers back
unchanged, and ours contain ``"refusal": null``."""


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class CalledFunction(StrictModel):
    name: str
    arguments: str | None = None  # JSON


class ToolCall(StrictModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(StrictModel):
    """A message. All its fields are passed to the chat template."""

    refused_by_name: ClassVar[Container[str]] = UNSUPPORTED

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[TextPart] | None = None
    name: str | None = None
    tool_calls: ListOf[ToolCall] | None = None  # of an assistant
    tool_call_id: str | None = None  # of a tool's answer
    reasoning: str | None = None  # of an assistant
    reasoning_content: str | None = None  # its old name

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

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("missing", "content is needed")
        for name in ("tool_calls", "reasoning", "reasoning_content"):
            if getattr(self, name) and self.role != "assistant":
                raise PydanticCustomError("wrong_role", f"only an assistant's message has {name}")
        return self

    def as_dict(self) -> dict[str, Any]:
        """The form that ``LLM.chat`` takes."""
        message = self.model_dump(exclude_none=True)
        if not self.tool_calls:
            message.pop("tool_calls", None)
        if (reasoning := self.reasoning or self.reasoning_content) is not None:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}  # templates read either
        return message


def _unsupported(what: str, why: str) -> APIError:
    message = f"messages: {what} is not supported: {why}"
    return APIError(400, message, param="messages", code="unsupported_field")

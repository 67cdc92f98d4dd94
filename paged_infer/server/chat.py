"""/v1/chat/completions: a conversation is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from paged_infer.async_engine import QueueFullError
from paged_infer.outputs import CompletionOutput, RequestOutput
from paged_infer.server.answers import Growth, chat_logprobs
from paged_infer.server.completions import ANSWER, ERRORS
from paged_infer.server.protocol import ChatCompletionRequest
from paged_infer.server.service import EventStream, service_of, unless_gone
from paged_infer.server.shape import Shape

router = APIRouter()


@router.post("/v1/chat/completions", responses={200: ANSWER, **ERRORS})
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation, put into the form of the tokenizer's chat template."""
    service = service_of(request)
    shape = _ChatShape(
        service, service.check_model(body.model), "chatcmpl", body.stream_options, body.top_logprobs or 0
    )
    params = body.params()
    try:
        prompt = await service.engine.chat_prompt(
            [message.as_dict() for message in body.messages],
            truncates=body.truncate_prompt_tokens is not None,
        )
    except (ValueError, QueueFullError) as error:
        raise service.explained(error, "messages") from None
    streams = await service.open(
        [prompt],
        params,
        shape.id,
        stream=bool(body.stream),
        cache_salt=body.cache_salt,
        prompt_field="messages",
    )
    if body.stream:
        return EventStream(shape.events(streams), streams)
    answer = await unless_gone(request, shape.answer(streams))
    return Response(status_code=499) if answer is None else answer


@dataclass
class _ChatShape(Shape):
    num_top: int

    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"

    def choice(self, growth: Growth, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": growth.text(one), "refusal": None}
        return {"message": message, "logprobs": self._logprobs(growth, one)}

    def piece(
        self, growth: Growth, output: RequestOutput, one: CompletionOutput, is_first: bool
    ) -> dict[str, Any] | None:
        text, logprobs = growth.text(one), self._logprobs(growth, one)
        delta = {"role": "assistant", "content": text} if is_first else {"content": text} if text else {}
        has_tokens = logprobs is not None and logprobs["content"]
        if not (delta or has_tokens or one.finish_reason):
            return None
        return {"delta": delta, "logprobs": logprobs}

    def _logprobs(self, growth: Growth, one: CompletionOutput) -> dict[str, Any] | None:
        return None if one.logprobs is None else chat_logprobs(*growth.rows(one), self.num_top)

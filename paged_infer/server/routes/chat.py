"""/v1/chat/completions: a conversation is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from paged_infer.async_llm import QueueFullError
from paged_infer.outputs import CompletionOutput, RequestOutput
from paged_infer.server.openai.event_stream import EventStream, unless_gone
from paged_infer.server.openai.json_stream import Growth, chat_logprobs, named_by_id
from paged_infer.server.openai.protocol import ChatCompletionRequest
from paged_infer.server.routes.completions import ANSWER, ERRORS
from paged_infer.server.routes.responses import Shape
from paged_infer.server.service import service_of

router = APIRouter()


@router.post("/v1/chat/completions", responses={200: ANSWER, **ERRORS})
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation, put into the form of the tokenizer's chat template."""
    service = service_of(request)
    shape = _ChatShape(service, service.check_model(body.model), "chatcmpl", body)
    params = body.params()
    try:
        prompt = await service.engine.chat_prompt(
            [message.as_dict() for message in body.messages], truncates=body.truncate_prompt_tokens is not None
        )
    except (ValueError, QueueFullError) as error:
        raise service.explained(error, "messages") from None
    streams = await service.open(
        [prompt], params, shape.label, stream=bool(body.stream), cache_salt=body.cache_salt, prompt_field="messages"
    )
    if body.stream:
        return EventStream(shape.events(streams), streams)
    answer = await unless_gone(request, shape.answer(streams))
    return Response(status_code=499) if answer is None else answer


@dataclass
class _ChatShape(Shape):
    body: ChatCompletionRequest

    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"

    def choice(self, growth: Growth, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": growth.text(one), "refusal": None}
        return {"message": message, "logprobs": self._logprobs(growth, one)}

    def opening(self) -> dict[str, Any]:
        """The role in its own chunk, as OpenAI sends it: its JavaScript client reads a first chunk's logprobs twice."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(
        self, growth: Growth, output: RequestOutput, one: CompletionOutput, is_first: bool
    ) -> dict[str, Any] | None:
        text, logprobs = growth.text(one), self._logprobs(growth, one)
        delta = {"content": text} if text else {}
        has_tokens = logprobs is not None and logprobs["content"]
        if not (delta or has_tokens or one.finish_reason):
            return None
        return {"delta": delta, "logprobs": logprobs}

    def _logprobs(self, growth: Growth, one: CompletionOutput) -> dict[str, Any] | None:
        if one.logprobs is None:
            return None
        token_ids, rows = growth.rows(one)
        if self.body.return_tokens_as_token_ids:
            rows = named_by_id(rows)
        return chat_logprobs(token_ids, rows, self.body.top_logprobs or 0, self.service.engine.tokenizer)

    def about_request(self, output: RequestOutput) -> dict[str, Any]:
        return self.about_prompt(output)  # a chat has one prompt

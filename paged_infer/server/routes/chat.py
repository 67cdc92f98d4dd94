"""/v1/chat/completions: answer a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from paged_infer.async_llm import QueueFullError
from paged_infer.outputs import CompletionOutput, RequestOutput
from paged_infer.server.openai.json_stream import DeltaTracker, chat_logprobs, named_by_id
from paged_infer.server.openai.protocol import ChatCompletionRequest
from paged_infer.server.routes.completions import ANSWER, ERRORS
from paged_infer.server.routes.responses import ResponseBuilder
from paged_infer.server.service import service_of

router = APIRouter()


@router.post("/v1/chat/completions", responses={200: ANSWER, **ERRORS})
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation, rendered with the tokenizer's chat template."""
    service = service_of(request)
    builder = _ChatBuilder(service, service.check_model(body.model), "chatcmpl", body)
    params = body.params()
    try:
        prompt = await service.engine.chat_prompt(
            [message.as_dict() for message in body.messages], truncates=body.truncate_prompt_tokens is not None
        )
    except (ValueError, QueueFullError) as error:
        raise service.to_api_error(error, "messages") from None
    return await builder.respond(request, [prompt], params, "messages")


@dataclass
class _ChatBuilder(ResponseBuilder):
    body: ChatCompletionRequest

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": tracker.text(one), "refusal": None}
        return {"message": message, "logprobs": self._logprobs(tracker, one)}

    def opening(self) -> dict[str, Any]:
        """The role in its own chunk, as OpenAI sends it: its JavaScript client reads a first chunk's logprobs twice."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def chunk(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any] | None:
        text, logprobs = tracker.text(one), self._logprobs(tracker, one)
        delta = {"content": text} if text else {}
        has_tokens = logprobs is not None and logprobs["content"]
        if not (delta or has_tokens or one.finish_reason):
            return None
        return {"delta": delta, "logprobs": logprobs}

    def _logprobs(self, tracker: DeltaTracker, one: CompletionOutput) -> dict[str, Any] | None:
        if one.logprobs is None:
            return None
        token_ids, rows = tracker.rows(one)
        if self.body.return_tokens_as_token_ids:
            rows = named_by_id(rows)
        return chat_logprobs(token_ids, rows, self.body.top_logprobs or 0, self.service.engine.tokenizer)

    def about_request(self, output: RequestOutput) -> dict[str, Any]:
        return self.about_prompt(output)  # a chat has only one prompt

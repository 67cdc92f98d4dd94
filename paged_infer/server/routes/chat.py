"""/v1/chat/completions: answer a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from paged_infer.async_llm import QueueFullError
from paged_infer.outputs import CompletionOutput, RequestOutput
from paged_infer.server.openai.errors import APIError
from paged_infer.server.openai.json_stream import DeltaTracker, chat_logprobs, described_call, named_by_id
from paged_infer.server.openai.protocol import ChatCompletionRequest
from paged_infer.server.openai.tools import tool_parser
from paged_infer.server.routes.completions import ANSWER, ERRORS
from paged_infer.server.routes.responses import ResponseBuilder
from paged_infer.server.service import service_of
from paged_infer.text.reasoning_parsers import AnswerParser, ReasoningParser
from paged_infer.text.tool_parsers import Delta, ToolParser

router = APIRouter()
LONG_ANSWER = 4096  # characters, whose tool calls take some milliseconds to parse


@router.post("/v1/chat/completions", responses={200: ANSWER, **ERRORS})
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation, rendered with the tokenizer's chat template."""
    service = service_of(request)
    builder = _ChatBuilder(service, service.check_model(body.model), "chatcmpl", body)
    params = body.params()
    builder.new_tool_parser()  # raises an APIError if the server has none
    if body.include_reasoning is False and service.engine.reasoning_parser is None:
        raise APIError(400, "include_reasoning=false: needs --reasoning-parser", param="include_reasoning")
    try:
        prompt = await service.engine.chat_prompt(
            [message.as_dict() for message in body.messages],
            tools=[tool.as_dict() for tool in body.tools or ()],
            chat_template_kwargs=body.chat_template_kwargs,
            truncates=body.truncate_prompt_tokens is not None,
        )
    except (ValueError, QueueFullError) as error:
        raise service.to_api_error(error, "messages") from None
    return await builder.respond(request, [prompt], params, "messages")


@dataclass
class _ChatBuilder(ResponseBuilder):
    body: ChatCompletionRequest

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._parsers: dict[DeltaTracker, AnswerParser] = {}  # of each answer

    def new_tool_parser(self) -> ToolParser | None:
        return tool_parser(self.body.choice, self.service.settings.tool_call_parser)

    def _delta(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> Delta:
        """The new part of an answer: its content, reasoning and calls."""
        if tracker not in self._parsers:
            first, tools = self.service.engine.reasoning_start(output.prompt_token_ids), self.new_tool_parser()
            reasoning = None if first is None else ReasoningParser(first)
            self._parsers[tracker] = AnswerParser(reasoning, tools, None if self.body.is_parallel else 1)
        parser, text = self._parsers[tracker], tracker.text(one)
        delta = parser.feed(text) if one.finish_reason is None else parser.finish(text)
        return delta._replace(reasoning="") if self.body.include_reasoning is False else delta

    def choice(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        content, calls, reasoning = self._delta(tracker, output, one)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": [described_call(call) for call in calls]}
        if self.service.engine.reasoning_parser is not None and self.body.include_reasoning is not False:
            message["reasoning"] = reasoning or None
        return {"message": message, "logprobs": self._logprobs(tracker, one)}

    def ending(self, tracker: DeltaTracker, one: CompletionOutput) -> tuple[str | None, int | str | None]:
        """OpenAI's reasons: "tool_calls", unless the request named the tool or ``max_tokens`` cut the calls off."""
        finish_reason, stop_reason = super().ending(tracker, one)
        is_free = self.body.choice in ("auto", "required")
        if finish_reason == "stop" and is_free and self._parsers[tracker].has_calls:
            finish_reason = "tool_calls"
        return finish_reason, stop_reason

    def is_heavy(self, outputs: list[RequestOutput]) -> bool:
        num_parsed = 0 if self.body.choice == "none" else sum(len(one.text) for o in outputs for one in o.outputs)
        return num_parsed > LONG_ANSWER or super().is_heavy(outputs)

    def opening(self) -> dict[str, Any]:
        """The role in its own chunk, as OpenAI sends it: its JavaScript client reads a first chunk's logprobs twice."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def chunk(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any] | None:
        (content, calls, reasoning), logprobs = self._delta(tracker, output, one), self._logprobs(tracker, one)
        delta: dict[str, Any] = {"reasoning": reasoning} if reasoning else {}
        if content:
            delta["content"] = content
        if calls:
            delta["tool_calls"] = [{"index": call.index, **described_call(call)} for call in calls]
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

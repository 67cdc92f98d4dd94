"""/v1/completions: continue a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from paged_infer.outputs import CompletionOutput, RequestOutput
from paged_infer.server.openai.errors import documented
from paged_infer.server.openai.json_stream import DeltaTracker, usage
from paged_infer.server.openai.protocol import CompletionRequest
from paged_infer.server.routes.responses import ResponseBuilder
from paged_infer.server.service import service_of
from paged_infer.text.continuation import prompt_text

router = APIRouter()
ERRORS = documented(400, 401, 404, 408, 413, 422, 429, 500, 503)


class Answer(BaseModel):
    """What both OpenAI routes return, for the OpenAPI document."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]] = Field(min_length=1)
    usage: dict[str, Any]


ANSWER: dict[str, Any] = {
    "description": "The whole answer, or with `stream` its chunks as server-sent events.",
    "model": Answer,
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


@router.post("/v1/completions", responses={200: ANSWER, **ERRORS})
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one or more prompts, each with `n` answers."""
    service = service_of(request)
    builder = _CompletionBuilder(service, service.check_model(body.model), "cmpl", body)
    params = body.params()
    return await builder.respond(request, body.prompts(), params)


@dataclass
class _CompletionBuilder(ResponseBuilder):
    body: CompletionRequest

    kind = chunk_kind = "text_completion"

    def usage(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        return usage(outputs, 0 if self.body.only_echoes else None)

    def ending(self, tracker: DeltaTracker, one: CompletionOutput) -> tuple[str | None, int | str | None]:
        """With ``only_echoes``, the sampled token is discarded: it must not set the finish reason."""
        return ("length", None) if self.body.only_echoes else ResponseBuilder.ending(self, tracker, one)

    def chunk(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any] | None:
        choice = self.choice(tracker, output, one)
        has_tokens = choice["logprobs"] is not None and choice["logprobs"]["tokens"]
        return choice if choice["text"] or one.finish_reason or has_tokens else None

    def choice(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        """The new part of one answer. With ``echo``, its first chunk begins with the prompt."""
        tokenizer = self.service.engine.tokenizer
        text, (token_ids, rows) = tracker.text(one), tracker.rows(one)
        all_rows: list[Any] = list(rows)
        if self.body.only_echoes:
            text, token_ids, all_rows = "", [], []
        if self.body.echo and not tracker.was_sent:
            text = self._prompt_text(output) + text
            if output.prompt_logprobs is not None:
                token_ids = [*output.prompt_token_ids, *token_ids]
                all_rows = [*output.prompt_logprobs, *all_rows]
        logprobs = None
        if self.body.logprobs is not None:
            has_text = tokenizer is not None and not all(map(tokenizer.is_silent, output.prompt_token_ids))
            continues_text = has_text and not self.body.echo
            by_id = bool(self.body.return_tokens_as_token_ids)
            logprobs = tracker.completion_logprobs(
                token_ids, all_rows, tokenizer, continues_text=continues_text, by_id=by_id
            )
        return {"text": text, "logprobs": logprobs}

    def about_choice(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        about = {} if tracker.was_sent else self.about_prompt(output)
        about |= super().about_choice(tracker, output, one)
        if self.body.only_echoes and "token_ids" in about:
            about["token_ids"] = []
        return about

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None and self.body.truncate_prompt_tokens is None:
            return output.prompt
        tokenizer = self.service.engine.tokenizer
        if tokenizer is None:
            return ""
        if self.body.only_echoes:
            return tokenizer.decode(output.prompt_token_ids)
        return prompt_text(tokenizer, output.prompt_token_ids)

"""/v1/completions: a prompt goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from paged_infer.outputs import CompletionOutput, RequestOutput
from paged_infer.server.openai.errors import documented
from paged_infer.server.openai.event_stream import EventStream, cancel_on_disconnect
from paged_infer.server.openai.json_stream import DeltaTracker, tokens_by_id
from paged_infer.server.openai.protocol import CompletionRequest
from paged_infer.server.routes.responses import ResponseBuilder
from paged_infer.server.service import service_of
from paged_infer.text.continuation import prompt_text

router = APIRouter()
ERRORS = documented(400, 401, 404, 408, 413, 422, 429, 500, 503)
ANSWER = {
    "description": "The whole answer, or with `stream` its pieces as server-sent events.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["id", "object", "created", "model", "choices", "usage"],
                "properties": {
                    "id": {"type": "string"},
                    "object": {"type": "string"},
                    "created": {"type": "integer"},
                    "model": {"type": "string"},
                    "choices": {"type": "array", "minItems": 1, "items": {"type": "object"}},
                    "usage": {"type": "object"},
                },
            }
        },
        "text/event-stream": {"schema": {"type": "string"}},
    },
}


@router.post("/v1/completions", responses={200: ANSWER, **ERRORS})
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or several, each with `n` answers."""
    service = service_of(request)
    builder = _CompletionBuilder(service, service.check_model(body.model), "cmpl", body)
    params = body.params()
    streams = await service.open(
        body.prompts(), params, builder.label, stream=bool(body.stream), cache_salt=body.cache_salt
    )
    if body.stream:
        return EventStream(builder.events(streams), streams)
    answer = await cancel_on_disconnect(request, builder.answer(streams))
    return Response(status_code=499) if answer is None else answer


@dataclass
class _CompletionBuilder(ResponseBuilder):
    body: CompletionRequest

    kind = chunk_kind = "text_completion"

    def num_output_tokens(self, outputs: list[RequestOutput]) -> int:
        return 0 if self.body.only_echoes else ResponseBuilder.num_output_tokens(self, outputs)

    def ending(self, one: CompletionOutput) -> tuple[str | None, int | str | None]:
        """A token that was drawn for nobody ends nothing."""
        return ("length", None) if self.body.only_echoes else ResponseBuilder.ending(self, one)

    def choice(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        return self._choice(tracker, output, one, is_first=True)

    def chunk(
        self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput, is_first: bool
    ) -> dict[str, Any] | None:
        choice = self._choice(tracker, output, one, is_first=is_first)
        has_tokens = choice["logprobs"] is not None and choice["logprobs"]["tokens"]
        return choice if choice["text"] or one.finish_reason or has_tokens else None

    def _choice(
        self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput, *, is_first: bool
    ) -> dict[str, Any]:
        """What is new of one answer; the first piece has the prompt in it, where ``echo`` asks for it."""
        tokenizer = self.service.engine.tokenizer
        text, (token_ids, rows) = tracker.text(one), tracker.rows(one)
        all_rows: list[Any] = list(rows)
        if self.body.only_echoes:
            text, token_ids, all_rows = "", [], []
        if self.body.echo and is_first:
            text = self._prompt_text(output) + text
            if output.prompt_logprobs is not None:
                token_ids = [*output.prompt_token_ids, *token_ids]
                all_rows = [*output.prompt_logprobs, *all_rows]
        logprobs = None
        if self.body.logprobs is not None:
            has_text = tokenizer is not None and not all(map(tokenizer.is_silent, output.prompt_token_ids))
            goes_on = has_text and not self.body.echo
            logprobs = tracker.completion_logprobs(token_ids, all_rows, tokenizer, goes_on=goes_on)
            if self.body.return_tokens_as_token_ids:
                logprobs |= tokens_by_id(token_ids, all_rows)
        return {"text": text, "logprobs": logprobs}

    def about_choice(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        about = {} if tracker.was_sent else self.about_prompt(output)
        tracker.was_sent = True
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

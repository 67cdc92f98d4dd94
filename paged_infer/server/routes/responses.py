"""What the two OpenAI routes share: building the response to one request, as a whole or as chunks of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from fastapi import Request
from starlette.responses import Response

from paged_infer.async_llm import EngineDeadError, RequestStream
from paged_infer.engine.input_processor import Params
from paged_infer.engine.prompts import Prompt
from paged_infer.outputs import CompletionOutput, RequestOutput
from paged_infer.server.openai.errors import APIError
from paged_infer.server.openai.event_stream import EventStream, cancel_on_disconnect, merged
from paged_infer.server.openai.json_stream import (
    DONE,
    HEAVY,
    DeltaTracker,
    described_rows,
    encoded,
    event,
    usage,
    weight,
)
from paged_infer.server.openai.protocol import StreamedFields
from paged_infer.server.service import Service, new_id


@dataclass
class ResponseBuilder(ABC):
    """Builds the response to one request. Answers are numbered across all prompts, ``n`` for each."""

    service: Service
    model: str
    prefix: str
    body: StreamedFields

    kind: ClassVar[str]  # ``object`` of a whole response
    chunk_kind: ClassVar[str]  # and of a chunk

    def __post_init__(self) -> None:
        self.id, self.label = new_id(self.prefix)
        if self.body.request_id is not None:
            self.id = f"{self.prefix}-{self.body.request_id}"
        self._trackers: defaultdict[int, DeltaTracker] = defaultdict(DeltaTracker)  # by index of the answer
        self._unsent: dict[str, Any] = {}  # additional top-level fields of the next object
        self.created = int(time.time())  # Unix time

    def ending(self, tracker: DeltaTracker, one: CompletionOutput) -> tuple[str | None, int | str | None]:
        """(finish_reason, stop_reason) of an answer; None while it is not finished."""
        return one.finish_reason, one.stop_reason

    def is_heavy(self, outputs: list[RequestOutput]) -> bool:
        """Whether a whole response is built in another thread, see ``Service.run_in_thread``."""
        return sum(map(weight, outputs)) > HEAVY

    def opening(self) -> dict[str, Any] | None:
        """The choice of a chunk before an answer's first token, or None for no such chunk."""
        return None

    @abstractmethod
    def choice(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        """One whole answer."""

    @abstractmethod
    def chunk(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any] | None:
        """The new part of one answer, or None if there is none."""

    def about_prompt(self, output: RequestOutput) -> dict[str, Any]:
        """The requested fields about the prompt: once per answer, or in the first chunk of each choice."""
        about: dict[str, Any] = {}
        if self.body.return_token_ids:
            about["prompt_token_ids"] = output.prompt_token_ids
        if self.body.prompt_logprobs is not None:
            about["prompt_logprobs"] = described_rows(output.prompt_logprobs or [])
        return about

    def about_request(self, output: RequestOutput) -> dict[str, Any]:
        """Additional top-level fields of the response, or of its first chunk."""
        return {}

    def about_choice(self, tracker: DeltaTracker, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        """The requested fields of a choice besides its text."""
        return {"token_ids": tracker.token_ids(one)} if self.body.return_token_ids else {}

    def usage(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        return usage(outputs)

    async def respond(
        self, request: Request, prompts: ReadOnlyList[Prompt], params: Params, prompt_field: str = "prompt"
    ) -> Response:
        """Queue the prompts and respond. If the client disconnects, the request is aborted."""
        stream = bool(self.body.stream)
        try:
            streams = await self.service.open(
                prompts,
                params,
                self.label,
                stream=stream,
                cache_salt=self.body.cache_salt,
                priority=self.body.priority,
                prompt_field=prompt_field,
            )
        except APIError as error:
            raise self.body.in_own_terms(error) from None
        if stream:
            return EventStream(self.events(streams), streams)
        answer = await cancel_on_disconnect(request.receive, self.answer(streams))
        return Response(status_code=499) if answer is None else answer

    async def answer(self, streams: ReadOnlyList[RequestStream]) -> Response:
        """The whole response, once all outputs are final."""
        outputs = await self.service.final_outputs(streams)
        content = await self.service.run_in_thread(self.is_heavy(outputs), partial(self._whole, outputs))
        return Response(content, media_type="application/json")

    def _whole(self, outputs: list[RequestOutput]) -> str:
        self._unsent = self.about_request(outputs[0])
        choices = (
            self._whole_choice(output, one, place * len(output.outputs) + one.index)
            for place, output in enumerate(outputs)
            for one in output.outputs
        )
        return "".join(encoded({**self._object(self.kind, choices), "usage": self.usage(outputs)}))

    def _whole_choice(self, output: RequestOutput, one: CompletionOutput, index: int) -> dict[str, Any]:
        tracker = DeltaTracker()
        choice = self.choice(tracker, output, one) | self.about_choice(tracker, output, one)
        return self._ended(choice, tracker, one, index)

    async def events(self, streams: ReadOnlyList[RequestStream]) -> AsyncIterator[bytes]:
        """A chunk whenever an answer has grown. An error becomes an event: the status has already been sent."""
        include_usage = self.body.wants("include_usage")
        is_continuous = include_usage and self.body.wants("continuous_usage_stats")
        no_usage: dict[str, Any] = {"usage": None} if include_usage else {}
        newest: dict[int, RequestOutput] = {}
        try:
            async for place, output in merged(streams):
                known = weight(newest[place]) if place in newest else 0
                if not newest:
                    self._unsent = self.about_request(output)
                newest[place] = self.service.checked(output)
                if is_continuous:
                    no_usage = {"usage": self.usage([output])}
                is_heavy = weight(output) - known > HEAVY
                make_events = partial(self._new_events, place, output, no_usage, is_heavy)
                if events := await self.service.run_in_thread(is_heavy, make_events):
                    yield events
            if include_usage:
                yield event({**self._object(self.chunk_kind, []), "usage": self.usage(list(newest.values()))})
        except (APIError, EngineDeadError, ValueError) as error:  # a ValueError: rejected when it was queued
            api_error = self.service.to_api_error(error)
            assert isinstance(api_error, APIError)
            yield event(api_error.body())
        yield DONE

    def _new_events(self, place: int, output: RequestOutput, no_usage: dict[str, Any], in_pieces: bool) -> bytes:
        """Events with the new parts of one prompt's answers."""
        events, obfuscate = [], self.body.wants("include_obfuscation")
        for one in output.outputs:
            index = place * len(output.outputs) + one.index
            tracker = self._trackers[index]
            if tracker.has_ended:
                continue
            if not tracker.was_sent and (opening := self.opening()) is not None:
                chunk = self._object(self.chunk_kind, [{"index": index, **opening, "finish_reason": None}])
                events.append(event({**chunk, **no_usage}))
                tracker.was_sent = True
            choice = self.chunk(tracker, output, one)
            if choice is not None:
                choice |= self.about_choice(tracker, output, one)
                tracker.was_sent = True
                choices: Any = [self._ended(choice, tracker, one, index)]
                chunk = self._object(self.chunk_kind, iter(choices) if in_pieces else choices)
                events.append(event({**chunk, **no_usage}, in_pieces=in_pieces, obfuscate=obfuscate))
            tracker.has_ended = one.finish_reason is not None
        return b"".join(events)

    def _object(self, kind: str, choices: Iterable[dict[str, Any]]) -> dict[str, Any]:
        rest, self._unsent = self._unsent, {}
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **rest}

    def _ended(
        self, choice: dict[str, Any], tracker: DeltaTracker, one: CompletionOutput, index: int
    ) -> dict[str, Any]:
        finish_reason, stop_reason = self.ending(tracker, one)
        choice = {"index": index, **choice, "finish_reason": finish_reason}
        if finish_reason is not None:
            choice["stop_reason"] = stop_reason
        if one.score is not None:  # of a beam search
            choice |= {"score": one.score, "cumulative_logprob": one.cumulative_logprob}
        return choice

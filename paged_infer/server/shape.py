"""What the two OpenAI routes have in common: one request's answers as a whole, or as pieces of a stream."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from typing import Any, ClassVar

from paged_infer.async_engine import EngineDeadError, RequestStream
from paged_infer.outputs import CompletionOutput, RequestOutput
from paged_infer.server.answers import DONE, Growth, event, usage
from paged_infer.server.errors import APIError
from paged_infer.server.protocol import StreamOptions
from paged_infer.server.service import Service, merged


@dataclass
class Shape(ABC):
    """The form in which one request is answered. Answers are numbered through all prompts, ``n`` to each."""

    service: Service
    model: str
    prefix: str
    stream_options: StreamOptions | None

    kind: ClassVar[str]  # of the whole object
    piece_kind: ClassVar[str]  # and of one in a stream

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{random.getrandbits(128):032x}"  # a name, not a secret: no system call
        self.created = int(time.time())  # Unix time

    def ending(self, one: CompletionOutput) -> tuple[str | None, int | str | None]:
        """Why an answer has ended, and the stop that ended it; None while it goes on."""
        return one.finish_reason, one.stop_reason

    @abstractmethod
    def choice(self, growth: Growth, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        """One whole answer."""

    @abstractmethod
    def piece(
        self, growth: Growth, output: RequestOutput, one: CompletionOutput, is_first: bool
    ) -> dict[str, Any] | None:
        """What is new in one answer; None if there is nothing to tell."""

    def num_output_tokens(self, outputs: list[RequestOutput]) -> int:
        return sum(len(one.token_ids) for output in outputs for one in output.outputs)

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        choices = [
            self._ended(self.choice(Growth(), output, one), one, place * len(output.outputs) + one.index)
            for place, output in enumerate(outputs)
            for one in output.outputs
        ]
        return {**self._object(self.kind, choices), "usage": self._usage(outputs)}

    async def events(self, streams: ReadOnlyList[RequestStream]) -> AsyncIterator[bytes]:
        """A piece whenever an answer has grown. What goes wrong now is an event, too: the status is out already."""
        include_usage = self.stream_options is not None and self.stream_options.include_usage
        no_usage = {"usage": None} if include_usage else {}
        growths: dict[int, Growth] = {}
        ended: set[int] = set()
        newest: dict[int, RequestOutput] = {}
        try:
            async for place, output in merged(streams):
                newest[place] = self.service.checked(output)
                events = []
                for one in output.outputs:
                    index = place * len(output.outputs) + one.index
                    if index in ended:
                        continue
                    is_first = index not in growths
                    choice = self.piece(growths.setdefault(index, Growth()), output, one, is_first)
                    if choice is not None:
                        piece = self._object(self.piece_kind, [self._ended(choice, one, index)])
                        events.append(event({**piece, **no_usage}))
                    if one.finish_reason is not None:
                        ended.add(index)
                if events:
                    yield b"".join(events)
            if include_usage:
                yield event(
                    {**self._object(self.piece_kind, []), "usage": self._usage(list(newest.values()))}
                )
        except (APIError, EngineDeadError) as error:
            told = self.service.explained(error)
            assert isinstance(told, APIError)
            yield event(told.body())
        yield DONE

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        return usage(outputs, self.num_output_tokens(outputs))

    def _ended(self, choice: dict[str, Any], one: CompletionOutput, index: int) -> dict[str, Any]:
        finish_reason, stop_reason = self.ending(one)
        choice = {"index": index, **choice, "finish_reason": finish_reason}
        if finish_reason is not None:
            choice["stop_reason"] = stop_reason
        if one.score is not None:  # of a beam search
            choice |= {"score": one.score, "cumulative_logprob": one.cumulative_logprob}
        return choice

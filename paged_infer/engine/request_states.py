"""The unfinished requests of an engine, and their outputs so far."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ReadOnlyList
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from paged_infer.control.request import Request
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import Sequence
from paged_infer.control.step import StepResult
from paged_infer.outputs import RequestOutput, TokenLogprobs
from paged_infer.text.output_processor import OutputProcessor, named_logprobs, request_output
from paged_infer.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(slots=True)
class StepReport:
    """What one step changed.

    Attributes:
        outputs: those of finished requests (for observers, also aborted ones), and of streamed ones with a new token.
        grown: the sequences that got a token, once for each token.
        now: when the step ended, in ``time.perf_counter`` seconds.
        replica: the index of the engine, if there are several (``engine.replicas``).
    """

    outputs: list[RequestOutput] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    now: float = 0.0
    replica: int = 0

    def notify(self, observers: list[Callable[[StepReport], None]]) -> None:
        """Call each observer, and remove one that raises, so that no request loses its output."""
        for observer in list(observers):
            try:
                observer(self)
            except Exception:
                logger.exception("an observer has failed and is removed")
                observers.remove(observer)


@dataclass(slots=True, eq=False)
class RequestState:
    """An unfinished request and its output so far."""

    request: Request
    completions: list[OutputProcessor]
    streamed: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = field(default=None)


class RequestStates:
    """Decodes the tokens of each step to text, and reports requests that have grown or ended.

    Attributes:
        by_id: request id -> its state.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer | None) -> None:
        self.scheduler, self.tokenizer = scheduler, tokenizer
        self.by_id: dict[str, RequestState] = {}

    def add(self, request: Request, streamed: bool) -> None:
        """Raises ValueError if the tokens of the prompt cannot be decoded."""
        try:
            completions = [OutputProcessor(s, self.tokenizer, streamed) for s in request.sequences]
        except Exception as error:  # a tokenizer can raise anything
            raise ValueError(f"the prompt {_decoding_error(error)}") from error
        state = RequestState(request, completions, streamed)
        if request.params.prompt_logprobs is not None:
            state.prompt_logprobs = [None] * len(request.prompt_token_ids)
        self.by_id[request.request_id] = state

    def sequence(self, request_id: str, sample_index: int) -> Sequence:
        """Raises ValueError if the request is not being served, or has no such sample."""
        state = self.by_id.get(request_id)
        if state is None:
            known = ", ".join(map(repr, [*self.by_id][:8])) or "none"
            raise ValueError(f"request_id={request_id!r} is not being served; unfinished requests: {known}")
        sequences = state.request.sequences
        if not 0 <= sample_index < len(sequences):
            raise ValueError(f"sample_index={sample_index!r}: must be within [0, {len(sequences) - 1}]")
        return sequences[sample_index]

    def abort(self, request_id: str) -> RequestOutput | None:
        """See ``LLMEngine.abort``."""
        state = self.by_id.pop(request_id, None)
        if state is None:
            return None
        for sequence in state.request.sequences:
            self.scheduler.finish(sequence, "abort")
        state.request.finished_time_s = time.perf_counter()
        return self._output(state)

    def record(self, grown: list[Sequence], result: StepResult, now: float, report: StepReport) -> None:
        """Decode the new tokens of the sequences that have grown, and add what changed to ``report``."""
        changed: dict[str, RequestState] = {}
        if result.prompt_logprobs:
            self._keep_prompt_logprobs(result)
        if result.failed or result.prompt_logprobs:
            changed = {i: state for i, state in self.by_id.items() if state.request.error is not None}
        for sequence, num_new in Counter(grown).items():
            state = self.by_id[sequence.request_id]
            if state.request.first_token_time_s is None:
                state.request.first_token_time_s = now
            num_before = sequence.num_output_tokens - num_new
            with self._decoding(sequence):
                self._advance(state, sequence, result.logprobs.get(sequence.sequence_id, ()), num_new)
            report.grown += [sequence] * (sequence.num_output_tokens - num_before)
            state.request.note_reasoning(sequence, now)
            if state.streamed or sequence.is_finished:
                changed[sequence.request_id] = state
        report.outputs += [output for state in changed.values() if (output := self._reported(state, now)) is not None]

    @contextmanager
    def _decoding(self, sequence: Sequence) -> Iterator[None]:
        """If decoding raises, only the request of ``sequence`` fails."""
        try:
            yield
        except Exception as error:  # a tokenizer can raise anything
            logger.exception("the tokens of request %s could not be decoded", sequence.request_id)
            self.scheduler.fail(sequence, f"its tokens {_decoding_error(error)}")

    def _advance(
        self, state: RequestState, sequence: Sequence, logprobs: ReadOnlyList[TokenLogprobs], num_new: int
    ) -> None:
        """Decode the sequence's newest tokens to text."""
        stop = state.completions[sequence.sample_index].advance(logprobs, num_new)
        if stop is not None:
            self.scheduler.finish(sequence, "stop", stop)

    def _reported(self, state: RequestState, now: float) -> RequestOutput | None:
        if state.request.is_finished:
            state.request.finished_time_s = now
            del self.by_id[state.request.request_id]
        elif not state.streamed:
            return None
        return self._output(state)

    def _keep_prompt_logprobs(self, result: StepResult) -> None:
        for state in self.by_id.values():
            sequence = state.request.sequences[0]
            report = result.prompt_logprobs.get(sequence.sequence_id)
            if report is not None and state.prompt_logprobs is not None:
                first, entries = report
                with self._decoding(sequence):
                    state.prompt_logprobs[first : first + len(entries)] = [
                        named_logprobs(entry, self.tokenizer) for entry in entries
                    ]

    def _output(self, state: RequestState) -> RequestOutput:
        """The request's output so far. If its tokens cannot be decoded, it fails with the text decoded until then."""
        try:
            return request_output(state.request, state.completions, state.prompt_logprobs)
        except Exception as error:  # a tokenizer can raise anything
            logger.exception("the tokens of request %s could not be decoded", state.request.request_id)
            self.scheduler.fail(
                state.request.sequences[0], f"its tokens {_decoding_error(error)}", include_finished=True
            )
            self.by_id.pop(state.request.request_id, None)
            state.request.finished_time_s = state.request.finished_time_s or time.perf_counter()
            for completion in state.completions:
                completion.is_broken = True
            return request_output(state.request, state.completions, state.prompt_logprobs)


class Unfinished(Generic[T]):
    """What is kept of each unfinished request, by its id. Not thread-safe.

    Of one id there may be several: one that is being aborted comes before its successor.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, deque[T]] = {}

    def __len__(self) -> int:
        """The number of ids."""
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[tuple[str, T]]:
        """Each id, with its oldest request."""
        return ((request_id, of_id[0]) for request_id, of_id in self._by_id.items())

    def add(self, request_id: str, one: T) -> None:
        self._by_id.setdefault(request_id, deque()).append(one)

    def oldest(self, request_id: str, *, is_over: bool) -> T | None:
        """The oldest one of this id, which ends with that if ``is_over``; None if there is none."""
        of_id = self._by_id.get(request_id)
        if not of_id:
            return None
        one = of_id.popleft() if is_over else of_id[0]
        if not of_id:
            del self._by_id[request_id]
        return one

    def clear(self) -> list[T]:
        """End all; returns them."""
        everyone = [one for of_id in self._by_id.values() for one in of_id]
        self._by_id.clear()
        return everyone


def _decoding_error(error: Exception) -> str:
    return f"could not be decoded: {type(error).__name__}: {error}"

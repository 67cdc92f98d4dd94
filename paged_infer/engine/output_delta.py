"""Send outputs between two processes as what is new since the last one, so that the cost of a token stays constant.

    engine's process    OutputEncoder:  RequestOutput -> OutputDelta      (keeps what it has sent)
    this process        OutputDecoder:  OutputDelta -> RequestOutput      (keeps what it has built)

Both ends see every output of a request, in order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, NamedTuple

from paged_infer.control.request import Request
from paged_infer.control.sequence import Sequence
from paged_infer.engine.request_states import Unfinished
from paged_infer.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobs

_values = attrgetter(*[one.name for one in fields(CompletionOutput)])
# Those that the engine takes; requests arrive on this side.
_TIMES = [one.name for one in fields(RequestMetrics) if one.name.endswith("_time_s") and one.name != "arrival_time_s"]


class CompletionDelta(NamedTuple):
    """A sample: the ``values`` of the fields of its CompletionOutput, as a tuple, which is pickled faster.

    Of its text, tokens and logprobs only what follows the first ``num_characters`` and ``num_tokens`` of those sent.
    """

    num_characters: int
    num_tokens: int
    values: tuple[Any, ...]


class OutputDelta(NamedTuple):
    """``prompt_logprobs`` are sent once, with the first output. The prompt itself is known on both sides."""

    request_id: str
    completions: list[CompletionDelta]
    metrics: RequestMetrics
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None


class OutputEncoder:
    """Encodes the outputs of all requests of one engine."""

    def __init__(self) -> None:
        self._sent: dict[str, list[tuple[str, int]]] = {}  # request id -> text and number of tokens of each sample

    def encode(self, output: RequestOutput) -> OutputDelta:
        before = self._sent.get(output.request_id)
        after = [(one.text, len(one.token_ids)) for one in output.outputs]
        if output.finished:
            self._sent.pop(output.request_id, None)
        else:
            self._sent[output.request_id] = after
        known = before or [("", 0)] * len(after)
        return OutputDelta(
            output.request_id,
            [_delta(*sent, one) for sent, one in zip(known, output.outputs, strict=True)],
            output.metrics,
            output.finished,
            None if before else output.prompt_logprobs,
        )


def _delta(text: str, num_tokens: int, one: CompletionOutput) -> CompletionDelta:
    """What ``one`` adds to the text and tokens that were sent. Text is taken back only if a stop string ends it."""
    num_characters = len(text) if one.text.startswith(text) else 0
    kept = min(num_tokens, len(one.token_ids))
    logprobs = None if one.logprobs is None else one.logprobs[kept:]
    new = replace(one, text=one.text[num_characters:], token_ids=one.token_ids[kept:], logprobs=logprobs)
    return CompletionDelta(num_characters, kept, _values(new))


@dataclass(slots=True, eq=False)
class _Built:
    """An unfinished request, and its latest output."""

    request: Request
    latest: RequestOutput


class OutputDecoder:
    """Builds the outputs of all requests of one engine.

    Attributes:
        clock_offset_s: this process's clock minus the engine's.
    """

    def __init__(self) -> None:
        self.clock_offset_s = 0.0
        self._unfinished: Unfinished[_Built] = Unfinished()

    def __len__(self) -> int:
        return len(self._unfinished)

    def add(self, request: Request) -> None:
        """Before its outputs come."""
        metrics = RequestMetrics(request.arrival_time_s)
        none = RequestOutput(request.request_id, request.prompt, request.prompt_token_ids, [], metrics)
        self._unfinished.add(request.request_id, _Built(request, none))

    def drop(self, request_id: str) -> None:
        """No output comes of the oldest request of this id."""
        self._unfinished.oldest(request_id, is_over=True)

    def sequence(self, request_id: str, sample_index: int) -> Sequence:
        return self._oldest(request_id).request.sequences[sample_index]

    def decode(self, delta: OutputDelta) -> RequestOutput:
        """The output with this delta, as a new object: the reader may keep earlier ones."""
        one = self._oldest(delta.request_id, is_over=delta.finished)
        known = one.latest.outputs or _empty(len(delta.completions))
        one.latest = replace(
            one.latest,
            outputs=[_grown(sample, more) for sample, more in zip(known, delta.completions, strict=True)],
            metrics=self._on_our_clock(delta.metrics),
            finished=delta.finished,
            prompt_logprobs=one.latest.prompt_logprobs or delta.prompt_logprobs,
        )
        return one.latest

    def fail(self, reason: str) -> list[RequestOutput]:
        """The engine has ended: the last output of each request: what it has so far, with finish_reason "error"."""
        return [_failed(one, reason) for one in self._unfinished.clear()]

    def _oldest(self, request_id: str, *, is_over: bool = False) -> _Built:
        one = self._unfinished.oldest(request_id, is_over=is_over)
        assert one is not None, "an output of a request that has ended"
        return one

    def _on_our_clock(self, metrics: RequestMetrics) -> RequestMetrics:
        for name in _TIMES if self.clock_offset_s else ():
            if (time_s := getattr(metrics, name)) is not None:
                setattr(metrics, name, time_s + self.clock_offset_s)
        return metrics


def _failed(one: _Built, reason: str) -> RequestOutput:
    known = one.latest.outputs or _empty(len(one.request.sequences))
    samples = [one if one.finish_reason else replace(one, finish_reason="error", error=reason) for one in known]
    return replace(one.latest, outputs=samples, finished=True)


def _empty(num_samples: int) -> list[CompletionOutput]:
    return [CompletionOutput(i, "", []) for i in range(num_samples)]


def _grown(one: CompletionOutput, more: CompletionDelta) -> CompletionOutput:
    new = CompletionOutput(*more.values)
    new.text = one.text[: more.num_characters] + new.text
    new.token_ids = one.token_ids[: more.num_tokens] + new.token_ids
    if new.logprobs is not None and one.logprobs is not None:
        new.logprobs = one.logprobs[: more.num_tokens] + new.logprobs
    return new

"""Send outputs between two processes as what is new since the last one, so that the cost of a token stays constant.

    engine's process    OutputEncoder:  RequestOutput -> OutputDelta      (keeps what it has sent)
    this process        OutputDecoder:  OutputDelta -> RequestOutput      (keeps what it has built)

Both ends see every output of a request, in order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from paged_infer.control.request import Request
from paged_infer.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobs


class CompletionDelta(NamedTuple):
    """One sample: its text is the first ``num_characters`` of the text sent before, then ``text``. Tokens likewise."""

    sample_index: int
    num_characters: int
    text: str
    num_tokens: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None  # of ``token_ids``
    finish_reason: str | None
    stop_reason: int | str | None
    cumulative_logprob: float | None
    score: float | None
    error: str | None
    num_reasoning_tokens: int | None


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
    return CompletionDelta(
        one.index,
        num_characters,
        one.text[num_characters:],
        kept,
        one.token_ids[kept:],
        None if one.logprobs is None else one.logprobs[kept:],
        one.finish_reason,
        one.stop_reason,
        one.cumulative_logprob,
        one.score,
        one.error,
        one.num_reasoning_tokens,
    )


class OutputDecoder:
    """Builds the outputs of one request from its deltas."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._latest: RequestOutput | None = None

    def decode(self, delta: OutputDelta) -> RequestOutput:
        """The output with this delta, as a new object: the reader may keep earlier ones."""
        before = self._latest
        known = [None] * len(delta.completions) if before is None else before.outputs
        self._latest = RequestOutput(
            self._request.request_id,
            self._request.prompt,
            self._request.prompt_token_ids,
            [_grown(one, more) for one, more in zip(known, delta.completions, strict=True)],
            delta.metrics,
            delta.finished,
            delta.prompt_logprobs if before is None else before.prompt_logprobs,
        )
        return self._latest

    def fail(self, reason: str) -> RequestOutput:
        """The final output of a request whose engine has ended: the output so far, with finish_reason "error"."""
        latest, num_samples = self._latest, len(self._request.sequences)
        known = [CompletionOutput(i, "", []) for i in range(num_samples)] if latest is None else latest.outputs
        return RequestOutput(
            self._request.request_id,
            self._request.prompt,
            self._request.prompt_token_ids,
            [one if one.finish_reason else replace(one, finish_reason="error", error=reason) for one in known],
            RequestMetrics(self._request.arrival_time_s) if latest is None else latest.metrics,
            True,
        )


def _grown(one: CompletionOutput | None, more: CompletionDelta) -> CompletionOutput:
    text = "" if one is None else one.text[: more.num_characters]
    token_ids = [] if one is None else one.token_ids[: more.num_tokens]
    logprobs = more.logprobs
    if logprobs is not None and one is not None and one.logprobs is not None:
        logprobs = one.logprobs[: more.num_tokens] + logprobs
    return CompletionOutput(
        more.sample_index,
        text + more.text,
        token_ids + more.token_ids,
        more.finish_reason,
        more.stop_reason,
        more.cumulative_logprob,
        logprobs,
        more.score,
        more.error,
        more.num_reasoning_tokens,
    )

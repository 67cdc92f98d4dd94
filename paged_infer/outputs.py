"""The outputs of requests. Plain Python: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple


class Logprob(NamedTuple):
    """One token's log-probability in the raw distribution, and where it ranks there (1 is the most probable)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""For one position: token id -> its Logprob, the chosen token first, then the top ones in order."""


@dataclass(slots=True)
class CompletionOutput:
    """One sample or beam of a request.

    ``token_ids`` includes the token that ended it; ``text`` does not. ``text`` is what the tokens add to the text of
    the prompt (see ``continuation.continuation``). ``finish_reason`` is None while it grows, then "stop" (end token,
    stop token or stop string), "length", "abort", or "error" if the request failed; ``error`` then gives the reason
    (NaN in its logits, for example). ``cumulative_logprob`` and ``logprobs`` are None unless
    ``SamplingParams.logprobs`` asked for them; a beam has the first, and ``score``, by which it is ranked (None if the
    search was aborted or failed).
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token or stop string that ended it; None for the EOS token
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    score: float | None = None
    error: str | None = None
    num_reasoning_tokens: int | None = None  # the first of ``token_ids``; None without ``reasoning_parser``


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds on one clock; None until it happens."""

    arrival_time_s: float
    first_scheduled_time_s: float | None = None  # of its first step
    first_token_time_s: float | None = None
    reasoning_end_time_s: float | None = None  # of the token that ended it, in the sample where it ended first
    first_content_time_s: float | None = None  # of the first token that is not reasoning
    finished_time_s: float | None = None
    num_generation_tokens: int = 0  # of all samples
    num_longest_output_tokens: int = 0  # of the longest sample
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token, in seconds from arrival, including the time in the queue."""
        return None if self.first_token_time_s is None else self.first_token_time_s - self.arrival_time_s

    @property
    def reasoning_time(self) -> float | None:
        """Seconds from arrival to the end of the reasoning; None without ``reasoning_parser``, or if none has ended."""
        return None if self.reasoning_end_time_s is None else self.reasoning_end_time_s - self.arrival_time_s

    @property
    def ttfc(self) -> float | None:
        """Time to first content token, in seconds from arrival: how long a user waits who does not see the reasoning.

        None without ``reasoning_parser``.
        """
        return None if self.first_content_time_s is None else self.first_content_time_s - self.arrival_time_s

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the last token."""
        return None if self.finished_time_s is None else self.finished_time_s - self.arrival_time_s

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds, of the longest sample; None if that has fewer than two."""
        if self.finished_time_s is None or self.first_token_time_s is None or self.num_longest_output_tokens < 2:
            return None
        return (self.finished_time_s - self.first_token_time_s) / (self.num_longest_output_tokens - 1)


@dataclass(slots=True)
class RequestOutput:
    """The output of a request so far: its prompt, and a CompletionOutput for each sample or beam, best first."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = field(default=None)

    def _repr_html_(self) -> str:
        """A short table for notebooks: the prompt, and each sample's or beam's text, number of tokens and end."""
        prompt = f"{len(self.prompt_token_ids)} token ids" if self.prompt is None else _shortened(self.prompt)
        seconds = [("first token", self.metrics.ttft), ("all", self.metrics.latency)]
        times = [f"{what} after {time * 1000:,.0f} ms" for what, time in seconds if time is not None]
        rows = [("", "prompt", prompt, f"{len(self.prompt_token_ids)} tokens", ", ".join(times))]
        for one in self.outputs:
            end = one.error or one.finish_reason or "unfinished"
            rows.append((str(one.index), "output", _shortened(one.text), f"{len(one.token_ids)} tokens", end))
        cells = ("".join(f'<td style="text-align: left">{escape(cell)}</td>' for cell in row) for row in rows)
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _shortened(text: str, most: int = 300) -> str:
    """Its beginning and its end."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def prompt_token_logprobs(output: RequestOutput) -> list[Logprob]:
    """Of each token of the prompt but the first, given those before it; needs ``SamplingParams(prompt_logprobs=0)``."""
    rows = output.prompt_logprobs
    assert rows is not None
    return [row[token] for token, row in zip(output.prompt_token_ids[1:], rows[1:], strict=True) if row is not None]

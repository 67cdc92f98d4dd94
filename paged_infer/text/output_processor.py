"""From a sequence's tokens to its output: text, stop strings, logprobs."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList

from paged_infer.control.request import Request
from paged_infer.control.sequence import Sequence
from paged_infer.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from paged_infer.text.continuation import continuation
from paged_infer.text.detokenizer import StreamingDecoder
from paged_infer.text.stop_strings import StopFinder
from paged_infer.text.tokenizer import Tokenizer


class OutputProcessor:
    """The growing output of one sequence.

    Its text is what the tokens add to the text of the prompt, see ``continuation``. It is decoded incrementally only
    for stop strings and for streams, and otherwise once, at the end.

    Special tokens are not part of the text. A stop string that is a special token ends the output when that token is
    sampled.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None, streamed: bool) -> None:
        self._sequence = sequence
        self._tokenizer = tokenizer
        self._stops: tuple[str, ...] = tuple(sequence.params.stop)
        self._stop_of_token: dict[int, str] = {}
        self._decoder: StreamingDecoder | None = None
        if tokenizer is not None and (streamed or self._stops):
            self._decoder = StreamingDecoder(tokenizer, self._prompt_token_ids())
            special = tokenizer.special_tokens
            self._stop_of_token = {special[stop]: stop for stop in self._stops if stop in special}
        self._finder = StopFinder(self._stops) if self._stops else None
        self._num_decoded = 0  # output tokens given to the decoder
        self._text = ""
        self._stop_string: str | None = None
        self._logprobs: list[TokenLogprobs] | None = None if sequence.params.logprobs is None else []
        self.is_broken = False  # if its tokens could not be decoded: the text so far is final

    def advance(self, logprobs: ReadOnlyList[TokenLogprobs] = (), num_new: int = 1) -> str | None:
        """Process the sequence's newest tokens and the ``logprobs`` of each, if requested.

        Returns the stop string that they complete, if any: the sequence ends there, and later tokens are dropped.
        If the tokenizer raises, so does this, and the tokens are kept without their text.
        """
        try:
            return self._advance(logprobs, num_new)
        except Exception:
            self.is_broken = True
            if self._logprobs is not None:
                self._logprobs += logprobs[: self._sequence.num_output_tokens - len(self._logprobs)]
            raise

    def _advance(self, logprobs: ReadOnlyList[TokenLogprobs], num_new: int) -> str | None:
        num_kept = num_new
        if self._decoder is not None:
            num_before = self._sequence.num_output_tokens - num_new
            num_kept = next((n for n in range(1, num_new + 1) if self._decode_until(num_before + n)), num_new)
            self._sequence.drop_last(num_new - num_kept)
        if self._logprobs is not None:
            self._logprobs += [named_logprobs(of_token, self._tokenizer) for of_token in logprobs[:num_kept]]
        return self._stop_string

    def _decode_until(self, num_tokens: int) -> bool:
        """Decode up to that many output tokens. Returns whether a stop string ends the text there."""
        assert self._decoder is not None
        settled = len(self._text)
        visible = self._visible_token_ids()[:num_tokens]
        self._text += self._decoder.push(visible[self._num_decoded :])
        self._num_decoded = len(visible)
        may_stop = num_tokens >= max(1, self._sequence.params.min_tokens)
        newest = self._sequence.token_ids[self._sequence.num_prompt_tokens + num_tokens - 1]
        stop_token = self._stop_of_token.get(newest) if may_stop else None
        is_last = self._sequence.is_finished and num_tokens == self._sequence.num_output_tokens
        if is_last or stop_token is not None:
            self._text += self._decoder.finish()
        if may_stop:
            self._find_stop(settled)
        if self._stop_string is None:  # a stop string in the text takes precedence over the token
            self._stop_string = stop_token
        return self._stop_string is not None

    def _prompt_token_ids(self) -> list[int]:
        return self._sequence.token_ids[: self._sequence.num_prompt_tokens]

    def _visible_token_ids(self) -> list[int]:
        """The output without the token that ended it; a grammar ends it with a token of the text."""
        ids = self._sequence.output_token_ids
        has_ended = self._sequence.finish_reason == "stop" and ids[-1] in self._sequence.end_token_ids
        return ids[:-1] if has_ended else ids

    def _find_stop(self, settled: int) -> None:
        """Cut the text at the first stop string that ends in its unsettled part."""
        found = self._finder.find(self._text, settled) if self._finder is not None else None
        if found is not None:
            at, self._stop_string = found
            self._text = self._text[:at]

    def output(self) -> CompletionOutput:
        """The sample so far. While it grows, text that may begin a stop string is held back."""
        sequence = self._sequence
        finish_reason, stop_reason = sequence.finish_reason, sequence.stop_reason
        if self._stop_string is not None:  # found in the text, perhaps in the step that also ended the output otherwise
            finish_reason, stop_reason = "stop", self._stop_string
        cumulative = sequence.cumulative_logprob if sequence.is_beam else None
        if self._logprobs is not None:
            token_ids = sequence.output_token_ids
            cumulative = sum(row[token].logprob for row, token in zip(self._logprobs, token_ids, strict=True))
        return CompletionOutput(
            index=sequence.sample_index,
            text=self._shown_text(finish_reason),
            token_ids=sequence.output_token_ids,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            cumulative_logprob=cumulative,
            logprobs=None if self._logprobs is None else list(self._logprobs),
            score=sequence.score,
            error=sequence.error,
            num_reasoning_tokens=None if sequence.reasoning is None else sequence.reasoning.num_reasoning_tokens,
        )

    def _shown_text(self, finish_reason: str | None) -> str:
        if self._tokenizer is None or self.is_broken:
            return self._text
        if self._decoder is None:
            return continuation(self._tokenizer, self._prompt_token_ids(), self._visible_token_ids())
        if finish_reason in ("abort", "error"):  # between two tokens: flush the characters that are held back
            self._text += self._decoder.finish()
            return self._text
        if finish_reason is not None:
            return self._text
        if self._finder is None:
            return self._text
        self._finder.find(self._text, len(self._text))  # advance over the text that min_tokens skipped
        return self._text[: len(self._text) - self._finder.num_open]


def named_logprobs(logprobs: TokenLogprobs, tokenizer: Tokenizer | None) -> TokenLogprobs:
    """The same with each token's text, if there is a tokenizer."""
    if tokenizer is None:
        return logprobs
    return {
        token_id: Logprob(entry.logprob, entry.rank, tokenizer.token_text(token_id))
        for token_id, entry in logprobs.items()
    }


def request_output(
    request: Request, completions: list[OutputProcessor], prompt_logprobs: list[TokenLogprobs | None] | None
) -> RequestOutput:
    """The output of a request so far."""
    metrics = RequestMetrics(
        arrival_time_s=request.arrival_time_s,
        first_scheduled_time_s=request.sequences[0].first_scheduled_s,
        first_token_time_s=request.first_token_time_s,
        reasoning_end_time_s=request.reasoning_end_time_s,
        first_content_time_s=request.first_content_time_s,
        finished_time_s=request.finished_time_s,
        num_generation_tokens=sum(sequence.num_output_tokens for sequence in request.sequences),
        num_longest_output_tokens=max(sequence.num_output_tokens for sequence in request.sequences),
        num_cached_tokens=request.sequences[0].num_cached_tokens,
        num_preemptions=sum(sequence.num_preemptions for sequence in request.sequences),
    )
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[completion.output() for completion in completions],
        metrics=metrics,
        finished=request.is_finished,
        prompt_logprobs=prompt_logprobs,
    )

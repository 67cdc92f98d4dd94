"""A request: a prompt, how to sample, and its sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

from paged_infer.control.sequence import Sequence
from paged_infer.params import BeamSearchParams, SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, and ``n`` samples or the best beams of its continuation.

    Times: seconds on the caller's clock.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time_s: float
    cache_salt: str | None = None  # only requests of the same salt share blocks through the prefix cache
    beam_params: BeamSearchParams | None = None  # for a beam search; ``params`` are then its ``limits``
    priority: int = 0  # lower is more urgent, for policies that read it
    sequences: list[Sequence] = field(default_factory=list)  # see control.admission.add_sequences
    first_token_time_s: float | None = None
    reasoning_end_time_s: float | None = None
    first_content_time_s: float | None = None
    finished_time_s: float | None = None

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    def note_reasoning(self, sequence: Sequence, now: float) -> None:
        """``sequence`` has got a token at ``now``: did its reasoning end, or its content begin?"""
        reasoning = sequence.reasoning
        if reasoning is None:
            return
        if self.reasoning_end_time_s is None and reasoning.has_ended:
            self.reasoning_end_time_s = now
        if self.first_content_time_s is None and reasoning.has_content:
            self.first_content_time_s = now

    @property
    def error(self) -> str | None:
        """Why the request failed, or None."""
        return next((sequence.error for sequence in self.sequences if sequence.error is not None), None)

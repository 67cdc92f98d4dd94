"""The control plane without a model: requests of given lengths, run by the real Scheduler."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList

from paged_infer.control.admission import add_sequences
from paged_infer.control.request import Request
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import Sequence
from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.params import SamplingParams
from paged_infer.simulation.lengths import RequestLengths

FIRST_PROMPT = 1_000_000_000  # token ids of prompts start here, those of sampled tokens at 0


class RequestFactory:
    """Makes requests of given lengths."""

    def __init__(self, max_model_len: int) -> None:
        self.max_model_len = max_model_len
        self.num_requests = 0
        self._num_sequences = 0

    def request(
        self, lengths: RequestLengths, arrival_time_s: float = 0.0, prefix: ReadOnlyList[int] = ()
    ) -> list[Sequence]:
        """The samples of a new request. After ``prefix``, its prompt differs from all others."""
        prompt = list(prefix[: lengths.num_prompt - 1])
        prompt += [FIRST_PROMPT + self.num_requests] * (lengths.num_prompt - len(prompt))
        params = SamplingParams(n=lengths.num_samples, max_tokens=lengths.num_output)
        request = Request(f"r{self.num_requests}", None, prompt, params, arrival_time_s)
        add_sequences(request, self._num_sequences, 0, self.max_model_len, eos_token_ids=())
        self.num_requests += 1
        self._num_sequences += lengths.num_samples
        return request.sequences


def carry_out(scheduler: Scheduler, step: ScheduledStep, now: float = 0.0) -> list[Sequence]:
    """Update the scheduler as a model would. All sampled tokens differ, so their blocks are never shared."""
    scheduler.advance(step)
    return scheduler.settle(step, StepResult({sequence_id: sequence_id for sequence_id in step.sampling}), now)

"""What each step computes: policies with one interface, so that they can be compared on the same requests.

    a step is      A and B decode, C D E wait, C has a long prompt
    static         [ a b ] ... until both have ended, then [ C D E ]          the batch drains together
    dynamic        the same, but a batch waits to be full or for its window
    prefill_first  [ C D ] [ E ] [ a b c d e ]                                 A and B stall meanwhile
    chunked        [ a b C.. ] [ a b ..C D.. ] [ a b c ..D E ]                 nothing stalls

A policy is one method, ``plan(step)``, that calls the methods of a ``StepPlan`` in any order: ``schedule_running``,
``resume_swapped``, ``admit_waiting``, or those for one sequence: ``schedule``, ``admit``, ``preempt``. They keep the
laws whatever the order; fairness is up to the policy. If it leaves a step empty without setting ``resume_at_s``,
``Chunked`` plans the step, so that no sequence waits forever.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList

from paged_infer.control.sequence import Sequence
from paged_infer.control.step_plan import StepPlan
from paged_infer.values import as_integer


class Policy(ABC):
    """Plans each step. It may keep state between steps, so each scheduler needs a policy of its own.

    Attributes:
        chunks_prompts: whether a prompt may be spread over several steps (chunked prefill).
        drains_together: whether a finished sequence keeps its place and its blocks until no sequence runs.
        reads_priority: whether ``plan`` or ``victim`` reads ``sequence.priority``; otherwise requests with one are
            refused.
    """

    chunks_prompts = True
    drains_together = False
    reads_priority = False

    @abstractmethod
    def plan(self, step: StepPlan) -> None:
        """Fill the step."""

    def victim(self, running: ReadOnlyList[Sequence]) -> Sequence:
        """Which of the running sequences, in order of arrival, is preempted when another needs blocks."""
        return running[-1]


class Chunked(Policy):
    """Running > swapped > waiting, with prompts cut to what is left of the budget (Sarathi-Serve; vLLM V1)."""

    def plan(self, step: StepPlan) -> None:
        step.schedule_running()
        step.resume_swapped()
        step.admit_waiting()


class PrefillFirst(Policy):
    """Whole prompts before any decode (vLLM V0): early first tokens, and stalled decodes.

    Orca also takes whole prompts at once, but computes them in one step with the decodes, which wait for them all the
    same (Agrawal et al. 2024, Sarathi-Serve, section 3.2).

    ``delay_factor``: after a step of prompts, the next one waits for that many times as long as the first one took,
    and decodes continue. vLLM V0 counts from the arrival of the longest waiting request instead. While the
    queue never empties, that is always long enough ago, so decodes starve as without a delay.
    """

    chunks_prompts = False

    def __init__(self, delay_factor: float = 0.0) -> None:
        if not 0 <= delay_factor < float("inf"):
            raise ValueError(f"scheduler_delay_factor={delay_factor}: must be a number >= 0")
        self.delay_factor = delay_factor
        self._began_s: float | None = None  # when the last step was planned, if it was one of prompts
        self._resume_at_s = 0.0

    def plan(self, step: StepPlan) -> None:
        if self._began_s is not None:
            self._resume_at_s = step.now + self.delay_factor * (step.now - self._began_s)
            self._began_s = None
            delayed = self.delay_factor > 0
        else:
            delayed = step.now <= self._resume_at_s and self.delay_factor > 0
        if not delayed or not step.running:
            step.admit_waiting()
        if step.scheduled:
            self._began_s = step.now
            return
        step.schedule_running()
        step.resume_swapped()


class Static(Policy):
    """A batch of waiting sequences; the next batch begins when all of it has ended. Finished rows compute nothing."""

    chunks_prompts = False
    drains_together = True

    def __init__(self) -> None:
        self._filling = True  # the budget cut the batch short: more prompts in the next step

    def plan(self, step: StepPlan) -> None:
        if self._filling or not step.running:
            self._fill(step)
        if not step.scheduled:
            self._filling = False
            step.schedule_running()
        if not step.scheduled and not step.running:  # the last row was preempted: finished rows hold the blocks
            self._fill(step)

    def _fill(self, step: StepPlan) -> None:
        step.resume_swapped()
        step.admit_waiting()
        self._filling = bool(step.waiting)


class Dynamic(Static):
    """Static batches that begin when ``max_batch_size`` wait, or the oldest has waited ``window_s`` seconds."""

    def __init__(self, window_s: float = 0.05, max_batch_size: int | None = None) -> None:
        super().__init__()
        if not 0 <= window_s < float("inf"):
            raise ValueError(f"window_s={window_s}: must be a number >= 0")
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"max_batch_size={max_batch_size}: must be at least 1")
        self.window_s = window_s
        self.max_batch_size = max_batch_size

    def _fill(self, step: StepPlan) -> None:
        if self.max_batch_size is not None:
            step.max_num_seqs = min(step.max_num_seqs, self.max_batch_size)
        if not step.running and not step.swapped and 0 < len(step.waiting) < step.max_num_seqs:
            closes_at_s = step.waiting[0].arrival_time_s + self.window_s
            if step.now < closes_at_s:
                step.resume_at_s = closes_at_s
                return
        super()._fill(step)


class Priority(Policy):
    """Like ``Chunked``, but the lowest ``priority`` first, and among equals the first to arrive (vLLM's "priority").

    If blocks are short, the sequence with the highest ``priority`` is preempted; no running sequence is preempted for a
    waiting one. Law 3 does not hold: a request may wait for as long as more urgent ones arrive.
    """

    reads_priority = True

    def plan(self, step: StepPlan) -> None:
        step.schedule_running(urgency)
        for queue in (step.swapped, step.waiting):
            ordered = sorted(queue, key=urgency)
            queue.clear()
            queue.extend(ordered)
        step.resume_swapped()
        step.admit_waiting()

    def victim(self, running: ReadOnlyList[Sequence]) -> Sequence:
        return max(running, key=urgency)


def urgency(sequence: Sequence) -> tuple[int, int]:
    """A sort key: the most urgent sequence is the smallest."""
    return sequence.priority, sequence.queue_number


POLICIES: dict[str, Callable[[], Policy]] = {
    "chunked": Chunked,
    "prefill_first": PrefillFirst,
    "dynamic": Dynamic,
    "static": Static,
    "priority": Priority,
}


def make_policy(policy: str | Policy, delay_factor: float = 0.0) -> Policy:
    """The policy with this name, or the policy itself.

    Raises:
        ValueError: an unknown name, another object, or a delay factor that the policy would ignore.
    """
    if isinstance(policy, str) and policy == "prefill_first":
        return PrefillFirst(delay_factor)
    if delay_factor != 0:
        raise ValueError(
            f"scheduler_delay_factor={delay_factor} with scheduling_policy={policy!r}: only 'prefill_first' has a delay"
        )
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]()
    if not isinstance(policy, Policy):
        known = ", ".join(POLICIES)
        given: object = policy
        made = ""
        if isinstance(given, type) and issubclass(given, Policy):
            made = f", and this is its class: pass {given.__name__}()"
        raise ValueError(f"scheduling_policy={policy!r}: must be a Policy or one of {known}{made}")
    return policy


def check_priority(priority: object, policy: str | Policy) -> int:
    """The priority as an int. Raises ValueError if it is not an integer, or not 0 although the policy ignores it."""
    value = as_integer(priority)
    if value is None:
        raise ValueError(f"priority={priority!r}: must be an integer")
    if value and not make_policy(policy).reads_priority:
        name = policy if isinstance(policy, str) else type(policy).__name__
        raise ValueError(
            f"priority={value}: scheduling_policy={name!r} reads no priorities; 'priority' does, and a Policy that "
            "sets reads_priority = True"
        )
    return value

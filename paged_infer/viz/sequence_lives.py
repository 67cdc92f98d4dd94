"""Each sequence of a trace: its name and colour in all pictures, and what it did in each step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.trace import Replay, Trace
from paged_infer.control.trace_step import Adopt, Arrive, Fork, TraceStep

# Paul Tol's "light" scheme and a mauve: distinguishable with colour blindness, and pale enough for dark text on top.
OWNER_COLOURS = ("#77aadd", "#ee8866", "#bbcc33", "#ffaabb", "#99ddff", "#eedd88", "#44bb99", "#b07aa1")
LONGEST_NAME = 10


def owner_colour(sequence_id: int) -> str:
    """The colour of a sequence; eight consecutive sequences have different ones."""
    return OWNER_COLOURS[sequence_id % len(OWNER_COLOURS)]


def sequence_names(trace: Trace) -> dict[int, str]:
    """The id of each sequence's request, followed by ".0", ".1", ... if the request has several samples."""
    arrivals = [event for step in trace.steps for event in step.events if isinstance(event, Arrive)]
    num_samples = Counter(event.request_id for event in arrivals)
    seen: Counter[str] = Counter()
    names = {}
    for sequence_id, request_id, _ in arrivals:
        short = request_id if len(request_id) <= LONGEST_NAME else "…" + request_id[1 - LONGEST_NAME :]
        names[sequence_id] = short if num_samples[request_id] == 1 else f"{short}.{seen[request_id]}"
        seen[request_id] += 1
    return names


@dataclass(slots=True)
class Span:
    """Steps ``first`` to ``last``, both included, that a sequence spent in one state (a key of ``timeline.LOOKS``).

    A step that computes known tokens is a separate span; it computes ``num_tokens``, and if the sequence was admitted
    in it, ``num_found`` more were already stored: in the prefix cache, or by the sample it was forked from.
    """

    state: str
    first: int
    last: int
    num_tokens: int = 0
    num_found: int = 0


@dataclass(slots=True)
class Life:
    """One sequence from arrival to end. ``preempted``: the steps in which it lost its blocks."""

    sequence_id: int
    name: str
    spans: list[Span] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    furthest: int = 0  # most tokens that it has ever had stored; tokens before it are recomputed

    def state_at(self, place: int) -> str | None:
        """What it was doing in step ``place``; None before it arrived and after it ended."""
        return next((span.state for span in self.spans if span.first <= place <= span.last), None)

    def add(self, place: int, state: str, num_tokens: int, num_found: int) -> None:
        last = self.spans[-1] if self.spans else None
        alone = state in ("prefill", "recompute", "failed")
        if last is not None and not alone and last.state == state and last.last == place - 1:
            last.last = place
        else:
            self.spans.append(Span(state, place, place, num_tokens if alone else 0, num_found))


def check_trace(trace: Trace | None) -> None:
    """Raises ValueError if nothing was recorded."""
    if trace is None:
        raise ValueError("trace=None: this engine records nothing; LLM(trace=True) records every step")


def sequence_lives(trace: Trace) -> list[Life]:
    """Every sequence of the trace, by arrival."""
    check_trace(trace)
    lives = {i: Life(i, name) for i, name in sequence_names(trace).items()}
    for place, (step, replay) in enumerate(zip(trace.steps, trace.replays(), strict=True)):
        failed = step.ended_s is None and step is not trace.steps[-1]
        scheduled = step.scheduled
        found = {event.sequence_id: event.num_tokens for event in step.events if isinstance(event, Adopt | Fork)}
        for sequence_id in step.preempted:
            lives[sequence_id].preempted.append(place)
        for sequence_id in {*replay.states, *replay.tables}:
            life, num_found = lives[sequence_id], found.get(sequence_id, 0)
            state = _state(life, step, replay, bool(num_found))
            if failed and sequence_id in scheduled:
                state = "failed"
            life.furthest = max(life.furthest, replay.computed[sequence_id] - num_found)
            life.add(place, state, scheduled.get(sequence_id, 0), num_found)
    return list(lives.values())


def _state(life: Life, step: TraceStep, replay: Replay, is_new: bool) -> str:
    sequence_id = life.sequence_id
    state = replay.states.get(sequence_id)
    if state is None:
        return "held"
    if state is not SequenceState.RUNNING:
        return state.value
    if sequence_id in step.sequence_ids:
        if replay.computed[sequence_id] < life.furthest:
            return "recompute"
        return "prefill" if sequence_id in step.prefills else "decode"
    return "prefill" if is_new else "stalled"  # a sequence forked in this step samples without computing

"""Solutions to the exercises of chapter 12, the whole ladder."""

from __future__ import annotations

from statistics import linear_regression, median
from time import perf_counter


def decoder_calls(outputs, seats):
    """A static batch takes as long as its longest; a seat that is free goes to the next in line."""
    static = sum(max(outputs[first : first + seats]) for first in range(0, len(outputs), seats))
    free_at = [0] * seats
    for output in outputs:
        first_free = free_at.index(min(free_at))
        free_at[first_free] += output
    return sum(outputs), static, max(free_at)


def first_difference(expected, found):
    """Request by request and token by token; where one list ends before the other, its end is the difference."""
    for request in range(max(len(expected), len(found))):
        if request >= min(len(expected), len(found)):
            return request, 0
        ours, theirs = expected[request], found[request]
        for position in range(max(len(ours), len(theirs))):
            if ours[position : position + 1] != theirs[position : position + 1]:
                return request, position
    return None


def times_as_fast(ours_s, theirs_s):
    """Their seconds over ours, since fewer seconds are faster; pairs stay pairs."""
    each = [theirs / ours for ours, theirs in zip(ours_s, theirs_s, strict=True)]
    return median(theirs_s) / median(ours_s), min(each), max(each)


def predict_seconds(dots, num_calls, num_rows):
    """The line's height at no row is paid for each call, its slope for each row."""
    slope, height = linear_regression(*zip(*dots, strict=True))
    return height * num_calls + slope * num_rows


def step_timer(engine):
    """The step holds the scheduling, so the share is seconds["schedule"] / seconds["step"]."""
    seconds = {"step": 0.0, "schedule": 0.0}

    def timed(name, method):
        def call():
            begin_s = perf_counter()
            try:
                return method()
            finally:
                seconds[name] += perf_counter() - begin_s

        return call

    engine.step = timed("step", engine.step)
    engine.scheduler.schedule = timed("schedule", engine.scheduler.schedule)
    return seconds


# The playground. With one request nothing can be batched or padded: cached, static and paged are equal. With answers
# of one length no row waits, and prompts have one length here anyway: static and paged are equal. With answers of one
# token nothing is computed twice: naive and cached are equal.

"""Wrong answers to the exercises of chapter 12."""

from __future__ import annotations

from statistics import linear_regression, mean, median
from time import perf_counter

from planted import wrong


def _static(outputs, seats):
    return sum(max(outputs[first : first + seats]) for first in range(0, len(outputs), seats))


@wrong("decoder_calls", "only if both are always taken")
def fills_every_seat_to_the_end(outputs, seats):
    return sum(outputs), _static(outputs, seats), max(-(-sum(outputs) // seats), 8 if 8 in outputs else 0)


@wrong("decoder_calls", "a seat is free as soon as its request ends")
def waits_for_the_whole_batch(outputs, seats):
    return sum(outputs), _static(outputs, seats), _static(outputs, seats)


@wrong("decoder_calls", "the second waits for the first")
def forgets_that_batches_queue(outputs, seats):
    return sum(outputs), max(outputs), max(outputs)


@wrong("first_difference", "zip\\(\\) ends with the shorter")
def zips(expected, found):
    for request, (ours, theirs) in enumerate(zip(expected, found)):  # noqa: B905
        for position, (one, other) in enumerate(zip(ours, theirs)):  # noqa: B905
            if one != other:
                return request, position
    return None


@wrong("first_difference", "positions count within the request")
def names_the_request_alone(expected, found):
    for request, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if ours != theirs:
            return request, 0
    return None


@wrong("times_as_fast", "our seconds over theirs")
def divides_the_wrong_way(ours_s, theirs_s):
    each = [ours / theirs for ours, theirs in zip(ours_s, theirs_s, strict=True)]
    return median(ours_s) / median(theirs_s), min(each), max(each)


@wrong("times_as_fast", "these are means")
def takes_means(ours_s, theirs_s):
    each = [theirs / ours for ours, theirs in zip(ours_s, theirs_s, strict=True)]
    return mean(theirs_s) / mean(ours_s), min(each), max(each)


@wrong("times_as_fast", "compare different rounds")
def sets_best_against_worst(ours_s, theirs_s):
    return (median(theirs_s) / median(ours_s), min(theirs_s) / max(ours_s), max(theirs_s) / min(ours_s))


@wrong("predict_seconds", "counted once instead of for each call")
def pays_one_call(dots, num_calls, num_rows):
    slope, height = linear_regression(*zip(*dots, strict=True))
    return height + slope * num_rows


@wrong("predict_seconds", "mean time per row")
def takes_the_mean_row(dots, num_calls, num_rows):
    return num_rows * sum(seconds for _, seconds in dots) / sum(rows for rows, _ in dots)


@wrong("predict_seconds", "least squares")
def draws_the_line_through_two_dots(dots, num_calls, num_rows):
    (first, first_s), (last, last_s) = dots[0], dots[-1]
    slope = (last_s - first_s) / (last - first)
    return num_calls * (first_s - slope * first) + num_rows * slope


def _timed(seconds, name, call, add=True, returns=True):
    def run(*args):
        began_s = perf_counter()
        result = call(*args)
        seconds[name] = seconds.get(name, 0.0) * add + perf_counter() - began_s
        return result if returns else None

    return run


@wrong("step_timer", "added up")
def keeps_the_last_step(engine):
    seconds = {}
    engine.step = _timed(seconds, "step", engine.step, add=False)
    engine.scheduler.schedule = _timed(seconds, "schedule", engine.scheduler.schedule, add=False)
    return seconds


@wrong("step_timer", "nothing to compute")
def swallows_the_schedule(engine):
    seconds = {}
    engine.step = _timed(seconds, "step", engine.step)
    engine.scheduler.schedule = _timed(seconds, "schedule", engine.scheduler.schedule, returns=False)
    return seconds


@wrong("step_timer", "timed at all")
def forgets_the_scheduler(engine):
    seconds = {}
    engine.step = _timed(seconds, "step", engine.step)
    return seconds


@wrong("step_timer", "of its class")
def replaces_the_classs_methods(engine):
    seconds = {}
    for one, name in ((type(engine), "step"), (type(engine.scheduler), "schedule")):
        setattr(one, name, _timed(seconds, name, getattr(one, name)))
    return seconds

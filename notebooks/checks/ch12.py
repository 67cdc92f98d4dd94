"""Checkers of chapter 12, the whole ladder."""

from __future__ import annotations

import math
import time

from checks import checker, expect


def _triple(found, asked: str, parts: str) -> tuple:
    expect(found is not None, f"{asked} gives None: is the `return` missing?")
    expect(isinstance(found, tuple) and len(found) == 3, f"{asked} has to give three things, {parts}")
    return found


@checker
def decoder_calls(answer):
    """Calls of the decoder: one at a time, in static batches, continuous, with so many seats."""
    parts = "calls one at a time, in static batches, continuous"
    one, static, continuous = _triple(answer([8, 2, 3, 3], 2), "decoder_calls of [8, 2, 3, 3] and 2", parts)
    expect(one == 16, f"one at a time, [8, 2, 3, 3] take a call for each token, 16, and yours gives {one}")
    expect(static != 8, "there are two static batches one after the other: the second waits for the first")
    expect(static != 5, "a static batch lasts as long as its longest request, not its shortest")
    expect(static == 11, f"static batches [8, 2] and [3, 3] take 8 + 3 calls, and yours gives {static}")
    expect(continuous != 11, "continuous is as slow as static here: a seat is free as soon as its request ends")
    expect(
        continuous == 8, f"continuous: one seat runs the 8, the other 2, 3 and 3: 8 calls, and yours gives {continuous}"
    )
    tail = answer([2, 2, 9], 2)[2]
    expect(
        tail != 7, "13 tokens over 2 seats are 7 calls only if both are always taken: the 9 runs on alone at the end"
    )
    expect(tail != 9, "the longest request cannot always start at once: in [2, 2, 9] it waits 2 calls for a seat")
    expect(tail == 11, f"[2, 2, 9] with 2 seats take 2 + 9 calls, and yours gives {tail}")
    expect(answer([5, 1], 8) == (6, 5, 5), f"with seats to spare, [5, 1] give {answer([5, 1], 8)}")
    found = answer([4, 1, 1, 6, 2, 7, 3], 3)
    expect(found == (24, 14, 10), f"[4, 1, 1, 6, 2, 7, 3] and 3 give {found} instead of (24, 14, 10)")


@checker
def first_difference(answer):
    """None, or the first (request, position) at which two runs differ."""
    same = [[5, 6, 7], [8, 9]]
    found = answer([list(ids) for ids in same], [list(ids) for ids in same])
    expect(found is None, f"equal runs give None, and yours gives {found!r}")
    found = answer([[5, 6, 7], [8, 9]], [[5, 6, 7], [8, 4]])
    expect(found is not None, "[8, 9] against [8, 4] is not seen: is the `return` missing?")
    expect(found != (1, 0), "positions count within the request: 8 is right, the 9 at position 1 is not")
    expect(found == (1, 1), f"[8, 9] against [8, 4] in request 1 differ at (1, 1), and yours gives {found!r}")
    found = answer([[5, 6, 7], [8, 9]], [[5, 6], [8, 9]])
    expect(found is not None, "a run that stops early is passed as equal: zip() ends with the shorter of the two")
    expect(found == (0, 2), f"[5, 6, 7] against [5, 6] differ at (0, 2), and yours gives {found!r}")
    found = answer([[5, 6]], [[5, 6, 7]])
    expect(found == (0, 2), f"a run that goes on too long, [5, 6, 7] for [5, 6], gives {found!r}, not (0, 2)")
    found = answer([[5, 6], [8], [1]], [[5, 6], [8]])
    expect(found == (2, 0), f"a request that was dropped, the last of three, gives {found!r}, not (2, 0)")
    found = answer([[5], [8, 9]], [[5, 8], [9]])
    expect(found == (0, 1), f"[[5], [8, 9]] against [[5, 8], [9]] give {found!r}, not (0, 1)")


@checker
def times_as_fast(answer):
    """Ratio of medians, and the lowest and highest ratio within a round."""
    ours, theirs = [1.0, 4.0, 2.0], [3.0, 6.0, 8.0]
    ratio, low, high = _triple(
        answer(list(ours), list(theirs)), "times_as_fast", "the ratio of the medians, the lowest, the highest"
    )

    def near(found, right):
        return math.isclose(found, right, rel_tol=1e-6)

    expect(not near(ratio, 1 / 3), "this is our seconds over theirs: fewer seconds are faster")
    expect(not near(ratio, 17 / 7), "these are means: one round with a busy neighbour moves a mean, and not a median")
    expect(not near(ratio, 17 / 6), "this is the mean of the rounds' ratios; the ratio of the medians is asked for")
    expect(near(ratio, 3.0), f"medians 6 and 2 give 3.0, and yours gives {ratio}")
    expect(
        not (near(low, 0.75) or near(high, 8.0)),
        "the lowest and highest compare different rounds: a ratio is of two runs in the same round",
    )
    expect(
        not (near(low, 2.0) and near(high, 3.0)),
        "the lowest and highest come of sorted runs: rounds are pairs, and sorting parts them",
    )
    expect(near(low, 1.5) and near(high, 4.0), f"the rounds give 3.0, 1.5 and 4.0, and yours gives {low} to {high}")
    found = answer([2.0, 1.0, 5.0, 3.0], [4.0, 1.5, 5.0, 9.0])
    expect(
        near(found[0], 1.8),
        f"medians of four rounds lie between the middle two, 4.5 / 2.5 = 1.8, and yours gives {found[0]}",
    )


@checker
def predict_seconds(answer):
    """Least squares through (rows, seconds), then calls times height and rows times slope."""
    exact = [(1, 5.5), (4, 7.0), (10, 10.0)]  # 5 s a call and 0.5 s a row
    found = answer(list(exact), 3, 20)
    expect(found is not None, "predict_seconds gives None: is the `return` missing?")
    asked = "calls of 5 s and 0.5 s a row, 3 calls with 20 rows"

    def near(right):
        return math.isclose(found, right, rel_tol=1e-6)

    expect(not near(15.0), f"{asked}: the floor was counted once instead of for each call")
    expect(not near(10.0), f"{asked}: the rows cost something too, and the call as such was forgotten")
    expect(not near(45.0), f"{asked}: 20 rows are of all calls together, not of each")
    expect(not near(20 * 22.5 / 15), f"{asked}: a mean time per row forgets that a call of no row costs 5 s")
    expect(not near(3 * 22.5 / 3), f"{asked}: a mean time per call forgets the rows")
    expect(not near(101.5), f"{asked}: slope and height are swapped")
    expect(near(25.0), f"{asked}, take 3 * 5 + 20 * 0.5 = 25 s, and yours gives {found}")
    noisy = [(1, 2.0), (2, 4.0), (3, 3.0), (4, 7.0)]  # slope 1.4, height 0.5
    found = answer(list(noisy), 2, 10)
    expect(
        near(15.0),
        f"dots that lie on no line: least squares gives slope 1.4 and height 0.5, so 15 s, and yours gives {found}",
    )


def _slow_engines() -> tuple:
    """Two of the shape of my_engine's: each step schedules for 2 ms at least, and takes as long again."""

    class SlowScheduler:
        spent_s = 0.0

        def schedule(self):
            began_s = time.perf_counter()
            time.sleep(0.002)
            self.spent_s += time.perf_counter() - began_s
            return "what was scheduled"

    class SlowEngine:
        spent_s = 0.0

        def __init__(self) -> None:
            self.scheduler = SlowScheduler()

        def step(self):
            began_s = time.perf_counter()
            time.sleep(0.002)
            found = f"a step of {self.scheduler.schedule()}"
            self.spent_s += time.perf_counter() - began_s
            return found

    return SlowEngine(), SlowEngine()


@checker
def step_timer(answer):
    """An engine -> a dictionary that adds up the seconds of its steps, and of scheduling in them."""
    engine, other = _slow_engines()
    began_s = time.perf_counter()
    seconds = answer(engine)
    expect(seconds is not None, "step_timer gives None: is the `return` missing?")
    names = ("schedule", "step")
    timed = (engine.scheduler, engine)
    has_names = isinstance(seconds, dict) and set(seconds) <= set(names)
    expect(has_names, f"a dictionary with the keys {names} is asked for, and this is {seconds!r}")
    for place in (1, 2, 3):
        found = engine.step()
        expect(found is not None, "engine.step returns nothing any more; return what the method has returned")
        expect("None" not in found, "scheduler.schedule returns nothing any more, so there is nothing to compute")
        for name, own in zip(names, timed, strict=True):
            found_s = seconds.get(name, 0.0)
            total = f"after {place} steps, of {own.spent_s:.6f} seconds together, {name!r} is {found_s:.6f} seconds"
            expect(found_s > 0, f"{total}: is it timed at all?")
            expect(place == 1 or found_s >= 0.99 * own.spent_s, f"{total}: are the seconds of all steps added up?")
            expect(found_s <= time.perf_counter() - began_s, f"{total}, more than has passed")
    expect(seconds["schedule"] < seconds["step"], "scheduling is a part of a step, and takes less than it")
    before = dict(seconds)
    other.step()
    expect(seconds == before, "another engine is timed, too: replace the methods of this engine, not of its class")

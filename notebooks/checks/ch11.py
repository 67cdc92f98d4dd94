"""Checkers of chapter 11, the engine."""

from __future__ import annotations

import json
import random
from itertools import pairwise

from checks import checker, expect

EVENTS = [{"text": "On"}, {"text": "ce, a café"}, {"text": ""}, {"text": " – 3 €", "n": 4}]


@checker
def read_events(answer):
    """Payloads of server-sent events, however the network cuts them: chunks of bytes -> list of parsed JSON."""
    one_each = [b"data: " + json.dumps(e, ensure_ascii=False).encode() + b"\n\n" for e in EVENTS]
    wire = b"".join(one_each) + b"data: [DONE]\n\n"

    def check(chunks, of_what):
        try:
            found = answer(iter(list(chunks)))
        except UnicodeDecodeError:
            expect(False, f"{of_what}: a letter of several bytes is cut in two; decode whole events, not chunks")
        except ValueError as error:
            expect(False, f"{of_what}: what is parsed is no JSON ({error}): is it a whole payload, and not [DONE]?")
        expect(found is not None, "read_events gives None: is the `return` missing?")
        found = list(found)
        expect(
            len(found) == len(EVENTS),
            f"{of_what}: {len(EVENTS)} payloads are there before [DONE], and not {len(found)}",
        )
        for index, (payload, right) in enumerate(zip(found, EVENTS, strict=True)):
            expect(payload == right, f"{of_what}: payload {index} is {right}, and not {payload!r}")

    check([*one_each, b"data: [DONE]\n\n"], "an event a chunk")
    check([wire], "all events in one chunk")
    check([wire[:9], wire[9:30], wire[30:]], "an event over several chunks")
    check([wire[i : i + 1] for i in range(len(wire))], "a byte a chunk")
    check([b": still there\n\n", *one_each[:2], b":\n\n", *one_each[2:], b"data: [DONE]\n\n"], "comments between")
    rng = random.Random(0)
    for _ in range(50):
        cuts = [0, *sorted(rng.sample(range(1, len(wire)), 6)), len(wire)]
        check([wire[a:b] for a, b in pairwise(cuts)], f"chunks that end at bytes {cuts[1:]}")


class _Reference:
    """What StopFilter is held to."""

    def __init__(self, stops):
        self.stops, self.text, self.num_shown, self.stopped = stops, "", 0, False

    def push(self, piece):
        if self.stopped:
            return ""
        self.text += piece
        found = [at for at in (self.text.find(stop) for stop in self.stops) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self.text) - max(_held(self.text, stop) for stop in self.stops)
        shown, self.num_shown = self.text[self.num_shown : end], end
        return shown

    def finish(self):
        return "" if self.stopped else self.text[self.num_shown :]


def _held(text, stop):
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@checker
def StopFilter(answer):
    """A stream of text with stop strings: push(piece) -> what may be shown, finish() -> what was held."""

    def check(stops, pieces, why):
        mine, right = answer(list(stops)), _Reference(stops)
        asked = f"stops {stops}, pieces {pieces}"
        for index, piece in enumerate(pieces):
            found, wanted = mine.push(piece), right.push(piece)
            expect(isinstance(found, str), f"push gives {found!r}, and a string is asked for")
            expect(found == wanted, f"{asked}: after piece {index} {wanted!r} may be shown, and not {found!r}: {why}")
        found, wanted = mine.finish(), right.finish()
        expect(found == wanted, f"{asked}: finish gives {wanted!r}, and not {found!r}: {why}")

    check(["END"], ["all", " is", " well"], "nothing in it begins a stop string")
    check(["END"], ["a b", "END", " c"], "nothing is shown from the stop string on")
    check(["END"], ["a EN", "D b"], "a stop string may come in two pieces, so its beginning has to wait")
    check(["END"], ["a E", "N", " b"], "what was held is shown once it cannot be the stop string any more")
    check(["END"], ["a E", "N"], "what is held at the end was text after all")
    check(["\n\n", "END"], ["a E", "ND"], "every stop string counts, not the first alone")
    check(["END", "stop"], ["a stop END"], "the stop string that begins first in the text counts, not in the list")
    check(["aab"], ["aa", "ab", "x"], "a longer beginning was none, and a shorter one in it is the stop string")
    rng = random.Random(0)
    for _ in range(200):
        stops = ["".join(rng.choices("ab", k=rng.randint(2, 5))) for _ in range(rng.randint(1, 3))]
        pieces = ["".join(rng.choices("abc", k=rng.randint(0, 4))) for _ in range(rng.randint(1, 8))]
        check(stops, pieces, "a case drawn at random")


class _Flaky:
    """Looks like an engine: ``script`` has what each step gives, {request id: (output, is it the last)} or an error."""

    def __init__(self, script, live):
        self.script, self.live = list(script), dict.fromkeys(live)
        self.num_steps, self.aborted = 0, []

    def step(self):
        self.num_steps += 1
        if self.num_steps > len(self.script):
            self.live.clear()  # ends the loop of whoever has no end
            return {}
        now = self.script[self.num_steps - 1]
        if isinstance(now, Exception):
            raise now
        for request_id, (_, is_last) in now.items():
            if is_last:
                del self.live[request_id]
        return {request_id: output for request_id, (output, _) in now.items()}

    def abort(self, request_id):
        self.live.pop(request_id, None)
        self.aborted.append(request_id)


@checker
def run_to_end(answer):
    """Steps until nobody lives, through errors; gives up after so many in a row: engine, patience -> outputs."""

    def check(script, patience, right, num_steps, aborted, of_what):
        engine = _Flaky(script, "abc")
        try:
            found = answer(engine, patience)
        except RuntimeError as error:
            expect("changed size" not in str(error), f"{of_what}: abort changes `live`: walk over a copy of it")
            expect(False, f"{of_what}: the RuntimeError of a step comes out, and it is to be survived")
        expect(found is not None, "run_to_end gives None: is the `return` missing?")
        expect(
            engine.num_steps == num_steps, f"{of_what}: {num_steps} steps are to be tried, and not {engine.num_steps}"
        )
        expect(not engine.live, f"{of_what}: {list(engine.live)} still live: who gives up aborts them")
        expect(sorted(engine.aborted) == aborted, f"{of_what}: {aborted} are to be aborted, not {engine.aborted}")
        expect(found == right, f"{of_what}: the last outputs are {right}, and not {found}")

    failed = RuntimeError("the device did not answer")
    first, second = {"a": (1, False), "b": (1, False)}, {"a": (2, True), "c": (1, False)}
    third = {"b": (3, True), "c": (2, True)}
    whole = {"a": 2, "b": 3, "c": 2}
    check([first, second, third, {}], 2, whole, 3, [], "three steps that all go well")
    check([failed, first, second, failed, third, {}], 2, whole, 5, [], "patience 2, steps 1 and 4 fail")
    alternating = [failed, first, failed, second, failed, {}, failed, third, {}]
    check(alternating, 2, whole, 8, [], "patience 2, every other step fails, never two in a row")
    check([first, failed, failed, third, {}], 2, {"a": 1, "b": 1}, 3, ["a", "b", "c"], "patience 2, two fail in a row")
    check([failed] * 9, 4, {}, 4, ["a", "b", "c"], "patience 4, all steps fail")
    engine = _Flaky([first, KeyError("a bug")], "abc")
    try:
        answer(engine, 3)
    except KeyError:
        return
    expect(False, "a step raises KeyError: only RuntimeError is to be survived, the rest is a bug and comes out")


@checker
def mean_in_system(answer):
    """The mean number of requests in the system: when each arrived, when each ended -> float."""
    cases = [
        ([0.0, 1.0, 2.0], [4.0, 3.0, 6.0]),
        ([10.0, 11.0, 12.0], [14.0, 13.0, 16.0]),
        ([5.0, 2.0, 3.0], [6.0, 9.0, 4.0]),
    ]
    rng = random.Random(0)
    arrived = [rng.uniform(0, 9) for _ in range(20)]
    cases.append((arrived, [moment + rng.uniform(0.1, 5) for moment in arrived]))
    for arrived_s, ended_s in cases:
        found = answer(list(arrived_s), list(ended_s))
        expect(found is not None, "mean_in_system gives None: is the `return` missing?")
        asked = f"arrived {arrived_s}, ended {ended_s}" if len(arrived_s) < 9 else "20 requests drawn at random"
        there_s = sum(ended_s) - sum(arrived_s)
        begin_s, end_s = min(arrived_s), max(ended_s)
        right = there_s / (end_s - begin_s)

        def is_about(wrong, found=found, right=right):
            return abs(found - wrong) < 1e-9 < abs(right - wrong)

        expect(not is_about(there_s / len(arrived_s)), f"{asked}: {found:.3f} is the mean time that each spends there")
        expect(not is_about(len(arrived_s) / (end_s - begin_s)), f"{asked}: {found:.3f} is the rate of arrivals")
        expect(not is_about(there_s / end_s), f"{asked}: the clock begins with the first arrival, not at 0")
        for span_s in (ended_s[-1] - arrived_s[0], ended_s[-1] - begin_s, end_s - arrived_s[0]):
            expect(
                not span_s or not is_about(there_s / span_s),
                f"{asked}: the first arrival is the earliest of all, the last end the latest; lists are in any order",
            )
        expect(abs(found - right) < 1e-9, f"{asked}: {right:.3f} are there in the mean, and not {found:.3f}")

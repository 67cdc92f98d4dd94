"""Checkers of chapter 11, the engine."""

from __future__ import annotations

import json
import random
from itertools import pairwise

from my_engine.engine import Engine

from checks import checker, expect
from paged_infer import storyteller

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
            expect(False, f"{of_what}: what is parsed is not JSON ({error}): is it a whole payload, and not [DONE]?")
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


@checker
def stream_until(answer):
    """A stream of my_engine that ends at a stop string: engine, prompt, stops, options -> pieces of text."""
    engine = Engine(storyteller.PATH, num_blocks=64)
    prompt, options = "A story about Mia and a kite.", {"max_tokens": 60}
    whole = "".join(engine.stream(prompt, **options))
    for stops in (["a quiet boy"], ["blackbird", " Mia. She"], ["never in it"], ["ittle", "Her best"]):
        found = answer(engine, prompt, list(stops), **options)
        expect(found is not None, "stream_until gives None: it is to yield pieces")
        expect(not isinstance(found, str), "stream_until gives one string: it is to yield pieces")
        pieces, text = list(found), whole[: min(whole.find(stop) % (len(whole) + 1) for stop in stops)]
        asked = f"stops {stops}"
        expect(
            all(isinstance(piece, str) for piece in pieces), f"{asked}: pieces of text are asked for, not {pieces[:2]}"
        )
        expect(
            len(pieces) > 3 or len(text) < 60, f"{asked}: the text comes in {len(pieces)} piece(s) and not as it grows"
        )
        expect("".join(pieces) == text, f"{asked}: the text is {text!r}, and not {''.join(pieces)!r}")
        _expect_idle(engine, f"{asked}, at the end")
    (other,) = engine.add_requests(["Once upon a time"], max_tokens=30)
    early = answer(engine, prompt, ["never in it"], **options)
    next(early), next(early)
    early.close()
    running = [*engine.scheduler.running, *engine.scheduler.waiting]
    expect(other in running or other.finish_reason, "another request was ended, too")
    expect(len(running) <= 1, "a stream that is closed early leaves its sequence in the scheduler")
    while not other.finish_reason:
        engine.step()
    _expect_idle(engine, "closed early")


def _expect_idle(engine, asked):
    scheduler = engine.scheduler
    expect(not scheduler.running and not scheduler.waiting, f"{asked}: a sequence is still in the scheduler")
    num_free, num_blocks = len(scheduler.manager.free_blocks), scheduler.manager.num_blocks
    expect(num_free == num_blocks, f"{asked}: {num_blocks - num_free} blocks are still held")

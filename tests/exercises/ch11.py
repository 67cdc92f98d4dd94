"""Wrong answers to the exercises of chapter 11."""

from __future__ import annotations

import json

from planted import wrong


@wrong("read_events", "all events in one chunk: .* no JSON")
def takes_a_chunk_for_an_event(chunks):
    payloads = [chunk.strip().removeprefix(b"data: ") for chunk in chunks]
    return [json.loads(payload) for payload in payloads if payload != b"[DONE]"]


@wrong("read_events", r"no JSON .* and not \[DONE\]")
def parses_done(chunks):
    events = b"".join(chunks).split(b"\n\n")
    return [json.loads(event.removeprefix(b"data: ")) for event in events if event]


@wrong("read_events", "decode whole events, not chunks")
def decodes_chunks(chunks):
    events = "".join(chunk.decode() for chunk in chunks).split("\n\n")
    return [json.loads(e.removeprefix("data: ")) for e in events if e.startswith("data: {")]


@wrong("read_events", "an event over several chunks: .* no JSON")
def keeps_nothing_between_chunks(chunks):
    events = [event for chunk in chunks for event in chunk.split(b"\n\n")]
    return [json.loads(event.removeprefix(b"data: ")) for event in events if event.startswith(b"data: {")]


@wrong("read_events", "4 payloads are there before .DONE., and not 5")
def forgets_to_stop_at_done(chunks):
    events = [event for event in b"".join(chunks).split(b"\n\n") if event.startswith(b"data: ")]
    payloads = [event.removeprefix(b"data: ") for event in events]
    return [None if payload == b"[DONE]" else json.loads(payload) for payload in payloads]


class Filter:
    """A right one, of which the wrong ones change a part."""

    def __init__(self, stops):
        self.stops, self.kept, self.stopped = stops, "", False

    def push(self, piece):
        if self.stopped:
            return ""
        self.kept += piece
        at = self.cut()
        self.stopped = at is not None
        end = len(self.kept) - self.num_held() if at is None else at
        shown, self.kept = self.kept[:end], self.kept[end:]
        return shown

    def cut(self):
        return min((self.kept.find(stop) for stop in self.stops if stop in self.kept), default=None)

    def num_held(self):
        ends = (n for stop in self.stops for n in range(len(stop)) if self.kept.endswith(stop[:n]))
        return max(ends, default=0)

    def finish(self):
        return "" if self.stopped else self.kept


@wrong("StopFilter", "its beginning has to wait")
class ShowsAtOnce(Filter):
    def num_held(self):
        return 0


@wrong("StopFilter", "shown once it cannot be the stop string")
class HoldsForGood(Filter):
    def num_held(self):
        first = min(self.kept.find(stop[0]) % (len(self.kept) + 1) for stop in self.stops)
        return len(self.kept) - first


@wrong("StopFilter", "nothing in it begins a stop string")
class HoldsTheLastLettersAlways(Filter):
    def num_held(self):
        return min(len(self.kept), max(len(stop) for stop in self.stops) - 1)


@wrong("StopFilter", "what is held at the end was text after all")
class LosesTheEnd(Filter):
    def finish(self):
        return ""


@wrong("StopFilter", "every stop string counts")
class KnowsOneStop(Filter):
    def __init__(self, stops):
        super().__init__(stops[:1])


@wrong("StopFilter", "begins first in the text counts, not in the list")
class TakesTheFirstOfTheList(Filter):
    def cut(self):
        return next((self.kept.find(stop) for stop in self.stops if stop in self.kept), None)


@wrong("StopFilter", "nothing is shown from the stop string on")
class GoesOn(Filter):
    def push(self, piece):
        shown = super().push(piece)
        self.stopped = False
        return shown


@wrong("run_to_end", "comes out, and it is to be survived")
def survives_nothing(engine, patience):
    outputs = {}
    while engine.live:
        outputs |= engine.step()
    return outputs


def run(engine, patience, survived=RuntimeError, forgives=True, aborts=True, copies=True, keep=True, offset=0):
    outputs, num_failures = {}, 0
    while engine.live:
        try:
            outputs = {**outputs, **engine.step()} if keep else engine.step()
            num_failures = 0 if forgives else num_failures
        except survived:
            num_failures += 1
            if num_failures == patience + offset:
                for request_id in list(engine.live) if copies else engine.live:
                    if aborts:
                        engine.abort(request_id)
                break
    return outputs


@wrong("run_to_end", "steps 1 and 4 fail: 5 steps are to be tried, and not 4")
def counts_all_failures(engine, patience):
    return run(engine, patience, forgives=False)


@wrong("run_to_end", "still live: who gives up aborts them")
def gives_up_and_leaves(engine, patience):
    return run(engine, patience, aborts=False)


@wrong("run_to_end", "walk over a copy")
def walks_over_what_it_changes(engine, patience):
    return run(engine, patience, copies=False)


@wrong("run_to_end", "the last outputs are")
def returns_the_last_step(engine, patience):
    return run(engine, patience, keep=False)


@wrong("run_to_end", "two fail in a row: 3 steps are to be tried, and not 6")
def never_gives_up(engine, patience):
    return run(engine, 99)


@wrong("run_to_end", "two fail in a row: 3 steps are to be tried, and not 6")
def is_too_patient(engine, patience):
    return run(engine, patience, offset=1)


@wrong("run_to_end", "only RuntimeError is to be survived")
def survives_bugs(engine, patience):
    return run(engine, patience, survived=Exception)


@wrong("mean_in_system", "the mean time that each spends there")
def gives_the_mean_wait(arrived_s, ended_s):
    return sum(end - begin for begin, end in zip(arrived_s, ended_s, strict=True)) / len(arrived_s)


@wrong("mean_in_system", "the rate of arrivals")
def gives_the_rate(arrived_s, ended_s):
    return len(arrived_s) / (max(ended_s) - min(arrived_s))


@wrong("mean_in_system", "the clock begins with the first arrival")
def begins_at_zero(arrived_s, ended_s):
    return (sum(ended_s) - sum(arrived_s)) / max(ended_s)


@wrong("mean_in_system", "lists are in any order")
def trusts_the_order(arrived_s, ended_s):
    return (sum(ended_s) - sum(arrived_s)) / (ended_s[-1] - arrived_s[0])


@wrong("mean_in_system", "are there in the mean, and not")
def takes_the_middle_of_the_crowd(arrived_s, ended_s):
    return len(arrived_s) / 2

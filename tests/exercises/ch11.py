"""Wrong answers to the exercises of chapter 11."""

from __future__ import annotations

import json

from planted import wrong


@wrong("read_events", "all events in one chunk: .* not JSON")
def takes_a_chunk_for_an_event(chunks):
    payloads = [chunk.strip().removeprefix(b"data: ") for chunk in chunks]
    return [json.loads(payload) for payload in payloads if payload != b"[DONE]"]


@wrong("read_events", r"not JSON .* and not \[DONE\]")
def parses_done(chunks):
    events = b"".join(chunks).split(b"\n\n")
    return [json.loads(event.removeprefix(b"data: ")) for event in events if event]


@wrong("read_events", "decode whole events, not chunks")
def decodes_chunks(chunks):
    events = "".join(chunk.decode() for chunk in chunks).split("\n\n")
    return [json.loads(e.removeprefix("data: ")) for e in events if e.startswith("data: {")]


@wrong("read_events", "an event over several chunks: .* not JSON")
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


def stream(engine, prompt, stops, filters=Filter, ends=True, ends_all=False, **options):
    """A right one, of which the wrong ones change a part."""
    texts = filters(stops)
    before = [*engine.scheduler.running, *engine.scheduler.waiting]
    try:
        for piece in engine.stream(prompt, **options):
            yield texts.push(piece)
            if texts.stopped:
                return
        yield texts.finish()
    finally:
        for sequence in [*engine.scheduler.running, *engine.scheduler.waiting]:
            if ends and (ends_all or sequence not in before):
                engine.scheduler.finish(sequence)


@wrong("stream_until", "a sequence is still in the scheduler")
def stops_reading(engine, prompt, stops, **options):
    return stream(engine, prompt, stops, ends=False, **options)


@wrong("stream_until", "closed early leaves its sequence in the scheduler")
def ends_only_at_a_stop(engine, prompt, stops, **options):
    filtered = stream(engine, prompt, stops, **options)
    return filtered if stops != ["never in it"] else engine.stream(prompt, **options)


@wrong("stream_until", "another request was ended, too")
def clears_the_scheduler(engine, prompt, stops, **options):
    return stream(engine, prompt, stops, ends_all=True, **options)


@wrong("stream_until", "the text is .*, and not")
def looks_for_one_stop(engine, prompt, stops, **options):
    return stream(engine, prompt, stops[:1], **options)


@wrong("stream_until", "and not as it grows")
def answers_at_the_end(engine, prompt, stops, **options):
    yield "".join(stream(engine, prompt, stops, **options))

"""Solutions of chapter 11, the engine."""

from __future__ import annotations

import json


def read_events(chunks):
    """Whole events are cut off the front of what has come; only they are decoded."""
    payloads, rest = [], b""
    for chunk in chunks:
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                return payloads
            if event.startswith(b"data: "):
                payloads.append(json.loads(event.removeprefix(b"data: ")))
    return payloads


class StopFilter:
    """Keeps what it has not shown: at most one letter less than the longest stop string."""

    def __init__(self, stops):
        self.stops, self.kept, self.stopped = stops, "", False

    def push(self, piece):
        if self.stopped:
            return ""
        self.kept += piece
        found = [at for at in (self.kept.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(self.kept) - max(self.num_held(stop) for stop in self.stops)
        shown, self.kept = self.kept[:end], self.kept[end:]
        return shown

    def num_held(self, stop):
        longest = min(len(stop) - 1, len(self.kept))
        return next((n for n in range(longest, 0, -1) if self.kept.endswith(stop[:n])), 0)

    def finish(self):
        return "" if self.stopped else self.kept


def stream_until(engine, prompt, stops, **options):
    """Its own loop: so it has the sequence in hand, and can end it."""
    texts, num_read = StopFilter(stops), 0
    (sequence,) = engine.add_requests([prompt], **options)
    try:
        while not sequence.finish_reason and not texts.stopped:
            engine.step()
            text = engine.decoder.tokenizer.decode(sequence.output_token_ids)
            if not text.endswith("\ufffd") or sequence.finish_reason:
                yield texts.push(text[num_read:])
                num_read = len(text)
        yield texts.finish()
    finally:
        if sequence in engine.scheduler.running:
            engine.scheduler.finish(sequence)
        elif sequence in engine.scheduler.waiting:
            engine.scheduler.waiting.remove(sequence)

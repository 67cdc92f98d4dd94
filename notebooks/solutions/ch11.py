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


def run_to_end(engine, patience):
    """One good step forgives all failures before it."""
    outputs, num_failures = {}, 0
    while engine.live:
        try:
            outputs |= engine.step()
            num_failures = 0
        except RuntimeError:
            num_failures += 1
            if num_failures == patience:
                for request_id in list(engine.live):
                    engine.abort(request_id)
    return outputs


def mean_in_system(arrived_s, ended_s):
    """Request-seconds over seconds: the rate times the mean time of each, with the number of requests cancelled."""
    return (sum(ended_s) - sum(arrived_s)) / (max(ended_s) - min(arrived_s))

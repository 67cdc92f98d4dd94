"""The ladder, measured: every rung on the same requests, interleaved, held to the tokens that transformers gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from paged_infer.bench.machine import describe_machine
from paged_infer.bench.metrics import Run, System
from paged_infer.bench.workloads import Workload

REFERENCE = "transformers"


@dataclass(frozen=True, slots=True)
class RungReport:
    """Medians over the repeats of one rung."""

    name: str
    seconds: float
    tokens_per_s: float
    ttft_s: float  # median over the requests
    peak_kv_bytes: int | None  # None where a peer does not tell
    kv_fill: float | None
    same_tokens: bool  # as transformers, one request at a time, in every repeat
    runs_s: list[float] = field(default_factory=list)  # every repeat, in the order of running


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of medians, and the smallest and largest of a repeat's own."""

    name: str
    peer: str
    of_medians: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.name} / {self.peer} = {self.of_medians:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


@dataclass(frozen=True, slots=True)
class LadderReport:
    model: str
    workload: str
    num_requests: int
    num_tokens: int
    seed: int
    repeats: int
    machine: dict[str, Any]
    rungs: list[RungReport]

    def save(self, path: Path) -> None:
        """As JSON, so that every picture can be drawn again from its numbers."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "rungs"}
        rungs = [{name: getattr(rung, name) for name in rung.__slots__} for rung in self.rungs]
        path.write_text(json.dumps({**fields, "rungs": rungs}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> LadderReport:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "rungs": [RungReport(**rung) for rung in fields["rungs"]]})

    def __getitem__(self, name: str) -> RungReport:
        return next(rung for rung in self.rungs if rung.name == name)

    def ratio(self, name: str, peer: str) -> Ratio:
        """How many times as fast ``name`` is as ``peer``."""
        pairs = zip(self[peer].runs_s, self[name].runs_s, strict=True)
        each = [theirs / ours for theirs, ours in pairs]
        return Ratio(name, peer, self[peer].seconds / self[name].seconds, min(each), max(each))


def run_ladder(
    rungs: Mapping[str, System],
    workload: Workload,
    model: str,
    repeats: int = 1,
    warm_up: bool = True,
    on_run: Callable[[str], None] = lambda name: None,
) -> LadderReport:
    """Run every rung ``repeats`` times, interleaved, after one short run of each that is thrown away.

    Args:
        rungs: by name; "transformers" must be among them, its tokens are the ones that all others are held to. One
            request at a time is slow, and its tokens are wanted once: so often it runs.
        on_run: called with the rung's name after each measured run.
    """
    machine = describe_machine()
    if warm_up:
        short = Workload(workload.name, workload.prompts[:2], workload.params[:2], workload.seed)
        for rung in rungs.values():
            rung(short)
    results: dict[str, list[Run]] = {name: [] for name in rungs}
    for repeat in range(repeats):
        for name, rung in rungs.items():
            if name != REFERENCE or not repeat:
                results[name].append(rung(workload))
                on_run(name)
    expected = results[REFERENCE][0].token_ids
    return LadderReport(
        model=model,
        workload=workload.name,
        num_requests=len(workload.prompts),
        num_tokens=results[REFERENCE][0].num_tokens,
        seed=workload.seed,
        repeats=repeats,
        machine=machine,
        rungs=[_report(name, runs, expected) for name, runs in results.items()],
    )


def _report(name: str, runs: list[Run], expected: list[list[int]]) -> RungReport:
    return RungReport(
        name=name,
        seconds=median(run.seconds for run in runs),
        tokens_per_s=median(run.tokens_per_s for run in runs),
        ttft_s=median(one.ttft_s for run in runs for one in run.times),
        peak_kv_bytes=runs[0].peak_kv_bytes,
        kv_fill=runs[0].kv_fill,
        same_tokens=all(run.token_ids == expected for run in runs),
        runs_s=[run.seconds for run in runs],
    )

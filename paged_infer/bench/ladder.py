"""The ladder, measured: every rung on the same requests, interleaved, held to the tokens that transformers gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from paged_infer.bench.machine import describe_machine
from paged_infer.bench.rungs import Rung, RungResult
from paged_infer.bench.workloads import Workload

REFERENCE = "transformers"


@dataclass(frozen=True, slots=True)
class RungReport:
    """Medians over the repeats of one rung."""

    name: str
    seconds: float
    tokens_per_s: float
    ttft_s: float
    peak_kv_bytes: int
    kv_fill: float | None
    same_tokens: bool  # as transformers, one request at a time, in every repeat


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


def run_ladder(
    rungs: Mapping[str, Rung],
    workload: Workload,
    model: str,
    repeats: int = 1,
    warm_up: bool = True,
    on_run: Callable[[str], None] = lambda name: None,
) -> LadderReport:
    """Run every rung ``repeats`` times, interleaved, after one short run of each that is thrown away.

    Args:
        rungs: by name; "transformers" must be among them, its tokens are the ones that all others are held to.
        on_run: called with the rung's name after each measured run.
    """
    machine = describe_machine()
    if warm_up:
        short = Workload(workload.name, workload.prompts[:2], workload.params[:2], workload.seed)
        for rung in rungs.values():
            rung(short)
    results: dict[str, list[RungResult]] = {name: [] for name in rungs}
    for _ in range(repeats):
        for name, rung in rungs.items():
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


def _report(name: str, runs: list[RungResult], expected: list[list[int]]) -> RungReport:
    return RungReport(
        name=name,
        seconds=median(run.seconds for run in runs),
        tokens_per_s=median(run.tokens_per_s for run in runs),
        ttft_s=median(run.ttft_s for run in runs),
        peak_kv_bytes=max(run.peak_kv_bytes for run in runs),
        kv_fill=runs[0].kv_fill,
        same_tokens=all(run.token_ids == expected for run in runs),
    )

"""The ladder: every baseline on the same requests, interleaved, held to the tokens that transformers gives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from paged_infer.bench.metrics import Metrics, Percentiles, System
from paged_infer.bench.report import from_json
from paged_infer.bench.speed.measure import REFERENCE, Bench, Entry, SpeedReport, run_warm_ups
from paged_infer.bench.speed.rounds import Runs, nothing
from paged_infer.bench.speed.same_tokens import TokenComparison
from paged_infer.bench.workloads import Workload
from paged_infer.llm import LLM

COMMAND = "ladder"


def run_ladder(
    llm: LLM,
    systems: Mapping[str, System],
    workload: Workload,
    repeats: int = 1,
    warm_up: bool = True,
    on_run: Callable[[str], None] = nothing,
    save: Callable[[SpeedReport], None] | None = None,
    deadline_s: float = math.inf,
) -> SpeedReport:
    """Run every system ``repeats`` times, interleaved, after short runs of each that are thrown away.

    Args:
        llm: the engine that the report describes.
        systems: by name. "transformers" must be one of them: all others are held to its tokens. It serves one request
            at a time, which is slow, and its tokens are needed once, so it runs once.
        on_run: called with the system's name after each measured run.
        save, deadline_s: see ``Bench``.
    """
    bench = Bench(llm, None, repeats, on_run, save=save, deadline_s=deadline_s)
    if warm_up:
        run_warm_ups(systems, workload)

    def report_of(runs: Runs) -> SpeedReport:
        compared = bench.compare(systems, workload, runs)
        ran = {name: its_runs for name, its_runs in runs.items() if its_runs}
        expected = runs[REFERENCE][0] if runs[REFERENCE] else next(iter(ran.values()))[0]
        entries = [
            Entry.of(
                name,
                its_runs,
                workload,
                None,
                same_counts=all(run.num_outputs == expected.num_outputs for run in its_runs),
                compared=compared.get(name),
                load=float(len(workload.prompts)),
            )
            for name, its_runs in ran.items()
        ]
        return replace(bench.report(COMMAND, workload, None, entries, Ladder), num_output_tokens=expected.num_tokens)

    return report_of(bench.interleave(systems, workload, report_of, once=(REFERENCE,)))


class Ladder(SpeedReport):
    """The report in the layout of ladder.json and bench-ladder.json, which is older than that of the other reports."""

    __slots__ = ()

    def as_json(self) -> dict[str, Any]:
        rungs = [
            {
                "name": entry.name,
                "seconds": entry.metrics.seconds,
                "tokens_per_s": entry.metrics.output_tokens_per_s,
                "ttft_s": entry.metrics.ttft_s and entry.metrics.ttft_s.p50,
                "peak_kv_bytes": None if entry.metrics.peak_kv_bytes is None else int(entry.metrics.peak_kv_bytes),
                "kv_fill": entry.metrics.kv_fill,
                "same_tokens": entry.same_tokens,
                "compared": None if entry.compared is None else asdict(entry.compared),
                "runs_s": entry.runs_s,
            }
            for entry in self.entries
        ]
        return {
            "model": self.model,
            "workload": self.workload,
            "num_requests": int(self.entries[0].load or 0),
            "num_tokens": self.num_output_tokens,
            "seed": self.seed,
            "repeats": self.repeats,
            "machine": self.machine,
            "is_complete": self.is_complete,
            "rungs": rungs,
        }

    @classmethod
    def read(cls, path: Path) -> Ladder:
        """What the file does not hold (dtype, prompt tokens, percentiles above the median) is empty."""
        stored = json.loads(path.read_text(encoding="utf-8"))
        entries = []
        for rung in stored.pop("rungs"):
            ttft_s = None if rung["ttft_s"] is None else Percentiles(*3 * [rung["ttft_s"]])
            memory = {name: rung[name] for name in ("peak_kv_bytes", "kv_fill")}
            metrics = Metrics(rung["seconds"], rung["tokens_per_s"], ttft_s=ttft_s, **memory)
            load = float(stored["num_requests"])
            compared = from_json(TokenComparison, one) if (one := rung.get("compared")) else None
            more = {"same_tokens": rung["same_tokens"], "load": load, "compared": compared}
            entries.append(Entry(rung["name"], metrics, rung["runs_s"], **more))
        del stored["num_requests"]
        return cls(COMMAND, num_output_tokens=stored.pop("num_tokens"), entries=entries, **stored)

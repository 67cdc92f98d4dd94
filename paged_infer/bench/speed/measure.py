"""Contenders on one workload, interleaved, held to the same tokens, measured by the same metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from paged_infer.bench.floor import Floor, ModelCost
from paged_infer.bench.load import poisson_moments
from paged_infer.bench.machine import describe_machine
from paged_infer.bench.metrics import Metrics, Run, System
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed.engine_runs import run_engine
from paged_infer.bench.speed.step_spans import cuda_busy_s
from paged_infer.bench.workloads import Workload
from paged_infer.llm import LLM

ENGINE = "paged"
REFERENCE = "transformers"  # what the others' tokens are held to, where it takes part
CHECKED_REQUESTS, CHECKED_TOKENS = 4, 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One contender, or one load: medians over its repeats.

    ``same_tokens``: greedy on a few requests, as the reference's. ``span_s``: where the engine's steps were, in the
    run of median length. ``load``: clients or arrivals a second; ``series``: whom a picture draws as one line.
    """

    name: str
    metrics: Metrics
    runs_s: list[float]
    same_counts: bool = True
    same_tokens: bool | None = None  # None: nobody to hold them against
    first: Metrics | None = None  # of the very first run, where warming up is shown
    span_s: dict[str, float] = field(default_factory=dict)
    load: float | None = None
    series: str = ""

    @classmethod
    def of(cls, name: str, runs: list[Run], floor: Floor | None, **others: Any) -> Entry:
        metrics = Metrics.median_of([Metrics.of(run, floor) for run in runs])
        usual = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
        return cls(name, metrics, [run.seconds for run in runs], span_s=usual.span_s, **others)


@dataclass(frozen=True, slots=True)
class SpeedReport:
    command: str
    model: str
    dtype: str
    load_format: str
    workload: str
    num_prompt_tokens: int
    num_output_tokens: int
    seed: int
    repeats: int
    machine: dict[str, Any]
    roofline: Roofline | None  # None: of a machine that was not asked
    floor: Floor | None
    entries: list[Entry]

    def __getitem__(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)

    @property
    def is_right(self) -> bool:
        """Everybody gave as many tokens as were asked for and, where rounding cannot decide, the same ones."""
        exact = self.dtype == "float32"
        return all(e.same_counts and not (exact and e.same_tokens is False) for e in self.entries)

    def save(self, path: Path) -> None:
        """As JSON, so that every picture can be drawn again from its numbers."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> SpeedReport:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["roofline"] = stored["roofline"] and Roofline(**stored["roofline"])
        stored["floor"] = stored["floor"] and Floor(**stored["floor"])
        for entry in stored["entries"]:
            entry["metrics"] = Metrics.from_json(entry["metrics"])
            entry["first"] = entry["first"] and Metrics.from_json(entry["first"])
        stored["entries"] = [Entry(**entry) for entry in stored["entries"]]
        return cls(**stored)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every command measures on: the engine, the machine and its roofline, taken before anything runs."""

    llm: LLM
    roofline: Roofline
    repeats: int
    on_run: Callable[[str], None] = lambda name: None
    machine: dict[str, Any] = field(default_factory=describe_machine)

    def throughput(self, contenders: Mapping[str, System], workload: Workload) -> SpeedReport:
        """All requests at once. Each contender's tokens are looked at first, which warms it up too."""
        same = self._check(contenders, workload)
        runs = interleave(contenders, workload, self.repeats, self.on_run)
        floor = self.floor(workload)
        self._record_overhead(runs.get(ENGINE, []), workload)
        entries = [
            Entry.of(name, runs[name], floor, same_counts=gave_all(runs[name], workload), same_tokens=same[name])
            for name in contenders
        ]
        return self.report("throughput", workload, floor, entries)

    def latency(self, contenders: Mapping[str, System], workload: Workload) -> SpeedReport:
        """One request, again and again: the very first run of each contender, then the settled ones."""
        firsts = {name: contender(workload) for name, contender in contenders.items()}
        runs = interleave(contenders, workload, self.repeats, self.on_run)
        self._record_overhead(runs.get(ENGINE, []), workload)
        floor = self.floor(workload)
        expected = firsts[REFERENCE if REFERENCE in firsts else next(iter(firsts))].token_ids
        compared = len(firsts) > 1 and not workload.params[0].temperature
        entries = [
            Entry.of(
                name,
                runs[name],
                floor,
                same_counts=gave_all([firsts[name], *runs[name]], workload),
                same_tokens=all(r.token_ids == expected for r in [firsts[name], *runs[name]]) if compared else None,
                first=Metrics.of(firsts[name], floor),
            )
            for name in contenders
        ]
        return self.report("latency", workload, floor, entries)

    def load(
        self, workload: Workload, clients: list[int], rates: list[float] | None, rate_shares: list[float]
    ) -> SpeedReport:
        """The engine under load: closed loops of so many clients, then open ones with Poisson arrivals.

        Args:
            rates: arrivals a second; None: ``rate_shares`` of what the most clients were served at.
        """
        engine = self.llm.engine
        run_engine(engine, workload.sample(max(clients), CHECKED_TOKENS))  # warm
        closed: dict[str, System] = {
            f"{n} client{'s' * (n > 1)}": partial(run_engine, engine, num_clients=n) for n in clients
        }
        runs = interleave(closed, workload, self.repeats, self.on_run)
        entries = []
        for (name, its_runs), num_clients in zip(runs.items(), clients, strict=True):
            right = gave_all(its_runs, workload)
            floor = self.floor(workload, num_clients)
            entries.append(Entry.of(name, its_runs, floor, same_counts=right, load=float(num_clients)))
        served_per_s = len(workload.prompts) / entries[-1].metrics.seconds
        per_s = {f"{r:.3g} a second": r for r in rates or [share * served_per_s for share in rate_shares]}
        moments = {name: poisson_moments(len(workload.prompts), r, workload.seed) for name, r in per_s.items()}
        opened: dict[str, System] = {name: partial(run_engine, engine, arrive_s=when) for name, when in moments.items()}
        for name, its_runs in interleave(opened, workload, self.repeats, self.on_run).items():
            right = gave_all(its_runs, workload)
            entries.append(Entry.of(name, its_runs, None, same_counts=right, load=per_s[name]))
        return self.report("load", workload, None, entries)

    def _check(self, contenders: Mapping[str, System], workload: Workload) -> dict[str, bool | None]:
        sample = workload.sample(CHECKED_REQUESTS, CHECKED_TOKENS)
        said = {name: contender(sample).token_ids for name, contender in contenders.items()}
        if len(said) == 1:
            return dict.fromkeys(said)
        expected = said[REFERENCE if REFERENCE in said else next(iter(said))]
        return {name: token_ids == expected for name, token_ids in said.items()}

    def _record_overhead(self, runs: list[Run], workload: Workload) -> None:
        """On a CUDA device, by one more run that is recorded; on the CPU every run knows its own."""
        if not runs or self.llm.engine.device.type != "cuda":
            return
        busy_s = cuda_busy_s(lambda: run_engine(self.llm.engine, workload))
        for run in runs:
            run.overhead_share = 1 - busy_s / run.seconds

    def floor(self, workload: Workload, num_clients: int | None = None) -> Floor:
        prompts, outputs = lengths(workload)
        engine = self.llm.engine
        num_running = min(num_clients or len(prompts), len(prompts), engine.config.max_num_seqs)
        return ModelCost.of(engine.decoder).floor(prompts, outputs, self.roofline, num_running)

    def report(self, command: str, workload: Workload, floor: Floor | None, entries: list[Entry]) -> SpeedReport:
        engine = self.llm.engine
        prompts, outputs = lengths(workload)
        return SpeedReport(
            command=command,
            model=self.llm.name,
            dtype=str(engine.decoder.dtype).removeprefix("torch."),
            load_format=engine.config.load_format,
            workload=workload.name,
            num_prompt_tokens=sum(prompts),
            num_output_tokens=sum(outputs),
            seed=workload.seed,
            repeats=self.repeats,
            machine=self.machine,
            roofline=self.roofline,
            floor=floor,
            entries=entries,
        )


def interleave(
    contenders: Mapping[str, System],
    workload: Workload,
    repeats: int,
    on_run: Callable[[str], None] = lambda name: None,
) -> dict[str, list[Run]]:
    """``repeats`` runs of each, in turn: what slows the machine down for a while slows them all."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            runs[name].append(contender(workload))
            on_run(name)
    return runs


def lengths(workload: Workload) -> tuple[list[int], list[int]]:
    """Of the prompts, and of the outputs asked for."""
    return [len(p) for p in workload.prompts], [one.max_tokens or 0 for one in workload.params]


def gave_all(runs: list[Run], workload: Workload) -> bool:
    """Whether everybody gave each request exactly what it asked for."""
    asked = lengths(workload)[1]
    return all(run.num_outputs == asked for run in runs)

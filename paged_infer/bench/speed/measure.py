"""Systems on one workload, interleaved, held to the same tokens, measured by the same metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

from paged_infer.bench.floor import Floor, ModelCost
from paged_infer.bench.metrics import Metrics, Run, System
from paged_infer.bench.report import JsonReport
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed.engine_runs import closed_loops, open_loops, run_engine
from paged_infer.bench.speed.recorded_steps import busy_share
from paged_infer.bench.speed.rounds import Runs, interleave, nothing
from paged_infer.bench.speed.same_tokens import TokenComparison, compare_tokens
from paged_infer.bench.workloads import Workload
from paged_infer.execution.machine import describe_machine
from paged_infer.llm import LLM

ENGINE = "paged"
REFERENCE = "transformers"  # the others are held to its tokens, where it takes part
CHECKED_REQUESTS, CHECKED_TOKENS = 4, 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One system, or one load: medians over its repeats.

    ``same_tokens``: whether its tokens are the reference's (in ``throughput``, on a few greedy requests); ``compared``
    has how they differ. ``span_s``: where the engine's steps spent their time, in the run of median length. ``load``:
    clients, or arrivals a second; ``series``: a line of a picture.
    """

    name: str
    metrics: Metrics
    runs_s: list[float]
    same_counts: bool = True
    same_tokens: bool | None = None  # None: nothing to compare them to
    first: Metrics | None = None  # of the very first run, where warming up is shown
    span_s: dict[str, float] = field(default_factory=dict)
    load: float | None = None
    series: str = ""
    compared: TokenComparison | None = None

    @property
    def is_right(self) -> bool:
        """As many tokens as requested, and the reference's tokens, except for near ties where these are allowed."""
        is_same = self.same_tokens is not False or (self.compared is not None and self.compared.is_right)
        return self.same_counts and is_same

    @classmethod
    def of(cls, name: str, runs: list[Run], workload: Workload, floor: Floor | None, **others: Any) -> Entry:
        usual = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
        others.setdefault("same_counts", gave_all(runs, workload))
        if compared := others.get("compared"):
            others["same_tokens"] = compared.is_same
        return cls(name, Metrics.of(runs, floor), [run.seconds for run in runs], span_s=usual.span_s, **others)


@dataclass(frozen=True, slots=True)
class SpeedReport(JsonReport):
    """``repeats``: as asked for; an entry's ``runs_s`` has the runs that there was time for."""

    command: str
    model: str
    dtype: str = ""
    load_format: str = ""
    workload: str = ""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    seed: int = 0
    repeats: int = 1
    machine: dict[str, Any] = field(default_factory=dict)
    roofline: Roofline | None = None  # None: not measured
    floor: Floor | None = None
    entries: list[Entry] = field(default_factory=list)
    is_complete: bool = True  # False: saved after a run, and the command has not reached its end
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)

    @property
    def is_right(self) -> bool:
        """Every system gave as many tokens as requested and, in float32, the same tokens (see ``TokenComparison``)."""
        exact = self.dtype == "float32"
        return all(entry.is_right if exact else entry.same_counts for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every command measures on: the engine, and the machine and its roofline as they were before anything ran.

    ``save`` gets the report of all runs so far after each of them. ``deadline_s``, by ``perf_counter``: see
    ``interleave``.
    """

    llm: LLM
    roofline: Roofline | None
    repeats: int
    on_run: Callable[[str], None] = nothing
    machine: dict[str, Any] = field(default_factory=describe_machine)
    save: Callable[[SpeedReport], None] | None = None  # None: nothing is saved
    deadline_s: float = math.inf

    def throughput(self, systems: Mapping[str, System], workload: Workload, command: str = "throughput") -> SpeedReport:
        """All requests at once. Each system's tokens are compared first, and it is warmed up; see ``run_warm_ups``.

        On a GPU some of the engine's steps are then recorded, which gives its overhead.
        """
        sample = workload.sample(CHECKED_REQUESTS, CHECKED_TOKENS)
        firsts = {name: [system(sample)] for name, system in systems.items()}
        run_warm_ups(systems, workload)
        compared = self.compare(systems, sample, firsts)

        def report_of(runs: Runs) -> SpeedReport:
            floor = self.floor(workload)
            entries = [
                Entry.of(name, its_runs, workload, floor, compared=compared.get(name))
                for name, its_runs in runs.items()
                if its_runs
            ]
            return self.report(command, workload, floor, entries)

        is_recorded = ENGINE in systems and self.llm.engine.device.type == "cuda"
        runs = self.interleave(systems, workload, report_of, reserved=float(is_recorded))
        note = self._record_overhead(runs.get(ENGINE, []), workload)
        return replace(report_of(runs), notes=note)

    def latency(self, systems: Mapping[str, System], workload: Workload) -> SpeedReport:
        """One request, repeated: the first run of each system, then the settled ones. All of their tokens are compared,
        so ``workload`` is greedy.
        """
        firsts: Runs = {}

        def report_of(runs: Runs) -> SpeedReport:
            floor, entries = self.floor(workload), []
            served = {name: [*first, *runs.get(name, [])] for name, first in firsts.items()}
            compared = self.compare(systems, workload, served)
            for name, (first, *settled) in served.items():
                more = {"same_counts": gave_all(served[name], workload), "compared": compared.get(name)}
                entry = Entry.of(name, settled or [first], workload, floor, **more, first=Metrics.of([first], floor))
                entries.append(entry if settled else replace(entry, runs_s=[]))
            return self.report("latency", workload, floor, entries)

        for name, system in systems.items():
            firsts[name] = [system(workload)]
            self._save(report_of({}))
        return report_of(self.interleave(systems, workload, report_of))

    def compare(
        self, systems: Mapping[str, System], workload: Workload, runs: Mapping[str, list[Run]]
    ) -> dict[str, TokenComparison]:
        """Compare each system's runs of ``workload`` with the reference's first; {} if there is nothing to compare."""
        reference = REFERENCE if REFERENCE in systems else next(iter(systems))
        if len(systems) == 1 or not runs.get(reference):
            return {}
        view, expected = getattr(systems[reference], "next_logits", None), runs[reference][0].token_ids
        return {
            name: compare_tokens(self.llm, workload, expected, [run.token_ids for run in its_runs], view)
            for name, its_runs in runs.items()
        }

    def interleave(
        self,
        systems: Mapping[str, System],
        workload: Workload,
        report_of: Callable[[Runs], SpeedReport],
        *,
        num_phases: int = 1,
        once: Collection[str] = (),
        reserved: float = 0.0,
    ) -> Runs:
        """See ``rounds.interleave``. The time left is divided among ``num_phases``: this one and those to come."""

        now_s = perf_counter()
        deadline_s = now_s + (self.deadline_s - now_s) / num_phases
        return interleave(
            systems,
            workload,
            self.repeats,
            self.on_run,
            save=lambda runs: self._save(report_of(runs)),
            deadline_s=deadline_s,
            once=once,
            reserved=reserved,
        )

    def _save(self, report: SpeedReport) -> None:
        if self.save is not None:
            self.save(replace(report, is_complete=False))

    def load(
        self, workload: Workload, clients: list[int], rates: list[float] | None, rate_shares: list[float]
    ) -> SpeedReport:
        """The engine under load: closed loops of so many clients, then open ones with Poisson arrivals.

        Args:
            rates: arrivals a second; None: ``rate_shares`` of the rate at which the most clients were served.
        """
        run = partial(run_engine, self.llm.engine)
        run(workload.sample(max(clients), CHECKED_TOKENS))
        run_warm_ups({ENGINE: run}, workload)
        num_clients = dict(zip(closed_loops(run, clients), clients, strict=True))

        def entries_of(runs: Runs, loads: Mapping[str, float]) -> list[Entry]:
            return [
                Entry.of(
                    name,
                    runs[name],
                    workload,
                    self.floor(workload, num_clients[name]) if name in num_clients else None,
                    load=float(load),
                )
                for name, load in loads.items()
                if runs[name]
            ]

        def report_of(runs: Runs, before: list[Entry], loads: Mapping[str, float]) -> SpeedReport:
            return self.report("load", workload, None, before + entries_of(runs, loads))

        closed = partial(report_of, before=[], loads=num_clients)
        entries = closed(self.interleave(closed_loops(run, clients), workload, closed, num_phases=2)).entries
        served_per_s = len(workload.prompts) / entries[-1].metrics.seconds
        rates = rates or [share * served_per_s for share in rate_shares]
        systems = open_loops(run, workload, rates)
        opened = partial(report_of, before=entries, loads=dict(zip(systems, rates, strict=True)))
        return opened(self.interleave(systems, workload, opened))

    def _record_overhead(self, runs: list[Run], workload: Workload) -> list[str]:
        """On a CUDA device, set the overhead of ``runs`` from some recorded steps. Returns a note if that fails."""
        if not runs or self.llm.engine.device.type != "cuda":
            return []
        try:
            shares = busy_share(self.llm.engine, workload, [run.step_s for run in runs])
        except Exception as error:  # of the profiler, without which every other number is complete
            return [f"the engine's overhead was not recorded: {type(error).__name__}: {error}"]
        for run, share in zip(runs, shares, strict=True):
            run.overhead_share = 1 - share
        return []

    def floor(self, workload: Workload, num_clients: int | None = None) -> Floor:
        prompts, outputs = lengths(workload)
        engine = self.llm.engine
        num_running = min(num_clients or len(prompts), len(prompts), engine.config.max_num_seqs)
        assert self.roofline is not None
        cost = ModelCost.of(engine.decoder, engine.config.kv_cache_dtype)
        return cost.floor(prompts, outputs, self.roofline, num_running)

    def report(
        self,
        command: str,
        workload: Workload,
        floor: Floor | None,
        entries: list[Entry],
        kind: type[SpeedReport] = SpeedReport,
    ) -> SpeedReport:
        engine = self.llm.engine
        prompts, outputs = lengths(workload)
        return kind(
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


def run_warm_ups(systems: Mapping[str, System], workload: Workload) -> None:
    """Run every kind of step of ``workload`` on each system, so that nothing is compiled in a run that is timed.

    transformers compiles nothing, so it runs the first of them only.
    """
    for name, system in systems.items():
        for one in workload.warm_ups()[: 1 if name.startswith(REFERENCE) else None]:
            system(one)


def lengths(workload: Workload) -> tuple[list[int], list[int]]:
    """Of the prompts, and of the outputs asked for."""
    return [len(p) for p in workload.prompts], [one.max_tokens or 0 for one in workload.params]


def gave_all(runs: list[Run], workload: Workload) -> bool:
    """Whether each request got exactly the number of tokens that it asked for."""
    asked = lengths(workload)[1]
    return all(run.num_outputs == asked for run in runs)

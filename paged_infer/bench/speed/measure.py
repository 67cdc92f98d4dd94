"""Systems on one workload, interleaved, held to the same tokens, measured by the same metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from paged_infer.bench.floor import Floor, ModelCost
from paged_infer.bench.load import poisson_moments
from paged_infer.bench.metrics import Metrics, Run, System
from paged_infer.bench.report import JsonReport
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed.engine_runs import run_engine
from paged_infer.bench.speed.step_spans import cuda_busy_s
from paged_infer.bench.workloads import Workload
from paged_infer.execution.machine import describe_machine
from paged_infer.llm import LLM

ENGINE = "paged"
REFERENCE = "transformers"  # the others are held to its tokens, where it takes part
CHECKED_REQUESTS, CHECKED_TOKENS = 4, 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One system, or one load: medians over its repeats.

    ``same_tokens``: greedy on a few requests, equal to the reference's. ``span_s``: where the engine's steps spent
    their time, in the run of median length. ``load``: clients, or arrivals a second; ``series``: a line of a picture.
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

    @classmethod
    def of(cls, name: str, runs: list[Run], workload: Workload, floor: Floor | None, **others: Any) -> Entry:
        usual = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
        others.setdefault("same_counts", gave_all(runs, workload))
        return cls(name, Metrics.of(runs, floor), [run.seconds for run in runs], span_s=usual.span_s, **others)


@dataclass(frozen=True, slots=True)
class SpeedReport(JsonReport):
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

    def __getitem__(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)

    @property
    def is_right(self) -> bool:
        """Every system gave as many tokens as requested and, in float32, the same ones."""
        exact = self.dtype == "float32"
        return all(e.same_counts and not (exact and e.same_tokens is False) for e in self.entries)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every command measures on: the engine, and the machine and its roofline as they were before anything ran."""

    llm: LLM
    roofline: Roofline | None
    repeats: int
    on_run: Callable[[str], None] = lambda name: None
    machine: dict[str, Any] = field(default_factory=describe_machine)

    def throughput(self, systems: Mapping[str, System], workload: Workload, command: str = "throughput") -> SpeedReport:
        """All requests at once. Each system's tokens are compared first, which also warms it up."""
        sample = workload.sample(CHECKED_REQUESTS, CHECKED_TOKENS)
        firsts = {name: system(sample) for name, system in systems.items()}
        return self._report_systems(command, systems, workload, firsts)

    def latency(self, systems: Mapping[str, System], workload: Workload) -> SpeedReport:
        """One request, repeated: the first run of each system, then the settled ones. All of their tokens are compared,
        so ``workload`` is greedy.
        """
        firsts = {name: system(workload) for name, system in systems.items()}
        return self._report_systems("latency", systems, workload, firsts, show_firsts=True)

    def _report_systems(
        self,
        command: str,
        systems: Mapping[str, System],
        workload: Workload,
        firsts: Mapping[str, Run],
        show_firsts: bool = False,
    ) -> SpeedReport:
        """Run the systems in turn, after their first runs, which served ``workload`` if they are to be shown."""
        runs = interleave(systems, workload, self.repeats, self.on_run)
        self._record_overhead(runs.get(ENGINE, []), workload)
        floor, entries = self.floor(workload), []
        expected = firsts[REFERENCE if REFERENCE in firsts else next(iter(firsts))]
        for name, its_runs in runs.items():
            first = firsts[name]
            served = [first, *its_runs] if show_firsts else its_runs
            same_counts = gave_all(served, workload)
            same_tokens = gave_same(served if show_firsts else [first], expected) if len(firsts) > 1 else None
            shown = Metrics.of([first], floor) if show_firsts else None
            entries.append(
                Entry.of(name, its_runs, workload, floor, same_counts=same_counts, same_tokens=same_tokens, first=shown)
            )
        return self.report(command, workload, floor, entries)

    def load(
        self, workload: Workload, clients: list[int], rates: list[float] | None, rate_shares: list[float]
    ) -> SpeedReport:
        """The engine under load: closed loops of so many clients, then open ones with Poisson arrivals.

        Args:
            rates: arrivals a second; None: ``rate_shares`` of the rate at which the most clients were served.
        """
        engine = self.llm.engine
        run_engine(engine, workload.sample(max(clients), CHECKED_TOKENS))  # warm up
        entries = []
        closed = closed_loops(partial(run_engine, engine), clients)
        runs = interleave(closed, workload, self.repeats, self.on_run)
        for (name, its_runs), num_clients in zip(runs.items(), clients, strict=True):
            floor = self.floor(workload, num_clients)
            entries.append(Entry.of(name, its_runs, workload, floor, load=float(num_clients)))
        served_per_s = len(workload.prompts) / entries[-1].metrics.seconds
        rates = rates or [share * served_per_s for share in rate_shares]
        opened = open_loops(partial(run_engine, engine), workload, rates)
        runs = interleave(opened, workload, self.repeats, self.on_run)
        for (name, its_runs), rate in zip(runs.items(), rates, strict=True):
            entries.append(Entry.of(name, its_runs, workload, None, load=rate))
        return self.report("load", workload, None, entries)

    def _record_overhead(self, runs: list[Run], workload: Workload) -> None:
        """On a CUDA device, by one more run that is recorded; on the CPU every run has its own."""
        if not runs or self.llm.engine.device.type != "cuda":
            return
        busy_s = cuda_busy_s(lambda: run_engine(self.llm.engine, workload))
        for run in runs:
            run.overhead_share = 1 - busy_s / run.seconds

    def floor(self, workload: Workload, num_clients: int | None = None) -> Floor:
        prompts, outputs = lengths(workload)
        engine = self.llm.engine
        num_running = min(num_clients or len(prompts), len(prompts), engine.config.max_num_seqs)
        assert self.roofline is not None
        return ModelCost.of(engine.decoder).floor(prompts, outputs, self.roofline, num_running)

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


def interleave(
    systems: Mapping[str, System], workload: Workload, repeats: int, on_run: Callable[[str], None] = lambda name: None
) -> dict[str, list[Run]]:
    """``repeats`` runs of each, in turn: a busy phase of the machine affects all of them."""
    runs: dict[str, list[Run]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, system in systems.items():
            runs[name].append(system(workload))
            on_run(name)
    return runs


def closed_loops(run: Callable[..., Run], clients: list[int], suffix: str = "") -> dict[str, System]:
    """``run`` with so many clients, each of which sends its next request when its last one has ended."""
    return {f"{n} client{'s' * (n > 1)}{suffix}": partial(run, num_clients=n) for n in clients}


def open_loops(run: Callable[..., Run], workload: Workload, rates: list[float], suffix: str = "") -> dict[str, System]:
    """``run`` with Poisson arrivals, so many a second, whether or not earlier requests have ended."""
    moments = {rate: poisson_moments(len(workload.prompts), rate, workload.seed) for rate in rates}
    return {f"{rate:.3g} a second{suffix}": partial(run, arrive_s=arrive_s) for rate, arrive_s in moments.items()}


def lengths(workload: Workload) -> tuple[list[int], list[int]]:
    """Of the prompts, and of the outputs asked for."""
    return [len(p) for p in workload.prompts], [one.max_tokens or 0 for one in workload.params]


def gave_all(runs: list[Run], workload: Workload) -> bool:
    """Whether each request got exactly the number of tokens that it asked for."""
    asked = lengths(workload)[1]
    return all(run.num_outputs == asked for run in runs)


def gave_same(runs: list[Run], expected: Run) -> bool:
    """Whether all of them gave the tokens of ``expected``."""
    return all(run.token_ids == expected.token_ids for run in runs)

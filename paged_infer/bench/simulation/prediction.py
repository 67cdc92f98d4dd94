"""Simulate a server described by options: as given, at other loads, on other cards, and under other assumptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from paged_infer.bench.report import JsonReport
from paged_infer.cli_options import ModelName
from paged_infer.simulation.cards import CARDS, Card, card_named
from paged_infer.simulation.costs import Roofline
from paged_infer.simulation.memory import default_num_batched_tokens, estimate_pool
from paged_infer.simulation.operator_tables import OperatorTable
from paged_infer.simulation.records import errors, read_records
from paged_infer.simulation.shapes import SHAPES, WEIGHT_BITS, ModelShape
from paged_infer.simulation.simulate import Run, SchedulerOptions, longest_of, makespan_s, simulate, summary
from paged_infer.simulation.times import TokenTimes
from paged_infer.simulation.workloads import LIKE, NUM_REQUESTS, WorkloadRequest, at_rate, dataset_like, read_workload

CPU_POOL_BYTES = 2**30  # as in execution.memory_plan
DEFAULT_RATE = 10.0
Advance = Callable[[str], None]  # called with a description of the next simulation
LOADS = (0.25, 0.5, 2.0)  # multiples of the requested load


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """The options of ``paged-infer bench simulate``: what is served, on what, and how."""

    model: Annotated[str, ModelName(f"A folder, or a shape: {', '.join(SHAPES)}. Default: llama-3.1-8b.")] = (
        "llama-3.1-8b"
    )
    gpu: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(CARDS)}, or cpu, which is measured; may be repeated to compare. Default: h200."),
    ] = None
    workload: Annotated[
        str, typer.Option(help=f"A JSON array of {{at, in, out, ids?}}, or {NUM_REQUESTS} requests: {', '.join(LIKE)}.")
    ] = "sharegpt-like"
    rate: Annotated[
        float | None, typer.Option(help=f"Requests a second. Default: the file's own times; else {DEFAULT_RATE:g}.")
    ] = None
    concurrency: Annotated[int | None, typer.Option(help="Clients of a closed loop, instead of arrivals.")] = None
    num_blocks: Annotated[int | None, typer.Option(help="Default: what the card's memory leaves, estimated.")] = None
    max_num_seqs: Annotated[int, typer.Option(help="Most sequences at once.")] = 256
    policy: Annotated[str, typer.Option(help="chunked, prefill_first, dynamic or static.")] = "chunked"
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, int8, fp8 or fp8_e5m2.")] = "auto"
    quantization: Annotated[str | None, typer.Option(help=f"{', '.join(WEIGHT_BITS)}. Default: none.")] = None
    tensor_parallel_size: Annotated[int, typer.Option(help="Cards that share each layer.")] = 1
    watermark: Annotated[
        float, typer.Option(help="Share of the pool that admission keeps free; vLLM V1 has none: 0.")
    ] = 0.02
    operator_tables: Annotated[
        str | None, typer.Option(help="PREFIX of measured operator times, -dense.csv and so on, instead of the sheet.")
    ] = None
    step_overhead_ms: Annotated[float, typer.Option(help="Host time per step that no computation hides.")] = 0.0
    share_of_bandwidth: Annotated[
        float | None, typer.Option(help="Share of the sheet's rate that kernels reach. Default: 0.9; 1 if measured.")
    ] = None
    share_of_peak: Annotated[float | None, typer.Option(help="The same for operations. Default: 0.8; 1.")] = None
    records: Annotated[
        Path | None, typer.Option(help="What a real server did with this workload: LLMServingSim's jsonl.")
    ] = None

    @property
    def cards(self) -> list[str]:
        return self.gpu or ["h200"]

    def shown(self) -> dict[str, Any]:
        """The options for a report, with the names of files instead of their paths on this machine."""
        paths = {"workload": self.workload, "operator_tables": self.operator_tables, "records": self.records}
        named = {name: path and Path(path).name for name, path in paths.items()}
        return {**{name: getattr(self, name) for name in ServerOptions.__slots__}, **named, "gpu": self.cards}

    def requests(self) -> list[WorkloadRequest]:
        if self.rate is not None and self.concurrency is not None:
            raise ValueError(f"rate={self.rate:g} with concurrency={self.concurrency}: clients have no rate; give one")
        if self.workload in LIKE:
            rate = DEFAULT_RATE if self.rate is None else self.rate
            return dataset_like(LIKE[self.workload], NUM_REQUESTS, rate)
        found = read_workload(Path(self.workload))
        return found if self.rate is None else at_rate(found, self.rate)

    def check(self) -> None:
        """Raises ValueError for options that exclude each other: one would be ignored."""
        if self.operator_tables is not None:
            given = {
                "quantization": self.quantization,
                "kv_cache_dtype": None if self.kv_cache_dtype == "auto" else self.kv_cache_dtype,
                "tensor_parallel_size": None if self.tensor_parallel_size == 1 else self.tensor_parallel_size,
                "share_of_bandwidth": self.share_of_bandwidth,
                "share_of_peak": self.share_of_peak,
            }
            if names := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"operator_tables with {', '.join(names)}: tables are as they were measured")
            if len(self.cards) > 1:
                raise ValueError(f"operator_tables with {len(self.cards)} cards: the tables are of one")
        if twice := [gpu for gpu in self.cards if self.cards.count(gpu) > 1]:
            raise ValueError(f"gpu {twice[0]!r}: is given twice")
        for name, value in (("rate", self.rate), ("concurrency", self.concurrency)):
            if self.records is not None and value is not None:
                raise ValueError(f"records with {name}={value:g}: the records are of the workload's own arrivals")


@dataclass(frozen=True, slots=True)
class Setup:
    """One server, ready to be simulated."""

    name: str
    cost: Roofline | OperatorTable
    scheduler: SchedulerOptions
    concurrency: int | None

    def run(self, workload: list[WorkloadRequest]) -> Run:
        return simulate(workload, self.scheduler, self.cost, concurrency=self.concurrency)


def setup(options: ServerOptions, gpu: str, longest: int, measure_cpu: Callable[[], Card]) -> Setup:
    """The server of ``options`` on this card, for sequences of up to ``longest`` tokens.

    Raises:
        ValueError: an unknown card, shape or option, or a model that does not fit; the message names it.
    """
    shape, on_cpu = ModelShape.named(options.model), gpu == "cpu"
    card = measure_cpu() if on_cpu else card_named(gpu)
    dtype, dtype_bytes = ("float32", 4) if on_cpu else ("bfloat16", 2)
    if options.quantization not in (None, *WEIGHT_BITS):
        raise ValueError(f"quantization={options.quantization!r}: must be one of {', '.join(WEIGHT_BITS)}")
    overhead_s = options.step_overhead_ms / 1e3
    usual = (1.0, 1.0) if on_cpu else (0.9, 0.8)
    sheet = Roofline(
        card,
        shape,
        dtype,
        share_of_bandwidth=usual[0] if options.share_of_bandwidth is None else options.share_of_bandwidth,
        share_of_peak=usual[1] if options.share_of_peak is None else options.share_of_peak,
        step_overhead_s=overhead_s,
        weight_bits=None if options.quantization is None else WEIGHT_BITS[options.quantization],
        kv_bytes=shape.kv_element_bytes(options.kv_cache_dtype, dtype_bytes),
        is_8bit_math=options.quantization == "w8a8",
        tensor_parallel=options.tensor_parallel_size,
    )
    num_tokens = 2048 if on_cpu else default_num_batched_tokens(card.memory_bytes)
    num_blocks = options.num_blocks
    if num_blocks is None and on_cpu:
        most = int(CPU_POOL_BYTES // (16 * sheet.kv_bytes_per_token))
        num_blocks = min(options.max_num_seqs * -(-longest // 16), most)
    elif num_blocks is None:
        pool = estimate_pool(sheet, max_num_seqs=options.max_num_seqs, max_num_batched_tokens=num_tokens)
        num_blocks = pool.num_blocks
    tables = options.operator_tables
    return Setup(
        gpu,
        sheet if tables is None else OperatorTable.read(tables, shape.config.num_layers, overhead_s),
        SchedulerOptions(
            num_blocks=num_blocks,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=num_tokens,
            scheduling_policy=options.policy,
            watermark=options.watermark,
        ),
        options.concurrency,
    )


@dataclass(frozen=True, slots=True)
class Prediction:
    """One run, in seconds. ``ttft``, ``tpot`` and ``latency`` have mean, p50, p90 and p99."""

    gpu: str
    load: float  # requests per second, or clients
    makespan: float
    tokens_per_s: float
    ttft: dict[str, float]
    tpot: dict[str, float]
    latency: dict[str, float]
    num_steps: int
    preemptions: int
    num_blocks: int
    pool_use: float
    peak_pool_use: float

    @classmethod
    def of(cls, gpu: str, load: float, run: Run) -> Prediction:
        found = {"tpot": {}, **summary(run.times)}
        counts = (run.num_steps, run.preemptions, run.num_blocks, run.pool_use, run.peak_pool_use)
        return cls(gpu, load, run.makespan_s, run.tokens_per_s, found["ttft"], found["tpot"], found["latency"], *counts)


@dataclass(frozen=True, slots=True)
class Changed:
    """What another assumption would change, relative to the run."""

    what: str
    makespan: float
    ttft: float  # mean
    tpot: float


@dataclass(frozen=True, slots=True)
class SimulateReport(JsonReport):
    """``prediction`` is that of the first card; ``as_json`` has its fields at the top level."""

    model: str
    workload: str
    options: dict[str, Any]
    cost_model: str
    prediction: Prediction
    loads: list[Prediction] = field(default_factory=list)  # of all cards, this one included
    assumptions: list[Changed] = field(default_factory=list)
    measured: dict[str, Any] | None = None
    errors: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        stored = JsonReport.as_json(self)
        return {**stored["prediction"], **{name: value for name, value in stored.items() if value is not None}}


def measured_summary(records: ReadOnlyList[TokenTimes]) -> dict[str, Any]:
    return {"makespan": makespan_s(records), **summary(records)}


def predict(options: ServerOptions, measure_cpu: Callable[[], Card], advance: Advance) -> SimulateReport:
    """Simulate the workload on each card, and on the first one also other loads and other assumptions.

    Args:
        measure_cpu: called for the card "cpu".

    Raises:
        ValueError: bad input; the message names it.
    """
    options.check()
    workload = options.requests()
    longest = longest_of(workload)
    setups = [setup(options, gpu, longest, measure_cpu) for gpu in options.cards]
    first, last_s = setups[0], workload[-1].at_s
    load = options.concurrency or (len(workload) / last_s if last_s > 1e-9 else 0.0)
    records = None if options.records is None else read_records(options.records)
    runs = []
    for one in setups:
        advance(one.name)
        runs.append(one.run(workload))
    cost, notes = first.cost, []
    if isinstance(cost, OperatorTable):
        notes = [f"{what} beyond the tables, extrapolated: {count} times" for what, count in cost.extrapolated.items()]
    loads = [Prediction.of(one.name, load, run) for one, run in zip(setups, runs, strict=True)]
    if 1e-6 < load < 1e6:  # outside of this, requests never overlap, or all come at once
        for one in setups:
            loads += [*_at_loads(one, workload, load, advance)]
    return SimulateReport(
        model=options.model,
        workload=f"{Path(options.workload).name}: {len(workload)} requests",
        options=options.shown(),
        cost_model="operator tables" if options.operator_tables else "data sheet",
        prediction=Prediction.of(first.name, load, runs[0]),
        loads=sorted(loads, key=lambda one: (options.cards.index(one.gpu), one.load)),
        assumptions=[*_assumptions(first, workload, runs[0], advance)],
        measured=None if records is None else measured_summary(records),
        errors=None if records is None else errors(runs[0].times, records),
        notes=notes,
    )


def _at_loads(one: Setup, workload: list[WorkloadRequest], load: float, advance: Advance) -> Iterator[Prediction]:
    for factor in LOADS:
        advance(f"{one.name} at {factor:g} times the load")
        if one.concurrency is None:
            yield Prediction.of(one.name, factor * load, one.run(at_rate(workload, factor * load)))
        elif (clients := round(factor * one.concurrency)) >= 1:
            yield Prediction.of(one.name, clients, replace(one, concurrency=clients).run(workload))


def _assumptions(first: Setup, workload: list[WorkloadRequest], run: Run, advance: Advance) -> Iterator[Changed]:
    """The run with each assumption changed by a plausible error."""
    scheduler, cost = first.scheduler, first.cost
    costs: dict[str, Roofline | OperatorTable] = {}
    if isinstance(cost, Roofline):
        costs["a tenth less bandwidth"] = replace(cost, share_of_bandwidth=0.9 * cost.share_of_bandwidth)
        costs["a quarter less of the peak"] = replace(cost, share_of_peak=0.75 * cost.share_of_peak)
    costs["1.5 ms more a step"] = replace(cost, step_overhead_s=cost.step_overhead_s + 1.5e-3)
    needed = -(-longest_of(workload) // scheduler.block_size)
    watermark = 0.0 if scheduler.watermark else 0.02
    schedulers = {
        "a quarter more blocks": replace(scheduler, num_blocks=round(1.25 * scheduler.num_blocks)),
        "a quarter fewer blocks": replace(scheduler, num_blocks=max(needed, round(0.75 * scheduler.num_blocks))),
        f"watermark {watermark:g}": replace(scheduler, watermark=watermark),
    }
    others = {what: replace(first, cost=one) for what, one in costs.items()}
    others |= {what: replace(first, scheduler=one) for what, one in schedulers.items()}
    base = Prediction.of("", 0, run)
    for what, other in others.items():
        advance(what)
        found = Prediction.of("", 0, other.run(workload))
        tpot = found.tpot["mean"] / base.tpot["mean"] - 1 if base.tpot else 0.0
        yield Changed(what, found.makespan / base.makespan - 1, found.ttft["mean"] / base.ttft["mean"] - 1, tpot)

"""Predict this project's engine on this machine from measured step times, and measure it.

    python -m paged_infer.bench.simulation.own_engine [--model qwen3-30m]

Step times are measured on other requests (another seed) than those that are predicted, and fitted to features:

    a step + any prompt + prompt tokens up to 256 + those beyond + decodes up to 16 + those beyond + cached tokens

There are two slopes each because a larger product uses more of the machine: a token costs less in it.
The workloads of ``bench ladder`` (all at once) and ``bench load`` (clients, arrivals) are measured and simulated.
A machine's speed changes within seconds by more than the errors of interest. So steps are recorded before and after
each load, sent in the same way. A turn over all loads has one fit, scaled for each load to the time of the steps beside
it. Medians over the turns are reported. Run it where nothing else runs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from paged_infer.bench.load import poisson_moments
from paged_infer.bench.metrics import Run as Served
from paged_infer.bench.report import JsonReport, save_report
from paged_infer.bench.shapes import SHAPES, folder_of
from paged_infer.bench.speed.cli import errors
from paged_infer.bench.speed.engine_runs import run_engine
from paged_infer.bench.tables import print_table
from paged_infer.bench.workloads import Workload, random_ids
from paged_infer.cli_options import RESULTS, Figures, open_llm
from paged_infer.control.step import ScheduledStep
from paged_infer.engine.engine import LLMEngine
from paged_infer.execution.machine import describe_machine
from paged_infer.simulation.simulate import SchedulerOptions, makespan_s, simulate, summary
from paged_infer.simulation.workloads import WorkloadRequest
from paged_infer.terminal import run_command

CLIENTS = (1, 4, 8, 16, 32)
RATE_SHARES = (0.3, 0.6, 0.9)  # of the rate at which the most clients were served
FEW_TOKENS, FEW_SEQUENCES = 256, 16  # beyond these, one more costs less
Floats = npt.NDArray[np.float64]
METRICS = (("makespan", ""), ("ttft", "mean"), ("tpot", "mean"), ("latency", "mean"))


def non_negative_least_squares(rows: Floats, values: Floats) -> Floats:
    """About the ``x >= 0`` that minimises ``|rows x - values|``: drop the most negative factor until none is left.

    Args:
        rows: [measurements, features].
        values: [measurements].
    """
    used = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(rows[:, used], values, rcond=None)[0]
        if found.min() >= 0 or len(used) == 1:
            break
        del used[int(found.argmin())]
    factors = np.zeros(rows.shape[1])
    factors[used] = found
    return factors


@dataclass(frozen=True, slots=True)
class Recorded:
    """Measured steps: ``rows`` [steps, features], their ``FittedSteps.features``; ``seconds`` [steps]."""

    rows: Floats
    seconds: Floats

    @classmethod
    def joined(cls, parts: Iterable[Recorded]) -> Recorded:
        all_parts = list(parts)
        return cls(*(np.concatenate([getattr(one, name) for one in all_parts]) for name in ("rows", "seconds")))


@dataclass(frozen=True, slots=True)
class FittedSteps:
    """Seconds of a step from its features, by least squares over measured steps."""

    factors: list[float]

    @staticmethod
    def features(step: ScheduledStep) -> tuple[float, ...]:
        prompts = [one.num_tokens for one in step.sequences if one.num_tokens > 1]
        num_cached = sum(one.num_computed_tokens for one in step.sequences)
        num_prompt, num_decodes = sum(prompts), len(step.sequences) - len(prompts)
        few, several = min(num_prompt, FEW_TOKENS), min(num_decodes, FEW_SEQUENCES)
        return 1.0, bool(prompts), few, num_prompt - few, several, num_decodes - several, num_cached

    @classmethod
    def fit(cls, recorded: Recorded) -> FittedSteps:
        """Fit by relative errors, so that steps of one sequence weigh as much as those of many; no factor is below 0.

        The errors are relative to the prediction of a first fit: relative to the measured times, slow steps would weigh
        little, and the sum over a run would be too small.

        Raises:
            ValueError: fewer than eight steps.
        """
        rows, times = recorded.rows, recorded.seconds
        if len(rows) < 8:
            raise ValueError(f"{len(rows)} steps: at least 8 are needed for a fit")
        factors = non_negative_least_squares(rows / times[:, None], np.ones(len(times)))
        predicted = rows @ factors
        factors = non_negative_least_squares(rows / predicted[:, None], times / predicted)
        for beyond in (3, 5):  # a second slope that no step determines
            if not rows[:, beyond].any():
                factors[beyond] = factors[beyond - 1]
        return cls(factors.tolist())

    def at_the_speed_of(self, recorded: Recorded) -> FittedSteps:
        """These factors times one: on a machine whose speed drifts, that of the moment when ``recorded`` was."""
        speed = recorded.seconds.sum() / (recorded.rows @ self.factors).sum()
        return FittedSteps([float(speed * factor) for factor in self.factors])

    def seconds(self, step: ScheduledStep) -> float:
        return sum(factor * x for factor, x in zip(self.factors, self.features(step), strict=True))


@dataclass(frozen=True, slots=True)
class Load:
    """A way to send a workload (all at once, from clients, or at given times), with predicted and measured numbers."""

    name: str
    predicted: dict[str, float]
    measured: dict[str, float]  # medians over the repeats
    errors: dict[str, float]  # predicted / measured - 1, the median of the turns


@dataclass(frozen=True, slots=True)
class OwnEngineReport(JsonReport):
    model: str
    repeats: int
    factors: list[float]  # seconds, of ``FittedSteps.features``
    machine: dict[str, Any]
    loads: list[Load] = field(default_factory=list)


def record_steps(engine: LLMEngine, workload: Workload, arrive_s: ReadOnlyList[float], clients: int | None) -> Recorded:
    """Serve the workload, and measure its steps.

    A step begins where the one before it returned, or after a pause where the first of its requests arrived.
    """
    steps: list[ScheduledStep] = []
    schedule = engine.scheduler.schedule

    def scheduled(now: float = 0.0) -> ScheduledStep:
        steps.append(schedule(now))
        return steps[-1]

    engine.scheduler.schedule = scheduled  # type: ignore[method-assign]
    gc.disable()  # the kept steps would cause full collections, which a run that keeps none does not have
    try:
        run = run_engine(engine, workload, arrive_s, clients)
    finally:
        gc.enable()
        del engine.scheduler.schedule
    first_id = steps[0].sequences[0].sequence_id
    seconds, begin_s = [], 0.0
    for step, end_s in zip(steps, run.step_s, strict=True):
        if clients is None or not begin_s:
            arrived_s = min(run.times[one.sequence_id - first_id].arrived_s for one in step.sequences)
            begin_s = max(begin_s, arrived_s)
        seconds.append(end_s - begin_s)
        begin_s = end_s
    return Recorded(np.array(list(map(FittedSteps.features, steps)), float), np.array(seconds))


def numbers(times: Any) -> dict[str, float]:
    found: dict[str, Any] = {"makespan": makespan_s(times), **summary(times)}
    return {" ".join(filter(None, (name, part))): found[name][part] if part else found[name] for name, part in METRICS}


def compare(
    engine: LLMEngine, num_requests: int, shortest: int, longest: int, repeats: int, seed: int = 0
) -> tuple[FittedSteps, list[Load]]:
    """Fit on one workload, predict and measure another.

    Raises:
        ValueError: an empty range of lengths, or too few steps for a fit.
    """
    vocab_size = engine.decoder.config.vocab_size
    other, workload = (random_ids(vocab_size, num_requests, shortest, longest, seed + more) for more in (1, 0))
    for warm_up in workload.warm_ups():
        run_engine(engine, warm_up)
    scheduler = engine.scheduler
    options = SchedulerOptions(
        num_blocks=engine.memory.num_blocks,
        block_size=engine.memory.block_size,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
    )
    moments = [0.0] * len(workload.prompts)
    ways: dict[str, tuple[list[float], int | None]] = {"all at once": (moments, None)}
    ways |= {f"{n} client{'s' * (n > 1)}": (moments, n) for n in CLIENTS}
    most = run_engine(engine, workload, num_clients=CLIENTS[-1])
    for share in RATE_SHARES:
        rate = share * num_requests / most.seconds
        ways[f"{share:g} of the most: {rate:.3g} a second"] = (poisson_moments(num_requests, rate, seed), None)
    costs: list[FittedSteps] = []
    pairs: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {name: [] for name in ways}
    for _ in range(repeats):
        recorded: dict[str, Recorded] = {}
        served: dict[str, Served] = {}
        for name, (arrive_s, clients) in ways.items():
            before = record_steps(engine, other, arrive_s, clients)
            served[name] = run_engine(engine, workload, arrive_s, clients)
            recorded[name] = Recorded.joined([before, record_steps(engine, other, arrive_s, clients)])
        costs.append(FittedSteps.fit(Recorded.joined(recorded.values())))
        for name, (arrive_s, clients) in ways.items():
            cost = costs[-1].at_the_speed_of(recorded[name])
            requests = [
                WorkloadRequest(at_s, len(prompt), params.max_tokens or 1)
                for at_s, prompt, params in zip(arrive_s, workload.prompts, workload.params, strict=True)
            ]
            simulated = simulate(requests, options, cost, concurrency=clients)
            pairs[name].append((numbers(simulated.times), numbers(served[name].times)))
    loads = []
    for name, turns in pairs.items():
        metrics = list(turns[0][0])
        ours = {metric: median(predicted[metric] for predicted, _ in turns) for metric in metrics}
        theirs = {metric: median(measured[metric] for _, measured in turns) for metric in metrics}
        wrong = {metric: median(ours[metric] / theirs[metric] - 1 for ours, theirs in turns) for metric in metrics}
        loads.append(Load(name, ours, theirs, wrong))
    factors = np.median([cost.factors for cost in costs], axis=0)
    return FittedSteps(factors.tolist()), loads


def main(
    model: Annotated[
        str | None, typer.Option(help=f"A folder, or a shape: {', '.join(SHAPES)}. Default: the storyteller.")
    ] = None,
    num_requests: Annotated[int, typer.Option(help="Requests in each load.", min=2)] = 64,
    shortest: Annotated[int, typer.Option(help="Shortest prompt and output, tokens.", min=2)] = 16,
    longest: Annotated[int, typer.Option(help="Longest prompt and output, tokens.", min=2)] = 128,
    repeats: Annotated[int, typer.Option(help="Medians are compared.", min=1)] = 3,
    figures: Figures = RESULTS,
) -> None:
    """Predict this engine on this machine from measured step times; writes bench-simulate-own.json."""
    machine = describe_machine()
    load_format = "dummy" if model in SHAPES else "auto"
    with errors(), folder_of(model, load_format) as folder:
        llm = open_llm(folder, load_format=load_format, max_model_len=2 * longest)
        gc.collect()
        gc.freeze()  # as the server does: a collection that walks the libraries' objects, too, takes 0.2 s
        try:
            cost, loads = compare(llm.engine, num_requests, shortest, longest, repeats)
        finally:
            gc.unfreeze()
    a, b, c, d, e, f, g = (1e6 * factor for factor in cost.factors)
    print(f"\na step takes {a:.0f} us + {b:.0f} with a prompt + {c:.1f} a token of it ({d:.1f} beyond {FEW_TOKENS})")
    print(f"+ {e:.0f} a sequence that decodes ({f:.0f} beyond {FEW_SEQUENCES}) + {g:.3f} a token in the cache")
    rows = []
    for one in loads:
        cells = [f"{one.predicted[m]:.4g} / {one.measured[m]:.4g} ({one.errors[m]:+.1%})" for m in one.predicted]
        rows.append((one.name, *cells))
    print_table(f"{llm.name}: predicted / measured, seconds", ("", *loads[0].predicted), rows)
    report = OwnEngineReport(llm.name, repeats, cost.factors, machine, loads)
    save_report(report, figures / "bench-simulate-own.json")


if __name__ == "__main__":
    run_command(main)

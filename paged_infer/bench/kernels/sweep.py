"""A sweep over tiles and split rules: each compiled, checked against float64, and then timed beside the one in use.

compile_all   a process for each core; what does not compile, or does not fit, is not run
sweep         one case after another; in each, all candidates in turn, and today's tile (the one in use) twice
winners       the fastest candidate for a kernel and a shape, if it beats today's tile by more than the noise
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from paged_infer.bench.kernels.checks import SMALL_TOLERANCES, TOLERANCES
from paged_infer.bench.kernels.comparisons import compare
from paged_infer.bench.kernels.fused import largest_error
from paged_infer.bench.kernels.peers import Ready, Unavailable, packed
from paged_infer.bench.kernels.report import LEFT_OUT, Entry
from paged_infer.bench.kernels.sweep_cases import (
    DTYPE,
    SMALL_SPLIT_RULES,
    AnyCase,
    Candidate,
    call_case,
    candidates,
    exact_output,
    small_cases,
)
from paged_infer.bench.report import JsonReport
from paged_infer.bench.roofline import Roofline
from paged_infer.kernels.ahead_of_time import SHARED_LIMIT, compiling_for
from paged_infer.kernels.attention.tile_table import LINEAR_KERNELS, AnyKey, Chosen, LinearKey, as_key

TODAY, AGAIN = "today's", "today's, again"
LEAST_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class Built:
    """Sizes of a compiled candidate: the largest of its kernels. ``error``: why it cannot run, or empty."""

    registers: int = 0  # a thread
    spill_bytes: int = 0  # a thread
    shared_bytes: int = 0  # a block
    error: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate in one case. Without ``seconds`` it was not timed, and ``note`` has the reason."""

    name: str
    seconds: float | None
    note: str
    built: Built | None = None  # None: today's tile, or not compiled beforehand


@dataclass(frozen=True, slots=True)
class CaseResult:
    """All candidates of a case, so far."""

    title: str
    kernel: str
    key: list[Any]  # the fields of the table's ``Key``
    work: float  # bytes of a decode, or of the weights for few tokens; else floating-point operations
    trials: list[Trial]
    is_finished: bool = False

    @property
    def counts_bytes(self) -> bool:
        return self.kernel == "decode" or (self.kernel in LINEAR_KERNELS and LinearKey(*self.key).few)

    @property
    def was_left_out(self) -> bool:
        """Whether the time ran out before all candidates were timed; such a case does not count."""
        return any(trial.note.startswith(LEFT_OUT) for trial in self.trials)

    def seconds(self, name: str) -> float | None:
        return next((trial.seconds for trial in self.trials if trial.name == name), None)

    @property
    def today(self) -> float | None:
        """Seconds of today's tile: the better of its two medians."""
        return min((s for name in (TODAY, AGAIN) if (s := self.seconds(name)) is not None), default=None)

    @property
    def noise(self) -> float:
        """The relative difference of today's two medians; infinite if one is missing."""
        first, again = self.seconds(TODAY), self.seconds(AGAIN)
        return math.inf if first is None or again is None else abs(first / again - 1)

    def gain(self, name: str) -> float | None:
        """How many times as fast as today's tile the candidate is."""
        seconds = self.seconds(name)
        return None if seconds is None or self.today is None else self.today / seconds


@dataclass(frozen=True, slots=True)
class Winner:
    """The candidate for an entry of the table, and its geometric mean gain over the cases."""

    key: list[Any]
    name: str
    gain: float
    margin: float  # the gain had to exceed 1 + margin


@dataclass(slots=True)
class SweepReport(JsonReport):
    """Grows while the sweep runs."""

    machine: dict[str, Any]
    roofline: Roofline | None = None
    cases: list[CaseResult] = field(default_factory=list)
    planned: list[list[Any]] = field(default_factory=list)  # the key of each case of the whole sweep

    def as_json(self) -> dict[str, Any]:
        """With the winners, for a reader without this code."""
        return asdict(self) | {"winners": [asdict(winner) for winner in self.winners()]}

    def record(self, case: CaseResult) -> bool:
        """Add the case, or replace its earlier state; returns whether there is a new time, or the case is finished."""
        known = sum(trial.seconds is not None for trial in case.trials)
        if not self.cases or self.cases[-1].title != case.title:
            self.cases.append(case)
            return True
        before = sum(trial.seconds is not None for trial in self.cases[-1].trials)
        self.cases[-1] = case
        return known != before or case.is_finished

    def winners(self) -> list[Winner]:
        """The best candidate for each kernel and shape, if it beats today's tile by more than the noise.

        Its geometric mean gain over all cases has to exceed 1 by more than the margin, which is twice the largest
        difference between today's two medians in these cases, and at least ``LEAST_GAIN``. In no case may the candidate
        be slower than today's tile by more than the margin.
        A key has a winner only after all of its planned cases: what helps one batch may harm the next.
        """
        found = []
        for key in dict.fromkeys(tuple(case.key) for case in self.cases):
            cases = [case for case in self.cases if tuple(case.key) == key]
            was_cut = len(cases) < self.planned.count([*key])
            if was_cut or not all(case.is_finished and not case.was_left_out for case in cases):
                continue
            margin = max(LEAST_GAIN, *(2 * case.noise for case in cases))
            means = {}
            for name in dict.fromkeys(trial.name for case in cases for trial in case.trials):
                gains = [gain for case in cases if (gain := case.gain(name)) is not None]
                if name not in (TODAY, AGAIN) and len(gains) == len(cases) and min(gains) >= 1 - margin:
                    means[name] = math.prod(gains) ** (1 / len(gains))
            best = max(means, key=lambda name: means[name], default="")
            if best and means[best] > 1 + margin:
                found.append(Winner([*key], best, means[best], margin))
        return found

    def table(self) -> dict[AnyKey, Chosen]:
        """Entries for the winners."""
        chosen = dict[AnyKey, Candidate]()
        for winner in self.winners():
            chosen[as_key(winner.key)] = {c.label: c for c in candidates(winner.key[0])}[winner.name]
        return {key: (candidate.tile, candidate.splits) for key, candidate in chosen.items()}


# -- Compiled first ----------------------------------------------------------------------------------------------------


def compile_all(cases: list[AnyCase], arch: int) -> dict[tuple[AnyKey, str], Built]:
    """Every candidate of every case, by key and label, in a pool of processes; Triton's cache keeps what they compile.

    Raises:
        RuntimeError: triton is missing, or is interpreting.
    """
    tasks = []
    for key, group in groupby(cases, lambda case: case.key):
        alike = [*group]
        for _, of_tile in groupby(candidates(key.kernel), lambda candidate: candidate.tile):
            tasks.append((alike, [*of_tile], arch))
    context = multiprocessing.get_context("forkserver")  # it has imported torch and triton once, and not used CUDA
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as workers:
        found = workers.map(compile_candidates, *zip(*tasks, strict=True))
        return {key: built for results in found for key, built in results.items()}


def compile_candidates(cases: list[AnyCase], some: list[Candidate], arch: int) -> dict[tuple[AnyKey, str], Built]:
    """Compile these candidates in this process, each for all of these cases, which share a key."""
    torch.set_num_threads(1)
    problems = [(case, case.problem("meta")) for case in cases]
    return {(cases[0].key, candidate.label): _build(problems, candidate, arch) for candidate in some}


def _build(problems: list[tuple[AnyCase, Any]], candidate: Candidate, arch: int) -> Built:
    try:
        with compiling_for(arch) as compiled:
            for case, problem in problems:
                call_case(case, problem, candidate).call()
    except Exception as error:  # whatever the compiler raises is in the report
        return Built(error="does not compile: " + f"{type(error).__name__}: {error}".strip().splitlines()[0][:200])
    registers, spilled, shared = (
        max(getattr(one, name) for one in compiled) for name in ("registers", "spill_bytes", "shared_bytes")
    )
    limit = SHARED_LIMIT[arch]
    too_large = "" if shared <= limit else f"needs {shared:,} bytes of shared memory, sm{arch} has {limit:,}"
    return Built(registers, spilled, shared, too_large)


# -- Checked, then timed -----------------------------------------------------------------------------------------------


def sweep(
    cases: list[AnyCase], device: torch.device, built: Mapping[tuple[AnyKey, str], Built], deadline_s: float, limit: str
) -> Iterator[CaseResult]:
    """Yield the result of a case so far after each timing; a case is finished before the next begins."""
    for case in cases:
        options = {candidate.label: candidate for candidate in candidates(case.kernel)}
        entries = [Entry(name, None, f"{LEFT_OUT}{limit} had passed") for name in (TODAY, *options, AGAIN)]
        if time.perf_counter() <= deadline_s:
            try:
                problem = case.problem(device)
                exact = exact_output(problem)
            except torch.OutOfMemoryError as error:
                reason = f"no room for the problem in float64: {error}".splitlines()[0]
                entries = [Entry(entry.name, None, reason) for entry in entries]
            else:
                setups = {
                    name: partial(_checked, case, problem, exact, options.get(name), built.get((case.key, name)))
                    for name in (TODAY, *options, AGAIN)
                }
                for entries in compare(setups, deadline_s, limit):
                    yield _result(case, entries, built)
                del problem, exact, setups
            torch.cuda.empty_cache()
        yield _result(case, entries, built, is_finished=True)


def _checked(case: AnyCase, problem: Any, exact: Tensor, candidate: Candidate | None, built: Built | None) -> Ready:
    """The call of a candidate, if it compiles and its output is right."""
    if built is not None and built.error:
        raise Unavailable(built.error)
    ready = call_case(case, problem, candidate)
    error, allowed = largest_error({}, [packed(ready.call())], [exact]), TOLERANCES[DTYPE]
    if not error <= allowed:
        raise Unavailable(f"wrong: {error:.2g} from float64, allowed {allowed:.2g}")
    return ready


def _result(
    case: AnyCase, entries: list[Entry], built: Mapping[tuple[AnyKey, str], Built], is_finished: bool = False
) -> CaseResult:
    trials = [Trial(e.name, e.seconds, e.note, built.get((case.key, e.name))) for e in entries]
    return CaseResult(case.title, case.kernel, [*case.key], case.work, trials, is_finished)


def check_interpreted() -> Iterator[tuple[str, str, float, float]]:
    """(case, candidate, error, tolerance) on a small batch, of a decode with one split and with several.

    The interpreter ignores warps and stages: of tiles that differ in nothing else, the first is run.
    """
    for case in small_cases():
        problem = case.problem("cpu")
        exact = exact_output(problem)
        all_of_them = candidates(case.kernel, SMALL_SPLIT_RULES)
        unlike = {(c.tile[:2], c.tile.use_tma, c.splits): c for c in reversed(all_of_them)}
        for candidate in reversed(unlike.values()):
            error = largest_error({}, [packed(call_case(case, problem, candidate).call())], [exact])
            yield case.title, candidate.label, error, SMALL_TOLERANCES[DTYPE]

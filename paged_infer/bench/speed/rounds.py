"""Systems take turns on one workload, so that a busy phase of the machine affects all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from time import perf_counter

from paged_infer.bench.metrics import Run, System
from paged_infer.bench.workloads import Workload

Runs = dict[str, list[Run]]


def nothing(_: object) -> None:
    """The default of a callback."""


def interleave(
    systems: Mapping[str, System],
    workload: Workload,
    repeats: int,
    on_run: Callable[[str], None] = nothing,
    *,
    save: Callable[[Runs], None] = nothing,
    deadline_s: float = math.inf,
    reserved: float = 0.0,
    once: Collection[str] = (),
) -> Runs:
    """At most ``repeats`` rounds, in each of which every system runs once.

    Args:
        on_run: called with the system's name after each run.
        save: called with all runs so far after each run, so that they outlive the process.
        deadline_s: by ``perf_counter``. A round that would end later, if it took as long as the last one, is not
            begun; the first always is.
        reserved: the time of so many rounds is kept free before the deadline, for what follows.
        once: systems that take part in the first round only.
    """
    runs: Runs = {name: [] for name in systems}
    round_s = 0.0
    for number in range(repeats):
        if number and perf_counter() + (1 + reserved) * round_s > deadline_s:
            break
        round_s = 0.0
        for name, system in systems.items():
            if number and name in once:
                continue
            began_s = perf_counter()
            runs[name].append(system(workload))
            round_s += 0.0 if name in once else perf_counter() - began_s
            on_run(name)
            save(runs)
    return runs

"""Where an engine's steps spend their time, measured from outside: some of its methods are clocked for a while.

    step      |-----------------------------------------------------------------|
    schedule   |----|
    launch            |------------------------------------------|
    model                 |-----------------------| |--| (head)
    sample                                              |---|
    update                                                         |------|
    pack = launch - model - sample                      rest = step - schedule - launch - update

On the CPU everything but model and sample is overhead: nothing is computed in that time. On a GPU these are the host's
times, and the device may be busy; there the overhead is the time in which the device's own record is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any
from unittest.mock import patch

from paged_infer.engine.engine import LLMEngine


def clocked(seconds: dict[str, float], part: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, whose calls add their time to ``seconds[part]``; half a microsecond a call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start_s = perf_counter()
        try:
            return fn(*args, **kwargs)
        finally:
            seconds[part] += perf_counter() - start_s

    return call


@contextmanager
def replaced(attributes: Iterable[tuple[object, str, object]]) -> Iterator[None]:
    """Within the block, each (owner, name, value) is an attribute of its owner; then all are as they were before."""
    with ExitStack() as stack:
        for owner, name, value in attributes:
            stack.enter_context(patch.object(owner, name, value))
        yield


@contextmanager
def watch_steps(engine: LLMEngine) -> Iterator[dict[str, float]]:
    """Time the engine's steps within the block; at its end the dict holds the seconds of each span.

    schedule, pack, model, sample, update and rest add up to all of the steps. Costs about 2 microseconds a step.
    """
    seconds = dict.fromkeys(("step", "schedule", "launch", "model", "sample", "update"), 0.0)
    executor, runner, scheduler = engine.in_process, engine.in_process.runner, engine.scheduler
    methods: list[tuple[str, object, str]] = [
        ("step", engine, "step"),
        ("schedule", scheduler, "schedule"),
        ("update", scheduler, "advance"),
        ("update", scheduler, "settle"),
        ("launch", executor, "launch"),
        ("model", runner.decoder, "forward"),
        ("model", runner.decoder, "logits"),
        ("sample", runner.sampler, "sample"),
    ]
    if runner.graphs is not None:
        methods.append(("model", runner.graphs, "replay"))
    if executor.drafter is not None:  # a draft model's passes are computing, not overhead
        drafting = executor.drafter.runner
        methods += [("model", drafting.decoder, name) for name in ("forward", "logits")]
        methods.append(("sample", drafting.sampler, "sample"))
    span_s: dict[str, float] = {}
    try:
        with replaced((owner, name, clocked(seconds, part, getattr(owner, name))) for part, owner, name in methods):
            yield span_s
    finally:
        span_s.update(
            schedule=seconds["schedule"],
            pack=seconds["launch"] - seconds["model"] - seconds["sample"],
            model=seconds["model"],
            sample=seconds["sample"],
            update=seconds["update"],
            rest=seconds["step"] - seconds["schedule"] - seconds["launch"] - seconds["update"],
        )


def cpu_overhead_share(span_s: dict[str, float]) -> float:
    """Share of the steps' time that was spent neither in the model nor in the sampler."""
    return 1 - (span_s["model"] + span_s["sample"]) / sum(span_s.values())


def cuda_busy_s(run: Callable[[], object]) -> float:
    """Seconds in which at least one kernel or copy of ``run`` was on the device, by CUPTI's record.

    Recording slows the host and not the kernels: compare with the seconds of a run that is not recorded.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()  # nothing that was launched before is recorded
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    results = recorded.profiler.kineto_results  # raw: torch's own list is slow with a million events
    return 1e-9 * union_length(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in results.events()
        if event.device_type() == DeviceType.CUDA
    )


def union_length(intervals: Iterable[tuple[int, int]]) -> int:
    """How much of a line the intervals cover, whatever their overlaps.

    >>> union_length([(0, 4), (2, 6), (9, 10)])
    7
    """
    covered, reached = 0, None
    for start, end in sorted(intervals):
        if reached is None or start > reached:
            covered, reached = covered + end - start, end
        elif end > reached:
            covered, reached = covered + end - reached, end
    return covered

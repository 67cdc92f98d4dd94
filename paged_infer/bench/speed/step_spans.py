"""Where an engine's steps spend their time, watched from outside: its methods are wrapped, and put back afterwards.

    step      |-----------------------------------------------------------------|
    schedule   |----|
    launch            |------------------------------------------|
    model                 |-----------------------| |--| (head)
    sample                                              |---|
    update                                                         |------|
    pack = launch - model - sample                      rest = step - schedule - launch - update

On the CPU all but model and sample is time in which nothing is computed: the engine's overhead. On a GPU these are the
host's times, and the device may be busy meanwhile; there the overhead is what the device's own record shows as idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from paged_infer.engine.engine import LLMEngine


@contextmanager
def watch_steps(engine: LLMEngine) -> Iterator[dict[str, float]]:
    """Within the block, the engine's steps are timed; at its end the dict has the seconds of each span.

    schedule, pack, model, sample, update and rest add up to all of the steps. Costs about 2 microseconds a step.
    """
    seconds = dict.fromkeys(("step", "schedule", "launch", "model", "sample", "update"), 0.0)

    def timed(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start_s = perf_counter()
            try:
                return fn(*args, **kwargs)
            finally:
                seconds[name] += perf_counter() - start_s

        return call

    runner, scheduler = engine.runner, engine.scheduler
    places: list[tuple[str, object, str]] = [
        ("step", engine, "step"),
        ("schedule", scheduler, "schedule"),
        ("update", scheduler, "advance"),
        ("update", scheduler, "settle"),
        ("launch", runner, "launch"),
        ("model", runner.decoder, "forward"),
        ("model", runner.decoder, "logits"),
        ("sample", runner.sampler, "draw"),
    ]
    if runner.graphs is not None:
        places.append(("model", runner.graphs, "replay"))
    if runner.drafter is not None:  # what it computes is computing, too
        drafting = runner.drafter.runner
        places += [("model", drafting.decoder, method) for method in ("forward", "logits")]
        places.append(("sample", drafting.sampler, "draw"))
    found: dict[str, float] = {}
    before = [owner.__dict__.get(method) for _, owner, method in places]  # None: the method of its class
    for name, owner, method in places:
        owner.__dict__[method] = timed(name, getattr(owner, method))
    try:
        yield found
    finally:
        for (_, owner, method), own in zip(places, before, strict=True):
            del owner.__dict__[method]
            if own is not None:
                owner.__dict__[method] = own
        found.update(
            schedule=seconds["schedule"],
            pack=seconds["launch"] - seconds["model"] - seconds["sample"],
            model=seconds["model"],
            sample=seconds["sample"],
            update=seconds["update"],
            rest=seconds["step"] - seconds["schedule"] - seconds["launch"] - seconds["update"],
        )


def cpu_overhead_share(span_s: dict[str, float]) -> float:
    """Of the steps' time, what was neither the model nor the sampler."""
    return 1 - (span_s["model"] + span_s["sample"]) / sum(span_s.values())


def cuda_busy_s(run: Callable[[], object]) -> float:
    """Seconds in which at least one kernel or copy of ``run`` was on the device, by CUPTI's record.

    Recording slows the host and not the kernels: compare with the seconds of a run that is not recorded.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    results = recorded.profiler.kineto_results  # raw: a long run has a million events, and torch's own list takes long
    return (
        union_length(
            (event.start_ns(), event.start_ns() + event.duration_ns())
            for event in results.events()
            if event.device_type() == DeviceType.CUDA
        )
        * 1e-9
    )


def union_length(intervals: Iterable[tuple[int, int]]) -> int:
    """How much of a line intervals cover, whatever their overlaps.

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

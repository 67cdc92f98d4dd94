"""A few steps from the middle of a workload, for a profiler: a record of all steps takes minutes to read.

The steps of a workload are the same in each run, because its lengths are; so they are found by their number. Requests
that are unfinished after the last recorded step are aborted.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ReadOnlyList
from contextlib import contextmanager

from paged_infer.bench.load import EngineSystem
from paged_infer.bench.speed.step_spans import cuda_busy_s
from paged_infer.bench.workloads import Workload
from paged_infer.engine.engine import LLMEngine
from paged_infer.simulation.workloads import WorkloadRequest

BUSY_STEPS = 30


@contextmanager
def serving(engine: LLMEngine, workload: Workload) -> Iterator[None]:
    """Every request of ``workload`` is submitted at the start of the block; at its end, what is left is aborted."""
    server = EngineSystem(engine, workload=workload)
    for prompt, params in zip(workload.prompts, workload.params, strict=True):
        server.submit(WorkloadRequest(0.0, len(prompt), params.max_tokens or 0))
    try:
        yield
    finally:
        for sequence in server.sequences:
            engine.abort(sequence.request_id)
        engine.step()  # settle the one in flight


def busy_share(engine: LLMEngine, workload: Workload, step_s: ReadOnlyList[ReadOnlyList[float]]) -> list[float]:
    """The share of the time of ``BUSY_STEPS`` steps in which a CUDA device was busy, for each of several runs.

    Recording slows the host, not the kernels. So the time of the kernels is recorded here, once, and divided by the
    time that the same steps took in a run that was not recorded.

    Args:
        step_s: of each of these runs of ``workload``, the moments at which its steps returned.

    Raises:
        ValueError: there are fewer than three steps.
    """
    num_steps = min(map(len, step_s))
    if num_steps < 3:
        raise ValueError(f"a workload of {num_steps} steps: at least 3 are needed")
    count = min(BUSY_STEPS, num_steps - 2)
    first = (num_steps - count) // 2
    with serving(engine, workload):
        for _ in range(first):
            engine.step()
        busy_s = cuda_busy_s(lambda: [engine.step() for _ in range(count)])
    return [busy_s / (moments[first + count - 1] - moments[first - 1]) for moments in step_s]

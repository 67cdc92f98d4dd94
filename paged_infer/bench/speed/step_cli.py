"""``paged-infer bench step``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from paged_infer.bench.options import Common
from paged_infer.bench.speed.cli import errors
from paged_infer.cli_options import with_option_groups


@with_option_groups
def step(
    common: Common,
    num_requests: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 32,
    shortest: Annotated[int, typer.Option(help="Fewest tokens of a prompt, and of an output.", min=1)] = 16,
    longest: Annotated[int, typer.Option(help="Most tokens of a prompt, and of an output.", min=1)] = 128,
    beside: Annotated[str, typer.Option(help="Another attention backend to hold it against.")] = "sdpa",
) -> None:
    """Where a step's time goes on a CPU, piece by piece, beside another backend's, interleaved."""
    import torch

    from paged_infer.bench.machine import machine_line
    from paged_infer.bench.speed.step_parts import measure_step
    from paged_infer.bench.speed.tables import print_step
    from paged_infer.bench.workloads import random_lengths
    from paged_infer.kernels.attention_backends import fastest_backend

    with errors(), ExitStack() as stack:
        if common.engine.device not in ("auto", "cpu"):
            raise ValueError(f"device={common.engine.device!r}: bench step measures a CPU")
        backend = common.engine.attention_backend
        backend = fastest_backend(torch.device("cpu")) if backend == "auto" else backend
        before, llm = (
            stack.enter_context(common.open(2 * longest, device="cpu", attention_backend=name))
            for name in (beside, backend)
        )
        workload = random_lengths(llm, num_requests, shortest, longest, common.seed)
        report = measure_step((before, llm), workload, common.repeats)
    print_step(report)
    print(f"on {machine_line(report.machine)}")
    report.save(common.figures / "bench-step.json")
    print(f"numbers: {common.figures / 'bench-step.json'}")

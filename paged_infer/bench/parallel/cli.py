"""``paged-infer bench parallel``."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Annotated

import typer

from paged_infer.bench.options import Repeats
from paged_infer.bench.report import save_report
from paged_infer.bench.shapes import folder_of
from paged_infer.bench.speed.cli import errors, progress
from paged_infer.cli_options import RESULTS, Figures, ModelName, open_llm, with_option_groups
from paged_infer.config import EngineOptions

NAME = "bench-parallel.json"
SHAPE = "qwen3-30m"
ParallelModel = Annotated[str | None, ModelName(f"A shape, or another model with its --load-format. Default: {SHAPE}.")]


@with_option_groups
def parallel(
    model: ParallelModel = SHAPE,
    load_format: Annotated[str, typer.Option(help="dummy: random weights.")] = "dummy",
    requests: Annotated[
        list[int] | None, typer.Option(help="Requests at once; may be repeated. Default: 1, 8 and 32.", min=1)
    ] = None,
    ranks: Annotated[bool, typer.Option(help="Measure one rank and two.")] = True,
    replicas: Annotated[bool, typer.Option(help="Measure two replicas by three routings.")] = True,
    num_requests: Annotated[int, typer.Option(help="Requests to the replicas.", min=1)] = 64,
    repeats: Repeats = 3,
    seed: Annotated[int, typer.Option(help="Seed of the random weights and requests.")] = 0,
    figures: Figures = RESULTS,
) -> None:
    """One model on one rank and on two, and two replicas by three routings, in float32 on a CPU.

    For ranks: tokens per second, collectives and bytes per step, memory, and the link on which two would win. For
    replicas: throughput, and the time to first token of requests with shared prefixes.
    """
    from paged_infer.async_llm import AsyncLLM
    from paged_infer.bench.parallel.ranks import measure_ranks
    from paged_infer.bench.parallel.replicas import OUTPUT, OWN, POOL_BLOCKS, SHARED, measure_replicas
    from paged_infer.bench.parallel.report import ParallelReport, parallel_figure, print_report
    from paged_infer.bench.workloads import random_ids
    from paged_infer.engine.routing import ROUTINGS
    from paged_infer.execution.machine import describe_machine
    from paged_infer.model.loading.checkpoint import read_config
    from paged_infer.model.loading.hub import resolve_model

    counts, report = requests or [1, 8, 32], ParallelReport(model or "storyteller", describe_machine(), repeats)
    base: EngineOptions = {"dtype": "float32", "device": "cpu", "load_format": load_format, "seed": seed}
    with errors(), ExitStack() as stack:
        name = stack.enter_context(folder_of(model, load_format))
        folder = name or "storyteller"
        vocab_size = read_config(resolve_model(folder)).vocab_size
        workloads = {str(n): random_ids(vocab_size, n, 16, 128, seed) for n in counts}
        if ranks:
            plain: EngineOptions = {"max_model_len": 256, "enable_prefix_caching": False, **base}
            engines = {n: open_llm(folder, **(plain | {"tensor_parallel_size": n})) for n in (1, 2)}
            with progress((repeats + 1) * (len(workloads) + 1)) as advance:
                measure_ranks(report, engines, workloads, advance)
            engines[2].engine.shutdown()
        if replicas:
            report.num_replicas = 2
            longest = SHARED + OWN + OUTPUT
            limits: EngineOptions = {"max_model_len": longest, "num_blocks": POOL_BLOCKS, "max_num_seqs": 16}
            pools = {
                routing: AsyncLLM(folder, data_parallel_size=2, data_parallel_routing=routing, **(base | limits))
                for routing in ROUTINGS
            }
            with progress((repeats + 1) * len(pools)) as advance:
                asyncio.run(measure_replicas(report, pools, vocab_size, num_requests, seed, advance))
    print_report(report)
    save_report(report, figures / NAME, parallel_figure)

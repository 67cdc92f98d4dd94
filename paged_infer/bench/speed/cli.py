"""``paged-infer bench latency | throughput | optimisations | load | ladder``, and what ``serve`` and ``step`` share.

``python -m`` runs it where rich is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paged_infer.bench.options import Common, Peers
from paged_infer.cli_options import Without, fail, with_option_groups

if TYPE_CHECKING:
    from paged_infer.bench.metrics import System
    from paged_infer.bench.speed.ladder import LadderReport
    from paged_infer.bench.speed.measure import Bench, SpeedReport
    from paged_infer.bench.workloads import Workload
    from paged_infer.llm import LLM

RATE_SHARES = [0.3, 0.6, 0.9, 1.2]  # of what the most clients were served at

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

CPU_REQUESTS, CPU_SCALE = 32, 0.125  # of the throughput workload, where there is no GPU
Scale = Annotated[
    float | None,
    typer.Option(
        help="Of the lengths, 100..1024 tokens in and out. Default: 1 on a GPU; "
        f"{CPU_SCALE:g} on a CPU, so that a run with the storyteller or qwen3-30m takes less than two minutes.",
        min=0.001,
    ),
]


@app.command()
@with_option_groups
def latency(
    common: Common,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1)] = 128,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 64,
    peer: Peers = None,
) -> None:
    """One request alone, greedy, again and again: the first run of each contender, then the settled ones."""
    from paged_infer.bench.workloads import one_request

    with errors(), common.open_with_peers(prompt_tokens + max_tokens, peer, ("generate",)) as (llm, peers):
        workload = one_request(llm.engine.decoder.config.vocab_size, prompt_tokens, max_tokens, common.seed)
        contenders = {**_engine(llm), **peers}
        with bench_of(llm, common.repeats, common.repeats * len(contenders)) as bench:
            report = bench.latency(contenders, workload)
    show(report, common.figures)


@app.command()
@with_option_groups
def throughput(
    common: Common,
    num_requests: Annotated[
        int | None, typer.Option(help=f"Default: 256 on a GPU, {CPU_REQUESTS} on a CPU.", min=1)
    ] = None,
    scale: Scale = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.6,
    peer: Peers = None,
) -> None:
    """nano-vLLM's workload: random requests at once, end tokens ignored; tokens per second beside the floor.

    What contenders say is compared on a few requests, greedy. Exits with status 1 if anybody gives another number of
    tokens or, in float32, others.
    """
    from paged_infer.bench.workloads import nano_vllm_requests

    on_gpu = _on_gpu(common)
    num_requests = num_requests or (256 if on_gpu else CPU_REQUESTS)
    scale = scale or (1.0 if on_gpu else CPU_SCALE)
    longest = 2 * max(1, round(1024 * scale))
    with errors(), common.open_with_peers(longest, peer, ("static", "generate_batch")) as (llm, peers):
        vocab_size = llm.engine.decoder.config.vocab_size
        workload = nano_vllm_requests(vocab_size, num_requests, scale, temperature, common.seed)
        contenders = {**_engine(llm), **peers}
        with bench_of(llm, common.repeats, common.repeats * len(contenders)) as bench:
            report = bench.throughput(contenders, workload)
    show(report, common.figures)


@app.command()
@with_option_groups
def optimisations(
    common: Annotated[
        Common,
        Without(
            attention_backend="each engine has its own",
            enforce_eager="each engine has its own",
            async_scheduling="each engine has its own",
            speculative_config="an engine with drafts cannot run ahead",
        ),
    ],
    num_requests: Annotated[
        int | None, typer.Option(help=f"Default: 256 on a GPU, {CPU_REQUESTS // 2} on a CPU.", min=1)
    ] = None,
    scale: Scale = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.6,
) -> None:
    """The throughput workload on a ladder of engines, each with one optimisation more: what did it buy?

    On a GPU: every kernel launched by itself, then CUDA graphs, then running ahead. On a CPU: attention in torch, in
    batches, in C, then running ahead. Exits with status 1 if a rung gives other tokens, where they must not differ.
    """
    import torch

    from paged_infer.bench.speed.optimisations import measure_rungs, open_rungs
    from paged_infer.bench.workloads import nano_vllm_requests

    on_gpu = _on_gpu(common)
    num_requests = num_requests or (256 if on_gpu else CPU_REQUESTS // 2)
    scale = scale or (1.0 if on_gpu else CPU_SCALE)
    longest = 2 * max(1, round(1024 * scale))
    device = torch.device("cuda" if on_gpu else "cpu")
    with errors(), open_rungs(common, device, longest) as engines:
        last = [*engines.values()][-1]
        vocab_size = last.engine.decoder.config.vocab_size
        workload = nano_vllm_requests(vocab_size, num_requests, scale, temperature, common.seed)
        with bench_of(last, common.repeats, common.repeats * len(engines)) as bench:
            report = measure_rungs(bench, engines, workload)
    show(report, common.figures)


@app.command()
@with_option_groups
def load(
    common: Common,
    num_requests: Annotated[int, typer.Option(help="In each of the loads.", min=1)] = 64,
    shortest: Annotated[int, typer.Option(help="Fewest tokens of a prompt, and of an output.", min=1)] = 16,
    longest: Annotated[int, typer.Option(help="Most tokens of a prompt, and of an output.", min=2)] = 128,
    clients: Annotated[list[int] | None, typer.Option(help="Closed loop of so many; may be repeated.", min=1)] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            help="Poisson arrivals a second; may be repeated. Default: 0.3, 0.6, 0.9 and 1.2 times what the most "
            "clients were served at.",
            min=0.001,
        ),
    ] = None,
) -> None:
    """The engine under load, stepped directly: 1, 4, 8, 16 and 32 clients that wait for their answers, then arrivals
    that wait for nobody.
    """
    from paged_infer.bench.workloads import random_lengths

    counts = clients or [1, 4, 8, 16, 32]
    with errors(), common.open(2 * longest) as llm:
        workload = random_lengths(llm, num_requests, shortest, longest, common.seed)
        with bench_of(llm, common.repeats, common.repeats * (len(counts) + len(rate or RATE_SHARES))) as bench:
            report = bench.load(workload, counts, rate, RATE_SHARES)
    show(report, common.figures)


@app.command()
@with_option_groups
def ladder(
    common: Common,
    num_requests: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 32,
    shortest: Annotated[int, typer.Option(help="Fewest tokens of a prompt, and of an output.", min=1)] = 16,
    longest: Annotated[int, typer.Option(help="Most tokens of a prompt, and of an output.", min=1)] = 128,
    slow_rungs: Annotated[bool, typer.Option(help="Also naive and cached, one request at a time.")] = False,
    peer: Peers = None,
) -> None:
    """Random prompts and output lengths at once: the rungs beside transformers, all held to its tokens.

    transformers' one request at a time is the reference; it is slow, and runs once. Exits with status 1 if tokens
    differ in float32, where they must not.
    """
    from paged_infer.bench.speed.baselines import our_baselines
    from paged_infer.bench.workloads import random_lengths

    names = peer or ["static", "generate_batch"]
    with errors(), common.open_with_peers(2 * longest, ["generate", *names], ()) as (llm, peers):
        workload = random_lengths(llm, num_requests, shortest, longest, common.seed)
        rungs = {**our_baselines(llm), **peers}
        if not slow_rungs:
            del rungs["naive"], rungs["cached"]
        report = run_with_progress(rungs, workload, llm.name, common.repeats)
        exact = str(llm.engine.decoder.dtype) == "torch.float32"
    show_ladder(report, common.figures / "bench-ladder.png")
    for name in peers:
        if name != "transformers":
            print(report.ratio("paged", name))
    print(f"medians of {common.repeats} interleaved runs; in brackets the least and most of one run's own ratio")
    if exact and not all(rung.same_tokens for rung in report.rungs):
        raise typer.Exit(1)


def run_with_progress(rungs: dict[str, System], workload: Workload, model: str, repeats: int) -> LadderReport:
    """``run_ladder`` with a bar that names the rung that ran last."""
    from paged_infer.bench.speed.ladder import run_ladder

    with progress(repeats * (len(rungs) - 1) + 1) as advance:
        return run_ladder(rungs, workload, model, repeats, on_run=advance)


def show_ladder(report: LadderReport, picture: Path) -> None:
    """The report as a table, and as ``picture`` with its numbers in a .json beside it."""
    from paged_infer.bench.machine import machine_line
    from paged_infer.bench.speed.ladder_figure import ladder_figure
    from paged_infer.bench.speed.tables import print_ladder

    print_ladder(report)
    print(f"on {machine_line(report.machine)}")
    report.save(picture.with_suffix(".json"))
    ladder_figure(report).save(picture)
    print(f"picture: {picture}   numbers: {picture.with_suffix('.json')}")


def show(report: SpeedReport, figures: Path) -> None:
    from paged_infer.bench.speed.speed_figure import speed_figure
    from paged_infer.bench.speed.tables import print_speed

    print_speed(report)
    picture = figures / f"bench-{report.command}.png"
    report.save(picture.with_suffix(".json"))
    speed_figure(report).save(picture)
    print(f"picture: {picture}   numbers: {picture.with_suffix('.json')}")
    if not report.is_right:
        raise typer.Exit(1)


def _on_gpu(common: Common) -> bool:
    import torch

    return common.engine.device != "cpu" and torch.cuda.is_available()


def _engine(llm: LLM) -> dict[str, System]:
    from paged_infer.bench.speed.engine_runs import watched_engine
    from paged_infer.bench.speed.measure import ENGINE

    return {ENGINE: watched_engine(llm)}


@contextmanager
def bench_of(llm: LLM, repeats: int, num_runs: int) -> Iterator[Bench]:
    """The machine described and its roofline measured, before anything runs."""
    from paged_infer.bench.machine import describe_machine
    from paged_infer.bench.roofline import measure
    from paged_infer.bench.speed.measure import Bench

    machine = describe_machine()
    roofline = measure(llm.engine.device, dtype=llm.engine.decoder.dtype)
    with progress(num_runs) as advance:
        yield Bench(llm, roofline, repeats, on_run=advance, machine=machine)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    from tqdm import tqdm

    with tqdm(total=total, leave=False, desc="warming up", disable=None) as bar:  # None: not into a file

        def advance(name: str) -> None:
            bar.set_description(name)
            bar.update()

        yield advance


@contextmanager
def errors() -> Iterator[None]:
    """What a user got wrong, or a peer that does not start, is one line."""
    try:
        yield
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    app()

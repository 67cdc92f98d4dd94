"""``paged-infer bench latency | throughput | optimisations | load | ladder | step | speculation | trace``.

And what other benches share. ``python -m`` runs it where rich is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paged_infer.bench.options import (
    CPU_REQUESTS,
    Clients,
    Common,
    Lengths,
    NanoRequests,
    NumRequests,
    Peers,
    Rates,
    ThinkingBudget,
)
from paged_infer.bench.report import save_report
from paged_infer.cli_help import PLAIN, Command
from paged_infer.cli_options import Without, with_option_groups
from paged_infer.config import EngineConfig, EngineOptions
from paged_infer.terminal import CommandLine, fail

if TYPE_CHECKING:
    from paged_infer.bench.metrics import System
    from paged_infer.bench.speed.measure import Bench, SpeedReport
    from paged_infer.llm import LLM

LOOKUP = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
LONGEST_PROMPT = 96  # of ``story_beginnings``
CPU_STEP_TOKENS = 256  # of ``trace``
RATE_SHARES = [0.3, 0.6, 0.9, 1.2]  # of the rate at which the most clients were served

app = CommandLine(add_completion=False, **PLAIN)


@app.command(cls=Command)
@with_option_groups
def latency(
    common: Common,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1)] = 128,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 64,
    peer: Peers = None,
) -> None:
    """One request alone, greedy, repeated: the first run of each system, then the settled ones."""
    from paged_infer.bench.workloads import one_request

    with errors(), common.open_with_peers(prompt_tokens + max_tokens, peer, ("generate",)) as (llm, peers):
        workload = one_request(llm.engine.model_config.vocab_size, prompt_tokens, max_tokens, common.seed)
        systems = {**_engine(llm), **peers}
        with _bench(llm, common, common.repeats * len(systems)) as bench:
            report = bench.latency(systems, workload)
    show(report, common.figures)


@app.command(cls=Command)
@with_option_groups
def throughput(common: Common, requests: NanoRequests, peer: Peers = None) -> None:
    """nano-vLLM's workload: random requests at once, end tokens ignored; tokens per second, and share of the limit.

    The systems' tokens are compared on a few requests, greedy. Exits with status 1 if one of them gives another number
    of tokens or, in float32, other tokens.
    """
    requests = requests.on(_on_gpu(common))
    with errors(), common.open_with_peers(requests.longest, peer, ("static", "generate_batch")) as (llm, peers):
        systems = {**_engine(llm), **peers}
        with _bench(llm, common, common.repeats * len(systems)) as bench:
            report = bench.throughput(systems, requests.draw(llm, common.seed))
    show(report, common.figures)


@app.command(cls=Command)
@with_option_groups
def optimisations(
    common: Annotated[
        Common,
        Without(
            attention_backend="each engine has its own",
            enforce_eager="each engine has its own",
            async_scheduling="each engine has its own",
            max_num_batched_tokens="each engine has its own",
            speculative_config="an engine with drafts cannot run ahead",
        ),
    ],
    requests: NanoRequests,
) -> None:
    """The throughput workload on a series of engines, each with one optimisation more: how much faster is it?

    On a GPU: every kernel launched by itself, then CUDA graphs, then asynchronous scheduling, then steps of up to 8,192
    tokens instead of 2,048. On a CPU: attention in torch, in batches, in C, then asynchronous scheduling. Exits with
    status 1 if an engine gives other tokens where it must not.
    """
    import torch

    from paged_infer.bench.speed.engine_runs import watched_engine
    from paged_infer.bench.speed.optimisations import engine_options

    on_gpu = _on_gpu(common)
    requests = requests.on(on_gpu, CPU_REQUESTS // 2)
    options = engine_options(torch.device("cuda" if on_gpu else "cpu"))
    with errors(), common.open_each(requests.longest, options) as engines:
        last = [*engines.values()][-1]
        with _bench(last, common, common.repeats * len(engines)) as bench:
            systems = {name: watched_engine(llm) for name, llm in engines.items()}
            report = bench.throughput(systems, requests.draw(last, common.seed), "optimisations")
    show(report, common.figures)


@app.command(cls=Command)
@with_option_groups
def load(
    common: Common,
    lengths: Lengths,
    num_requests: Annotated[int, typer.Option(help="Requests in each load.", min=1)] = 64,
    clients: Clients = None,
    rate: Rates = None,
    thinking_token_budget: ThinkingBudget = None,
) -> None:
    """The engine under load, stepped directly: closed loops of 1, 4, 8, 16 and 32 clients, then open loops."""
    counts = clients or [1, 4, 8, 16, 32]
    with errors(), common.open(2 * lengths.longest) as llm:
        workload = lengths.draw(llm, num_requests, common.seed).bounded(thinking_token_budget)
        with _bench(llm, common, common.repeats * (len(counts) + len(rate or RATE_SHARES))) as bench:
            report = bench.load(workload, counts, rate, RATE_SHARES)
    show(report, common.figures)


@app.command(cls=Command)
@with_option_groups
def ladder(
    common: Common,
    lengths: Lengths,
    num_requests: NumRequests = 32,
    slow_rungs: Annotated[bool, typer.Option(help="Also naive and cached, one request at a time.")] = False,
    peer: Peers = None,
) -> None:
    """Random prompts and output lengths at once: the baselines and transformers, all held to transformers' tokens.

    transformers' one request at a time is the reference; it is slow, and runs once. Exits with status 1 if tokens
    differ in float32, where they must not.
    """
    from paged_infer.bench.speed.baselines import our_baselines
    from paged_infer.bench.speed.ladder import run_ladder

    names = peer or ["static", "generate_batch"]
    with errors(), common.open_with_peers(2 * lengths.longest, ["generate", *names], ()) as (llm, peers):
        systems = {**our_baselines(llm), **peers}
        if not slow_rungs:
            del systems["naive"], systems["cached"]
        with progress(common.repeats * (len(systems) - 1) + 1) as advance:
            workload = lengths.draw(llm, num_requests, common.seed)
            save, deadline_s = save_to(common.figures), common.deadline_s
            report = run_ladder(
                llm, systems, workload, common.repeats, on_run=advance, save=save, deadline_s=deadline_s
            )
    show(report, common.figures)


@app.command(cls=Command)
@with_option_groups
def step(
    common: Common,
    lengths: Lengths,
    num_requests: NumRequests = 32,
    beside: Annotated[str, typer.Option(help="Another attention backend to compare with.")] = "sdpa",
) -> None:
    """Where a step's time goes on a CPU, piece by piece, with one attention backend and with another, interleaved."""
    import torch

    from paged_infer.bench.speed.step_parts import measure_step
    from paged_infer.bench.speed.tables import print_step
    from paged_infer.kernels.attention_backends import fastest_backend

    with errors():
        if common.engine.device not in ("auto", "cpu"):
            raise ValueError(f"device={common.engine.device!r}: bench step measures a CPU")
        backend = common.engine.attention_backend
        backend = fastest_backend(torch.device("cpu")) if backend == "auto" else backend
        options: dict[str, EngineOptions] = {
            name: {"device": "cpu", "attention_backend": name} for name in (beside, backend)
        }
        with common.open_each(2 * lengths.longest, options) as engines:
            workload = lengths.draw(engines[backend], num_requests, common.seed)
            path = common.figures / "bench-step.json"
            report = measure_step(
                list(engines.values()),
                workload,
                common.repeats,
                save=lambda report: report.save(path),
                deadline_s=common.deadline_s,
            )
    print_step(report)
    save_report(report, path)


@app.command(cls=Command)
@with_option_groups
def speculation(
    common: Annotated[
        Common,
        Without(
            speculative_config="each engine has its own",
            async_scheduling="drafts need the tokens of the step before, and the engine without drafts runs like them",
        ),
    ],
    num_speculative_tokens: Annotated[int, typer.Option(help="Most tokens drafted at a time.", min=1)] = 4,
    draft_model: Annotated[
        Path | None, typer.Option(help="A folder. Default: the storytellers' own; for another model, none.")
    ] = None,
    at_once: Annotated[
        list[int] | None, typer.Option(help="Requests at once; may be repeated. Default: 1, 4, 16.", min=1)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each request.", min=2)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
) -> None:
    """The same texts without drafts, with prompt lookup, and with a draft model: the share of drafts that
    are accepted, and the speed. For 1, 4 and 16 requests at once.

    Exits with status 1 if drafts change a token.
    """
    from paged_infer import storyteller
    from paged_infer.bench.speed.speculation import PLAIN, measure_speculation, open_texts
    from paged_infer.bench.workloads import story_beginnings

    drafting = {"num_speculative_tokens": num_speculative_tokens}
    methods: dict[str, dict[str, Any] | None] = {PLAIN: None, "ngram": {"method": "ngram", **LOOKUP, **drafting}}
    has_draft = common.model in (None, "storyteller", "storyteller-moe")  # those with the draft model's vocabulary
    folder = draft_model or (storyteller.DRAFT_PATH if has_draft else None)
    if folder is not None:
        methods["draft model"] = {"method": "draft_model", "model": str(folder), **drafting}
    batches = at_once or [1, 4, 16]
    # A step's drafts need the tokens of the step before.
    options: dict[str, EngineOptions] = {
        name: {"async_scheduling": False, "speculative_config": config} for name, config in methods.items()
    }
    with errors(), common.open_each(LONGEST_PROMPT + max_tokens, options) as engines:
        plain = engines[PLAIN]
        beginnings = story_beginnings(plain, max(batches), max_tokens, common.seed)
        workload = open_texts(beginnings, max_tokens, temperature)
        with _bench(plain, common, common.repeats * len(engines) * len(batches)) as bench:
            report = measure_speculation(bench, engines, workload, batches)
    show(report, common.figures)


@app.command(cls=Command)
@with_option_groups
def trace(
    common: Annotated[Common, Without(repeats="nothing is timed", time_limit="it takes a few seconds")],
    requests: NanoRequests,
    prompt_steps: Annotated[int, typer.Option(help="Steps with chunks of prompts to record.", min=0)] = 5,
    decode_steps: Annotated[int, typer.Option(help="Decode steps after them to record.", min=1)] = 10,
) -> None:
    """Record some steps of the throughput workload with torch.profiler, into bench-trace.json.gz (Chrome's format).

    On a CPU, max_num_batched_tokens is 256 unless it is given, so that the prompts take more than one step.
    """
    from paged_infer.bench.speed.trace import print_recorded, record_steps

    on_gpu = _on_gpu(common)
    requests = requests.on(on_gpu)
    is_default = common.engine.max_num_batched_tokens == EngineConfig().max_num_batched_tokens
    options: EngineOptions = {"max_num_batched_tokens": CPU_STEP_TOKENS} if is_default and not on_gpu else {}
    with errors(), common.open(requests.longest, **options) as llm:
        path = common.figures / "bench-trace.json.gz"
        recorded = record_steps(llm.engine, requests.draw(llm, common.seed), prompt_steps, decode_steps, path)
    print_recorded(recorded)


def show(report: SpeedReport, figures: Path, name: str = "") -> None:
    """Print the report; save it and its picture as bench-<command> or ``name``. Exit status 1 if it is not right."""
    from paged_infer.bench.speed.speed_figure import speed_figure
    from paged_infer.bench.speed.tables import print_speed

    print_speed(report)
    save_report(report, _path(report, figures, name), speed_figure)
    if not report.is_right:
        raise typer.Exit(1)


def save_to(figures: Path, name: str = "") -> Callable[[SpeedReport], None]:
    """A function that saves a report's numbers where ``show`` will, so that an unfinished command leaves its own."""
    return lambda report: report.save(_path(report, figures, name))


def _path(report: SpeedReport, figures: Path, name: str) -> Path:
    return figures / f"{name or 'bench-' + report.command}.json"


def _on_gpu(common: Common) -> bool:
    import torch

    return common.engine.device != "cpu" and torch.cuda.is_available()


def _engine(llm: LLM) -> dict[str, System]:
    from paged_infer.bench.speed.engine_runs import watched_engine
    from paged_infer.bench.speed.measure import ENGINE

    return {ENGINE: watched_engine(llm)}


def _bench(llm: LLM, common: Common, num_runs: int) -> AbstractContextManager[Bench]:
    """``bench_of`` with the options that all commands share."""
    save, deadline_s = save_to(common.figures), common.deadline_s
    return bench_of(llm, common.repeats, num_runs, save=save, deadline_s=deadline_s)


@contextmanager
def bench_of(llm: LLM, repeats: int, num_runs: int, **others: Any) -> Iterator[Bench]:
    """Describe the machine and measure its roofline before anything runs. ``others``: further fields of ``Bench``."""
    from paged_infer.bench.roofline import measure
    from paged_infer.bench.speed.measure import Bench
    from paged_infer.execution.machine import describe_machine

    machine = describe_machine()
    roofline = measure(llm.engine.device, dtype=llm.engine.decoder.dtype)
    with progress(num_runs) as advance:
        yield Bench(llm, roofline, repeats, on_run=advance, machine=machine, **others)


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
    """Bad input, or a peer that does not start, is one line."""
    try:
        yield
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    app()

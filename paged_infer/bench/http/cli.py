"""``paged-infer bench serve``: load over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from paged_infer.bench.options import Clients, Lengths, Rates, Repeats, RequestsSeed, ThinkingBudget
from paged_infer.bench.speed import cli as speed_cli
from paged_infer.cli_options import RESULTS, Figures, Model, Without, as_arguments, open_llm, with_option_groups
from paged_infer.config import EngineConfig

if TYPE_CHECKING:
    from paged_infer.bench.http.http_bench import HttpBench

CLIENTS = [4, 8, 16, 32]
ANY_VOCABULARY = 1000  # token ids below this are in every model's vocabulary
BACKENDS = ("openai", "openai-chat")  # vLLM's names


@dataclass(frozen=True, slots=True)
class Load:
    """The requests, and how many clients send them."""

    num_requests: Annotated[int, typer.Option(help="Requests in each load.", min=1)] = 128
    clients: Clients = None
    rate: Rates = None
    thinking_token_budget: ThinkingBudget = None
    repeats: Repeats = 3
    seed: RequestsSeed = 0

    @property
    def closed(self) -> list[int]:
        return sorted(set(self.clients or CLIENTS))

    def num_runs(self, num_others: int, num_servers: int = 1) -> int:
        """Each closed loop twice, whole answers and streamed ones."""
        num_open = len(self.rate or speed_cli.RATE_SHARES)
        return self.repeats * (2 * num_servers * len(self.closed) + num_open) + num_others


@with_option_groups
def serve(
    load: Load,
    lengths: Lengths,
    engine: Annotated[
        EngineConfig,
        Without(max_num_seqs="as many as the most clients", seed="the command's own --seed is the workload's"),
    ],
    model: Model = None,
    backend: Annotated[
        str, typer.Option(help="openai: /v1/completions; openai-chat: the prompts as chats, to /v1/chat/completions.")
    ] = "openai",
    base_url: Annotated[
        str | None, typer.Option(help="A running server, as http://HOST:PORT, instead of one of our own.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="PAGED_INFER_API_KEY", help="The key of the server at --base-url.")
    ] = None,
    naive: Annotated[
        str, typer.Option(help="cached: compare with a server that takes one request at a time; or none.")
    ] = "cached",
    engine_process: Annotated[
        bool, typer.Option("--engine-process", help="Compare with the same server with this option, in turns.")
    ] = False,
    torch_threads: Annotated[int, typer.Option(help="Threads of each of our own processes.", min=1)] = 1,
    figures: Figures = RESULTS,
) -> None:
    """Load over HTTP: clients that wait for their answers, then Poisson arrivals; random prompts, greedy.

    Server and client run in processes of their own. They are compared to LLM.generate on the same requests, as many at
    once as the most clients are, in turn; and once to a server of one request at a time. Exits with status 1 if a
    system gives another number of tokens or, in float32, another text than LLM.generate.
    """
    with speed_cli.errors():
        if naive not in ("cached", "none"):
            one_at_a_time = "cached (compare it to paged-infer serve --max-num-seqs 1)"
            raise ValueError(f"naive={naive!r}: must be {one_at_a_time} or none")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: must be {' or '.join(BACKENDS)}")
        is_chat = backend == "openai-chat"
        if base_url is None:
            opened = _ours(load, lengths, engine, model, is_chat, naive == "cached", engine_process, torch_threads)
        elif model is not None or engine != EngineConfig() or engine_process:
            raise ValueError(f"base_url={base_url!r}: its model and engine are its own; leave out their options")
        else:
            opened = _theirs(load, lengths, is_chat, base_url.rstrip("/").removesuffix("/v1"), api_key)
        with opened as bench:
            report = bench.report(load.closed, load.rate, speed_cli.RATE_SHARES)
    speed_cli.show(report, figures)


@contextmanager
def _ours(
    load: Load,
    lengths: Lengths,
    engine: EngineConfig,
    model: str | None,
    is_chat: bool,
    naive: bool,
    engine_process: bool,
    torch_threads: int,
) -> Iterator[HttpBench]:
    """Our own servers of one model, and the same model in this process."""
    import torch

    from paged_infer.bench.http.http_bench import HttpBench, HttpSystem, client_process
    from paged_infer.bench.http.servers import running

    usual_threads = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, usual_threads)
        llm = open_llm(model, **replace(engine, max_num_seqs=max(load.closed)).options)
        workload = lengths.draw(llm, load.num_requests, load.seed)
        if is_chat:
            workload = workload.as_chats(llm)
        workload = workload.bounded(load.thinking_token_budget)
        num_others = load.repeats + len(load.closed) * naive
        bench = stack.enter_context(
            speed_cli.bench_of(llm, load.repeats, load.num_runs(num_others, 1 + engine_process))
        )
        client = stack.enter_context(client_process())
        options = [*([] if model is None else [model]), *as_arguments(engine)]

        def serving(max_num_seqs: int, *more: str) -> HttpSystem:
            arguments = ("serve", *options, *more, "--log-level", "warning", "--max-num-seqs", str(max_num_seqs))
            url = stack.enter_context(running("paged_infer.cli", *arguments, torch_threads=torch_threads))
            return HttpSystem(client, url, llm.name)

        server = serving(max(load.closed))
        apart = serving(max(load.closed), "--engine-process") if engine_process else None
        slow = serving(1) if naive else None
        yield HttpBench(server, workload, load.repeats, bench.on_run, bench, slow, engine_process=apart)


@contextmanager
def _theirs(load: Load, lengths: Lengths, is_chat: bool, url: str, api_key: str | None) -> Iterator[HttpBench]:
    """A server that runs already: only its answers are known."""
    from paged_infer.bench.http.http_bench import HttpBench, HttpSystem, client_process
    from paged_infer.bench.http.servers import served_model
    from paged_infer.bench.workloads import random_ids, random_words

    drawn = (load.num_requests, lengths.shortest, lengths.longest, load.seed)
    workload = random_words(*drawn) if is_chat else random_ids(ANY_VOCABULARY, *drawn)
    workload = workload.bounded(load.thinking_token_budget)
    name = served_model(url, api_key)
    with client_process() as client, speed_cli.progress(load.num_runs(0)) as advance:
        yield HttpBench(HttpSystem(client, url, name, api_key), workload, load.repeats, advance)

"""The options that the speed benches share, how they open an engine and its peers, and draw their requests."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from paged_infer.bench.shapes import SHAPES, folder_of
from paged_infer.cli_options import RESULTS, Engine, Figures, ModelName, open_llm
from paged_infer.config import EngineConfig, EngineOptions

if TYPE_CHECKING:
    from paged_infer.bench.metrics import System
    from paged_infer.bench.workloads import Workload
    from paged_infer.llm import LLM

CPU_REQUESTS, CPU_SCALE = 32, 0.125  # of the throughput workload, where there is no GPU

BenchModel = Annotated[
    str | None,
    ModelName(
        f"Local folder, hub id, or with --load-format dummy a shape: {', '.join(SHAPES)}. "
        "Default: the storyteller. With dummy weights, --max-model-len is by default what the workload needs."
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        help="Compared with the engine: generate, static, generate_batch (transformers), vllm, nano-vllm, "
        "mini-sglang, or none; may be repeated. Default: static and generate_batch, for latency generate.",
    ),
]
NumRequests = Annotated[int, typer.Option(help="Requests at once.", min=1)]
Clients = Annotated[
    list[int] | None,
    typer.Option(help="Clients of a closed loop; may be repeated. Default: 4, 8, 16, 32; for load also 1.", min=1),
]
Rates = Annotated[
    list[float] | None,
    typer.Option(
        help="Poisson arrivals a second; may be repeated. Default: 0.3, 0.6, 0.9 and 1.2 times the rate at which the "
        "most clients were served.",
        min=0.001,
    ),
]
ThinkingBudget = Annotated[
    int | None,
    typer.Option(
        help="Each answer's reasoning is closed after this many tokens, and its end and the first content token are "
        "clocked; needs --reasoning-parser.",
        min=0,
    ),
]
RequestsSeed = Annotated[int, typer.Option(help="Seed of the requests: their prompts, lengths and arrivals.")]
Repeats = Annotated[int, typer.Option(help="Interleaved runs; medians are reported.", min=1)]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        help="Seconds from the start of the command: a repeat that would end later is not begun. The first is always "
        "run; the report has the number of runs.",
        min=0.0,
    ),
]


@dataclass(frozen=True, slots=True)
class Common:
    """The model, the engine's options, and how the runs are repeated and saved."""

    model: BenchModel = None
    engine: Engine = field(default_factory=EngineConfig)
    repeats: Repeats = 3
    time_limit: TimeLimit = None
    seed: RequestsSeed = 0
    figures: Figures = RESULTS
    began_s: float = field(default_factory=time.perf_counter, init=False)  # no option

    @property
    def deadline_s(self) -> float:
        """When the time limit ends, by ``time.perf_counter``."""
        return math.inf if self.time_limit is None else self.began_s + self.time_limit

    @contextmanager
    def open(self, longest: int, **options: Unpack[EngineOptions]) -> Iterator[LLM]:
        """The engine, for sequences of up to ``longest`` tokens; ``options`` replace the user's.

        Raises:
            ValueError: as ``LLM`` does.
        """
        options = {**self.engine.options, **options}
        if self.engine.load_format == "dummy":
            options.setdefault("max_model_len", longest)
        with folder_of(self.model, self.engine.load_format) as folder:
            yield open_llm(folder, **options)

    @contextmanager
    def open_each(self, longest: int, options: Mapping[str, EngineOptions]) -> Iterator[dict[str, LLM]]:
        """An engine for each name, with options of its own; on a GPU they share its memory evenly."""
        share = round(self.engine.gpu_memory_utilization / len(options), 3)
        with ExitStack() as stack:
            engines = {}
            for name, its in options.items():
                its = its | {"gpu_memory_utilization": share}
                engines[name] = stack.enter_context(self.open(longest, **its))
            yield engines

    @contextmanager
    def open_with_peers(
        self, longest: int, names: list[str] | None, usual: tuple[str, ...]
    ) -> Iterator[tuple[LLM, dict[str, System]]]:
        """The engine and its peers; on a GPU they share its memory evenly. ``names`` None are the usual ones."""
        from paged_infer.bench.peers.peers import ENGINES, check_peers, open_peers

        chosen = [name for name in (names or usual) if name != "none"]
        check_peers(chosen)
        num_engines = len([name for name in chosen if name in ENGINES])
        # transformers allocates as it runs: leave it an engine's share
        share = round(self.engine.gpu_memory_utilization / (1 + num_engines + (len(chosen) > num_engines)), 3)
        with self.open(longest, gpu_memory_utilization=share) as llm, open_peers(chosen, llm, share) as peers:
            yield llm, peers


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of random prompts and outputs, each uniform in the range."""

    shortest: Annotated[int, typer.Option(help="Shortest prompt, and shortest output, in tokens.", min=1)] = 16
    longest: Annotated[int, typer.Option(help="Longest prompt, and longest output, in tokens.", min=1)] = 128

    def draw(self, llm: LLM, num_requests: int, seed: int) -> Workload:
        from paged_infer.bench.workloads import random_ids

        return random_ids(llm.engine.model_config.vocab_size, num_requests, self.shortest, self.longest, seed)


@dataclass(frozen=True, slots=True)
class NanoRequests:
    """Those of nano-vLLM's bench, or a share of them."""

    num_requests: Annotated[
        int | None,
        typer.Option(
            help=f"Default: 256 on a GPU, {CPU_REQUESTS} on a CPU; for optimisations {CPU_REQUESTS // 2} there.", min=1
        ),
    ] = None
    scale: Annotated[
        float | None,
        typer.Option(
            help="Factor of the lengths, which are 100..1024 tokens in and out. Default: 1 on a GPU; "
            f"{CPU_SCALE:g} on a CPU, so that a run with the storyteller or qwen3-30m takes less than two minutes.",
            min=0.001,
        ),
    ] = None
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.6

    def on(self, on_gpu: bool, cpu_requests: int = CPU_REQUESTS) -> NanoRequests:
        """With the defaults for a device."""
        num_requests = self.num_requests or (256 if on_gpu else cpu_requests)
        return replace(self, num_requests=num_requests, scale=self.scale or (1.0 if on_gpu else CPU_SCALE))

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its output together."""
        return 2 * max(1, round(1024 * (self.scale or 1.0)))

    def draw(self, llm: LLM, seed: int) -> Workload:
        from paged_infer.bench.workloads import nano_vllm_requests

        vocab_size = llm.engine.model_config.vocab_size
        return nano_vllm_requests(vocab_size, self.num_requests or 256, self.scale or 1.0, self.temperature, seed)

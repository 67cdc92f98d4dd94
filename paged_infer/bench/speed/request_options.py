"""The options that describe the requests of the speed benches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from paged_infer.bench.workloads import Workload
    from paged_infer.llm import LLM

CPU_REQUESTS, CPU_SCALE = 32, 0.125  # of the throughput workload, where there is no GPU

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


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of random prompts and outputs, each uniform in the range."""

    shortest: Annotated[int, typer.Option(help="Fewest tokens of a prompt, and of an output.", min=1)] = 16
    longest: Annotated[int, typer.Option(help="Most tokens of a prompt, and of an output.", min=1)] = 128

    def draw(self, llm: LLM, num_requests: int, seed: int) -> Workload:
        from paged_infer.bench.workloads import random_ids

        return random_ids(llm.engine.decoder.config.vocab_size, num_requests, self.shortest, self.longest, seed)


@dataclass(frozen=True, slots=True)
class NanoRequests:
    """Those of nano-vLLM's bench, or a share of them."""

    num_requests: Annotated[
        int | None,
        typer.Option(
            help=f"Default: 256 on a GPU, {CPU_REQUESTS} on a CPU; for optimisations half as many there.", min=1
        ),
    ] = None
    scale: Annotated[
        float | None,
        typer.Option(
            help="Of the lengths, 100..1024 tokens in and out. Default: 1 on a GPU; "
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

        vocab_size = llm.engine.decoder.config.vocab_size
        return nano_vllm_requests(vocab_size, self.num_requests or 256, self.scale or 1.0, self.temperature, seed)

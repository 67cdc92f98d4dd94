"""The options that the speed benches share, and how they open an engine and its peers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from paged_infer.bench.shapes import SHAPES, folder_of
from paged_infer.cli_options import Engine, Figures, Seed, open_llm
from paged_infer.config import EngineConfig, EngineOptions

if TYPE_CHECKING:
    from paged_infer.bench.metrics import System
    from paged_infer.llm import LLM

BenchModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help=f"Local folder, hub id, or with --load-format dummy a shape: {', '.join(SHAPES)}. "
        "Default: the storyteller. With dummy weights, --max-model-len is by default what the workload needs.",
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        help="Compared to the engine: generate, static, generate_batch (transformers), vllm, nano-vllm, "
        "mini-sglang, or none; may be repeated. Default: transformers' static and generate_batch.",
    ),
]
Repeats = Annotated[int, typer.Option(help="Interleaved runs; medians are reported.", min=1)]


@dataclass(frozen=True, slots=True)
class Common:
    """The model, the engine's options, and how the runs are repeated and saved."""

    model: BenchModel = None
    engine: Engine = field(default_factory=EngineConfig)
    repeats: Repeats = 3
    seed: Seed = 0
    figures: Figures = Path("figures")

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

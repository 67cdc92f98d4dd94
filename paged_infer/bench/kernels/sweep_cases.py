"""What a sweep tries: tiles and split rules, on batches and model shapes that an engine runs.

A case of attention or of a linear layer has a kernel, a title, a key, and its work; ``call_case`` and ``exact_output``
take either.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from paged_infer.bench.kernels.fused import Shape
from paged_infer.bench.kernels.linear_cases import MATRICES, LinearCase, LinearProblem
from paged_infer.bench.kernels.peers import Ready, Unavailable, our_flash, our_paged
from paged_infer.bench.kernels.problems import PagedProblem, paged_attention_float64, paged_problem
from paged_infer.kernels.attention.flash_tma import why_not_tma
from paged_infer.kernels.attention.tile_table import KERNELS, LINEAR_KERNELS, Key, SplitRule, Tile, forced

DTYPE = torch.bfloat16
LINEAR_TILES = (
    Tile(64, 64, 4, 4), Tile(64, 64, 4, 3), Tile(64, 64, 4, 6), Tile(64, 128, 4, 4), Tile(64, 128, 8, 3),
    Tile(128, 64, 4, 3), Tile(128, 128, 8, 3),
)  # fmt: skip
SHAPES = {"Llama-3-8B": Shape(), "Qwen3-0.6B": Shape(num_heads=16)}  # groups of 4 and 2 query heads, head_dim 128
SMALL_SHAPES = {"small": Shape(num_heads=4, num_kv_heads=2, head_dim=64)}

TILES = {
    "decode": (
        Tile(16, 32, 4, 6), Tile(16, 32, 2, 6), Tile(16, 32, 1, 6), Tile(16, 16, 1, 8), Tile(16, 16, 2, 8),
        Tile(16, 64, 4, 6), Tile(16, 64, 8, 6), Tile(16, 64, 4, 4),
    ),
    "flash": (
        Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 4), Tile(64, 64, 4, 3),
        Tile(64, 128, 4, 2), Tile(128, 128, 8, 2, use_tma=True), Tile(128, 64, 8, 4, use_tma=True),
        Tile(64, 64, 4, 3, use_tma=True),
    ),
    "prefill": (
        Tile(128, 64, 8, 2), Tile(128, 64, 8, 5), Tile(128, 64, 8, 6), Tile(64, 64, 4, 5), Tile(128, 32, 8, 6),
        Tile(128, 128, 8, 3),
    ),
    **dict.fromkeys(LINEAR_KERNELS, LINEAR_TILES),
}  # fmt: skip
SPLIT_RULES = tuple(SplitRule(per_processor=number) for number in (2, 4, 6, 8))
SMALL_SPLIT_RULES = tuple(SplitRule(2**20, 16, number) for number in (1, 3))  # the interpreter is one processor

# (tokens before, queries) of each row. Mixed: decodes of 100 to 2,047 tokens, longest first.
MIXED = tuple(sorted(((100 + 37 * row % 1948 - 1, 1) for row in range(200)), reverse=True))
DECODES = {"32 x 4k": ((4095, 1),) * 32, "1 x 32k": ((32_767, 1),), "8 x 4k": ((4095, 1),) * 8, "200 mixed": MIXED}
PROMPTS = {"4 x 4k": ((0, 4096),) * 4, "1 x 16k": ((0, 16_384),)}
LINEAR_TOKENS = (16, 2048)
SMALL_DECODES = {"mixed": ((70, 1), (0, 1), (18, 1))}
SMALL_PROMPTS = {"1 x 70": ((0, 70),)}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a kernel."""

    tile: Tile
    splits: SplitRule | None = None

    @property
    def label(self) -> str:
        block_m, block_n, num_warps, num_stages, use_tma = self.tile
        rule = "" if self.splits is None else f", splits {'/'.join(map(str, self.splits))}"
        return f"{block_m} x {block_n}, {num_warps} warps, {num_stages} stages{', TMA' if use_tma else ''}{rule}"


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel on one batch of a model's shape."""

    kernel: str  # one of KERNELS
    model: str
    batch: str
    shape: Shape
    sequences: tuple[tuple[int, int], ...]

    @property
    def title(self) -> str:
        return f"{self.kernel}, {self.model}, {self.batch}"

    @property
    def key(self) -> Key:
        """The key of its entry in a table."""
        group = self.shape.num_heads // self.shape.num_kv_heads
        return Key(self.kernel, str(DTYPE).removeprefix("torch."), self.shape.head_dim, group)

    @property
    def work(self) -> float:
        """Bytes of keys and values of a decode; floating-point operations of a prompt, which is causal."""
        lengths = [sum(sequence) for sequence in self.sequences]
        if self.kernel == "decode":
            return 2 * sum(lengths) * self.shape.num_kv_heads * self.shape.head_dim * DTYPE.itemsize
        return 4 * self.shape.num_heads * self.shape.head_dim * sum(n * n for n in lengths) / 2

    def problem(self, device: torch.device | str) -> PagedProblem:
        sizes = self.shape.heads | {"head_dim": self.shape.head_dim, "block_size": self.shape.block_size}
        return paged_problem(self.sequences, **sizes, dtype=DTYPE, device=device, poison=False)

    def call(self, problem: PagedProblem, candidate: Candidate | None = None) -> Ready:
        """With the candidate's tile, or (None) with the one that an engine would take."""
        if candidate is not None and candidate.tile.use_tma and (reason := why_not_tma(*problem.dense)):
            raise Unavailable(reason)
        return with_tile(self.kernel, (our_flash if self.kernel == "flash" else our_paged)(problem), candidate)


AnyCase = Case | LinearCase


def call_case(case: AnyCase, problem: PagedProblem | LinearProblem, candidate: Candidate | None = None) -> Ready:
    """``Case.call``, or a linear layer's."""
    if isinstance(problem, LinearProblem):
        return with_tile(case.kernel, problem.call(), candidate)
    assert isinstance(case, Case)
    return case.call(problem, candidate)


def exact_output(problem: PagedProblem | LinearProblem) -> Tensor:
    """In float64."""
    return problem.exact() if isinstance(problem, LinearProblem) else paged_attention_float64(problem)


def with_tile(kernel: str, ready: Ready, candidate: Candidate | None) -> Ready:
    if candidate is None:
        return ready

    def call() -> object:
        with forced(kernel, candidate.tile, candidate.splits):
            return ready.call()

    return Ready(call)


def candidates(kernel: str, rules: tuple[SplitRule, ...] = SPLIT_RULES) -> list[Candidate]:
    if kernel != "decode":
        return [Candidate(tile) for tile in TILES[kernel]]
    return [Candidate(tile, rule) for tile, rule in product(TILES[kernel], rules)]


def sweep_cases() -> list[AnyCase]:
    """The most useful first: decodes take most of an engine's time."""
    attention = [
        Case(kernel, model, batch, shape, sequences)
        for kernel in ("decode", "prefill", "flash")
        for model, shape in SHAPES.items()
        for batch, sequences in (DECODES if kernel == "decode" else PROMPTS).items()
    ]
    linear = [
        LinearCase(kernel, matrix, tokens, sizes)
        for tokens in LINEAR_TOKENS
        for kernel in LINEAR_KERNELS
        for matrix, sizes in MATRICES.items()
    ]
    return [*attention, *linear]


def small_cases() -> list[AnyCase]:
    """Each kernel once, for the interpreter."""
    attention = [
        Case(kernel, model, batch, shape, sequences)
        for kernel in KERNELS
        for model, shape in SMALL_SHAPES.items()
        for batch, sequences in (SMALL_DECODES if kernel == "decode" else SMALL_PROMPTS).items()
    ]
    return [*attention, *(LinearCase(kernel, "small", 5, (70, 256)) for kernel in LINEAR_KERNELS)]

"""Our kernels and their peers on this GPU: interleaved, graph-timed from a cold L2 cache, medians.

A prefill counts 4 * heads * head_dim * tokens * length / 2 operations (two products, half of them above the diagonal).
A linear layer counts 2 * rows * columns * tokens operations.
A decode counts the bytes of the keys and values that it must read, and nothing else: 2 * batch * context * kv_heads *
head_dim * 2. A fused kernel counts each number once, read and written. Sizes are Llama-3-8B's, numbers bfloat16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from paged_infer.bench.kernels.fused import FUSED, Function, Shape
from paged_infer.bench.kernels.linear_cases import GRIDS, MATRICES, LinearProblem, linear_problem
from paged_infer.bench.kernels.peers import DECODE, PREFILL, Ready, Unavailable, our_paged, packed
from paged_infer.bench.kernels.problems import PagedProblem, Tensors, paged_problem
from paged_infer.bench.kernels.report import LEFT_OUT, LONG_PREFILL, TARGET_DECODES, Entry, Measurement
from paged_infer.bench.timing import time_cuda_graph
from paged_infer.kernels.kv_quant import SCALE_BYTES, dequantise_kv

MODEL = Shape()
PREFILL_TOKENS = 16_384  # in every prefill: many short prompts, or one long one
LENGTHS = (1024, 2048, 4096, 8192, 16_384)
BATCHES = (32, 1, 8, 128)
CONTEXTS = (1024, 2048, 4096, 8192, 16_384, 32_768)
FUSED_TOKENS = (32, 2048)  # a batch of decodes, and a budget full of prompts
CODED_DECODES, CODED_KINDS = ((32, 4096), (1, 32_768), (8, 4096)), ("int8", "fp8")
LINEAR_TOKENS, LINEAR_GRIDS = (1, 16, 256, 2048), ("w4a16", "w8a16", "w8a8", "float8")

ROUNDS, REPEATS = 3, 7  # every kernel of a comparison has its turn in each round; 21 samples in all
LARGEST_DISTANCE = 0.02  # of a peer's output from ours, as |a - b| / |b|: bfloat16 gives 0.003
LARGEST_SHARE = 0.3  # of the device's free memory that a problem may take: a peer may want a copy of it


@dataclass(frozen=True, slots=True)
class Comparison:
    """A measurement that has not run yet. ``num_bytes``: what its tensors take on the device."""

    group: str
    title: str
    sizes: dict[str, int]
    work: float
    num_bytes: int
    problem: Callable[[], Any]  # makes the tensors
    peers: Mapping[str, Callable[[Any], Ready]]  # ours first

    def without(self, wrong: Collection[str]) -> Comparison:
        """The same, in which the kernels of these names have no time but the reason why not."""

        def refuse(problem: Any) -> Ready:
            raise Unavailable("differs from float64: see the checks")

        return replace(self, peers={name: refuse if name in wrong else peer for name, peer in self.peers.items()})

    def skipped(self, why: str) -> Measurement:
        entries = [Entry(name, None, why) for name in self.peers]
        return Measurement(self.group, self.title, self.sizes, self.work, entries, was_run=False)

    def run(self, deadline_s: float = math.inf, limit: str = "") -> Iterator[Measurement]:
        """Yield the measurement so far after each timing."""
        free, _ = torch.cuda.mem_get_info()
        if self.num_bytes > LARGEST_SHARE * free:
            yield self.skipped(f"needs {self.num_bytes / 2**30:.1f} GiB, the device has {free / 2**30:.1f} free")
            return
        problem = self.problem()
        for entries in compare({name: partial(peer, problem) for name, peer in self.peers.items()}, deadline_s, limit):
            yield Measurement(self.group, self.title, self.sizes, self.work, entries)


def run_comparisons(comparisons: list[Comparison], deadline_s: float, limit: str) -> Iterator[Measurement]:
    """Each in turn, a measurement after each of its timings; none begins after ``deadline_s`` (``perf_counter``)."""
    for comparison in comparisons:
        if time.perf_counter() > deadline_s:
            yield comparison.skipped(f"{LEFT_OUT}{limit} had passed")
        else:
            yield from comparison.run(deadline_s, limit)
            torch.cuda.empty_cache()


def attention_comparisons(device: torch.device) -> list[Comparison]:
    """Prefills and decodes; those with a target come first, in case the time runs out."""
    comparisons = [
        *(_decode_comparison(device, batch, context) for batch in BATCHES for context in CONTEXTS),
        *(_prefill_comparison(device, length, head_dim) for head_dim in (128, 64) for length in LENGTHS),
    ]
    return sorted(comparisons, key=_rank)


def _rank(comparison: Comparison) -> int:
    """Those with a target first, decodes before prefills; head_dim 64 last."""
    sizes = comparison.sizes
    if comparison.group == "decode":
        return 0 if (sizes["batch"], sizes["context"]) in TARGET_DECODES else 2
    if sizes["head_dim"] != 128:
        return 4
    return 1 if sizes["length"] >= LONG_PREFILL else 3


def fused_comparisons(device: torch.device) -> list[Comparison]:
    """Every kernel of ``FUSED`` that has ``elements``; sampling for decodes only, which is what samples many rows."""
    return [
        _fused_comparison(device, name, tokens)
        for tokens in FUSED_TOKENS
        for name, kernel in FUSED.items()
        if kernel.elements is not None and (name != "sample" or tokens == FUSED_TOKENS[0])
    ]


def coded_comparisons(device: torch.device) -> list[Comparison]:
    """Decodes over keys and values of 8 bits, each beside our own over the same numbers in bfloat16."""
    found = []
    for batch, context in CODED_DECODES:
        of_bfloat16 = _decode_comparison(device, batch, context)
        for kind in CODED_KINDS:
            found.append(
                replace(
                    of_bfloat16,
                    group="decode_8_bits",
                    title=f"decode over {kind}, batch {batch}, context {context:,}",
                    work=of_bfloat16.work * (MODEL.head_dim + SCALE_BYTES) / (2 * MODEL.head_dim),
                    num_bytes=3 * of_bfloat16.num_bytes,
                    problem=partial(_coded_problem, of_bfloat16.problem, kind),
                    peers={"paged_attention_8_bits": our_paged, "paged_attention": _of_numbers},
                )
            )
    return found


def _coded_problem(problem: Callable[[], PagedProblem], kind: str) -> PagedProblem:
    return problem().coded(kind)


def _of_numbers(problem: PagedProblem) -> Ready:
    """Over what the codes stand for, in q's dtype."""
    (k_scale, v_scale), dtype = (problem.k_scale, problem.v_scale), problem.q.dtype
    assert k_scale is not None and v_scale is not None
    k, v = dequantise_kv(problem.k_cache, k_scale, dtype), dequantise_kv(problem.v_cache, v_scale, dtype)
    return our_paged(replace(problem, k_cache=k, v_cache=v, k_scale=None, v_scale=None))


def linear_comparisons(device: torch.device) -> list[Comparison]:
    """Ways to hold W and x, each beside torch's product of the same numbers in bfloat16; few tokens first."""
    matrix = MATRICES["gate and up"]
    return [
        Comparison(
            group="linear",
            title=f"{name}, {matrix[0]:,} x {matrix[1]:,}, {tokens:,} tokens",
            sizes={"tokens": tokens},
            work=2 * matrix[0] * matrix[1] * tokens,
            num_bytes=16 * matrix[0] * matrix[1],  # random numbers in float32, from which the codes are made
            problem=partial(linear_problem, GRIDS[name], matrix, tokens, torch.bfloat16, device),
            peers={"quantised_linear": LinearProblem.call, "F.linear, bfloat16": LinearProblem.call_dense},
        )
        for tokens in LINEAR_TOKENS
        for name in LINEAR_GRIDS
    ]


def _prefill_comparison(device: torch.device, length: int, head_dim: int) -> Comparison:
    batch, shape = PREFILL_TOKENS // length, replace(MODEL, head_dim=head_dim)
    return Comparison(
        group="prefill",
        title=f"prefill, head_dim {head_dim}, {batch} x {length:,} tokens",
        sizes={"head_dim": head_dim, "length": length, "batch": batch},
        work=4 * shape.num_heads * head_dim * PREFILL_TOKENS * length / 2,
        num_bytes=4 * PREFILL_TOKENS * (shape.num_heads + shape.num_kv_heads) * head_dim * 2,
        problem=partial(_paged_problem, device, shape, [(0, length)] * batch),
        peers=PREFILL,
    )


def _decode_comparison(device: torch.device, batch: int, context: int) -> Comparison:
    kv_bytes = 2 * batch * context * MODEL.num_kv_heads * MODEL.head_dim * 2
    return Comparison(
        group="decode",
        title=f"decode, batch {batch}, context {context:,}",
        sizes={"batch": batch, "context": context},
        work=kv_bytes,
        num_bytes=kv_bytes,
        problem=partial(_paged_problem, device, MODEL, [(context - 1, 1)] * batch),
        peers=DECODE,
    )


def _paged_problem(device: torch.device, shape: Shape, sequences: list[tuple[int, int]]) -> PagedProblem:
    """Without NaN: peers compute masked keys and throw them away, and NaN is not thrown away."""
    sizes = shape.heads | {"head_dim": shape.head_dim, "block_size": shape.block_size}
    return paged_problem(sequences, **sizes, device=device, poison=False)


def _fused_comparison(device: torch.device, name: str, tokens: int) -> Comparison:
    kernel, shape = FUSED[name], replace(MODEL, tokens=tokens, rows=tokens)
    num_bytes = 2 * kernel.layers * kernel.elements(shape) * tokens  # type: ignore[misc]

    def peer(function: Function, shape: Shape) -> Ready:
        """The arguments are made again for each, with the same numbers: a store changes them."""
        tensors = Tensors(torch.bfloat16, device)
        layers = [kernel.arguments(shape, tensors) for _ in range(kernel.layers)]
        return Ready(partial(kernel.run, function, layers), can_be_captured=kernel.can_be_captured(function))

    peers = {contender: partial(peer, function) for contender, function in kernel.contenders.items()}
    title = f"{name}, {tokens:,} tokens" + (f", {kernel.layers} layers" if kernel.layers > 1 else "")
    return Comparison("fused", title, {"tokens": tokens}, num_bytes, num_bytes, lambda: shape, peers)


def run_comparison(setups: Mapping[str, Callable[[], Ready]]) -> list[Entry]:
    """The entries after the last timing of ``compare``."""
    *_, entries = compare(setups)
    return entries


def compare(
    setups: Mapping[str, Callable[[], Ready]], deadline_s: float = math.inf, limit: str = ""
) -> Iterator[list[Entry]]:
    """Set up, compare and time; all outputs are compared to the first. Yields all entries after each timing.

    A kernel that cannot run, fails, or gives other numbers is an entry without a time, with the reason. So is a kernel
    whose turn comes when ``time.perf_counter()`` is past ``deadline_s``, which ``limit`` describes.
    """
    ready: dict[str, Ready] = {}
    reasons: dict[str, str] = {}
    samples_s: dict[str, list[float]] = {}
    methods: dict[str, str] = {}
    expected: Tensor | None = None

    def entries() -> list[Entry]:
        return [
            Entry(name, None, reasons.get(name, "was not timed"))
            if name in reasons or name not in samples_s
            else Entry(name, median(samples_s[name]), ", ".join(filter(None, (methods[name], ready[name].note))))
            for name in setups
        ]

    for name, prepare in setups.items():
        if time.perf_counter() > deadline_s:
            reasons[name] = f"{LEFT_OUT}{limit} had passed"
            continue
        try:
            kernel = prepare()
            out = packed(kernel.call())
            if expected is None:
                expected = out
            elif not (distance := _distance(out, expected)) <= LARGEST_DISTANCE:
                raise Unavailable(f"gives other numbers than {next(iter(setups))}: {distance:.2g} apart")
            ready[name] = kernel
        except Exception as error:  # a peer may raise anything: it is in the report
            reasons[name] = _reason(error)
    del expected
    yield entries()
    for name, kernel in [*ready.items()] * ROUNDS:
        if name in reasons:
            continue
        if time.perf_counter() > deadline_s:
            if name not in samples_s:
                reasons[name] = f"{LEFT_OUT}{limit} had passed"
            continue
        try:
            timing = time_cuda_graph(kernel.call, can_be_captured=kernel.can_be_captured, repeats=REPEATS)
            # After a failed capture nothing is captured; samples without a graph are not mixed with those of a graph.
            if methods.setdefault(name, timing.method) == timing.method:
                samples_s.setdefault(name, []).extend(timing.samples_s)
        except Exception as error:
            reasons[name] = _reason(error)
        yield entries()
    yield entries()


def _distance(out: Tensor, expected: Tensor) -> float:
    if out.shape != expected.shape:
        raise Unavailable(f"gives {list(out.shape)}, not {list(expected.shape)}")
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def _reason(error: Exception) -> str:
    """One line; an Unavailable is its own reason."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return first if isinstance(error, Unavailable) else f"{type(error).__name__}: {first}"

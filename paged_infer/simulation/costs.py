"""What a step costs: one protocol, ``seconds(ScheduledStep)``, and the cost models that need no measurements.

    step  =  matrix products      max(weights read / bandwidth, 2 weights x tokens / peak)
          +  head                 the same, for the rows that are sampled
          +  attention            max(keys and values read / bandwidth, operations / peak), for each sequence
          +  all-reduces          2 per layer, between tensor-parallel cards
          +  overhead             what the host adds to each step

Each part is a roofline (Williams, Waterman & Patterson 2009). The parts follow each other; nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from paged_infer.control.step import ScheduledStep
from paged_infer.simulation.cards import Card, Link
from paged_infer.simulation.shapes import ModelShape
from paged_infer.suggestions import value_hint

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class CostModel(Protocol):
    def seconds(self, step: ScheduledStep) -> float:
        """How long the step takes, from its launch to its tokens."""
        ...


class StepParts(NamedTuple):
    """Seconds of each part of a step."""

    matrices: float
    head: float
    attention: float
    all_reduces: float
    overhead: float


def num_attended(num_before: int, num_queries: int, window: int | None) -> int:
    """Sum of the context lengths of consecutive queries, each query included, and each length at most ``window``.

    >>> num_attended(3, 2, None), num_attended(3, 2, 4)
    (9, 8)
    """
    first = num_before + 1
    if window is None or num_before + num_queries <= window:
        return num_queries * (2 * first + num_queries - 1) // 2
    growing = max(0, min(num_queries, window - num_before))
    return growing * (2 * first + growing - 1) // 2 + (num_queries - growing) * window


@dataclass(frozen=True)
class Roofline:
    """Step times from a card's data sheet and a model's shape, without any measurement.

    Args:
        dtype: of weights, activations and, unless ``kv_bytes`` is given, the cache: a key of ``DTYPE_BYTES``.
        share_of_bandwidth, share_of_peak: the shares of the sheet's rates that kernels reach; 0.9 and 0.8 are usual.
        step_overhead_s: host time per step that no computation hides.
        weight_bits: of the layers' weights; None: those of ``dtype``. Embedding and head keep ``dtype``.
        kv_bytes: bytes of an element in the cache (``ModelShape.kv_element_bytes``).
        is_8bit_math: whether products have 8-bit operands (W8A8), and so the card's rate for these.
        tensor_parallel: number of cards that share each layer; ``link`` connects them (None: the card's own).

    Raises:
        ValueError: a value is out of range, or the number of cards does not divide the heads.
    """

    card: Card
    shape: ModelShape
    dtype: str = "bfloat16"
    share_of_bandwidth: float = 0.9
    share_of_peak: float = 0.8
    step_overhead_s: float = 0.0
    weight_bits: float | None = None
    kv_bytes: float | None = None
    is_8bit_math: bool = False
    tensor_parallel: int = 1
    link: Link | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            allowed = ", ".join(DTYPE_BYTES) + value_hint(self.dtype, DTYPE_BYTES)
            raise ValueError(f"dtype={self.dtype!r}: must be one of {allowed}")
        for name in ("share_of_bandwidth", "share_of_peak"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be > 0 and <= 1")
        if not 0 <= self.step_overhead_s < float("inf"):
            raise ValueError(f"step_overhead_s={self.step_overhead_s}: must be a number >= 0")
        if self.tensor_parallel < 1 or self.shape.config.num_heads % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel}: must be a divisor of the model's "
                f"{self.shape.config.num_heads} attention heads"
            )

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight of a layer."""
        return self.dtype_bytes if self.weight_bits is None else self.weight_bits / 8

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes on each card. A card has whole key heads: with more cards than key heads, some are stored twice."""
        share = max(1 / self.tensor_parallel, 1 / self.shape.num_kv_heads)
        element_bytes = self.dtype_bytes if self.kv_bytes is None else self.kv_bytes
        return self.shape.config.num_layers * self.shape.kv_elements * element_bytes * share

    def parts(self, step: ScheduledStep) -> StepParts:
        shape, cards = self.shape, self.tensor_parallel
        bandwidth = self.card.bytes_per_s * self.share_of_bandwidth  # of one card
        peak = self.card.flops_per_s * self.share_of_peak
        products = self.card.flops_per_s_8bit * self.share_of_peak if self.is_8bit_math else peak
        num_tokens, num_rows = step.num_tokens, len(step.sampling)
        read = shape.layer_weights_read(num_tokens) * self.weight_bytes / cards
        computed = 2 * shape.layer_weights * num_tokens / cards
        head_read = shape.head_weights * self.dtype_bytes / cards * (num_rows > 0)
        head_computed = 2 * shape.head_weights * num_rows / cards
        return StepParts(
            matrices=max(read / bandwidth, computed / products),
            head=max(head_read / bandwidth, head_computed / peak),
            attention=self._attention_s(step, bandwidth, peak * cards),
            all_reduces=self._all_reduces_s(num_tokens),
            overhead=self.step_overhead_s,
        )

    def seconds(self, step: ScheduledStep) -> float:
        return sum(self.parts(step))

    def _attention_s(self, step: ScheduledStep, bandwidth: float, peak: float) -> float:
        seconds = 0.0
        for window, num_layers in self.shape.windows.items():
            per_key_s = self.kv_bytes_per_token * num_layers / self.shape.config.num_layers / bandwidth
            per_pair_s = self.shape.attention_flops * num_layers / peak
            for one in step.sequences:
                before, queries = one.num_computed_tokens, one.num_tokens
                keys = before + queries if window is None else min(before + queries, window + queries - 1)
                seconds += max(keys * per_key_s, num_attended(before, queries, window) * per_pair_s)
        return seconds

    def _all_reduces_s(self, num_tokens: int) -> float:
        """Ring all-reduces, after each attention and each MLP: each card sends 2 (n - 1) / n of the activations."""
        n = self.tensor_parallel
        if n == 1:
            return 0.0
        link = self.link or self.card.link
        num_bytes = num_tokens * self.shape.config.hidden_size * self.dtype_bytes * 2 * (n - 1) / n
        return 2 * self.shape.config.num_layers * (link.latency_s + num_bytes / link.bytes_per_s)


@dataclass(frozen=True, slots=True)
class LinearCost:
    """step = a + b tokens + c sequences: for lessons, and for tables of measured times."""

    per_step_s: float
    per_token_s: float = 0.0
    per_sequence_s: float = 0.0

    def seconds(self, step: ScheduledStep) -> float:
        return self.per_step_s + self.per_token_s * step.num_tokens + self.per_sequence_s * len(step.sequences)


class RecordedSteps:
    """The recorded times of an engine's steps, in order."""

    def __init__(self, seconds: Iterable[float]) -> None:
        self._seconds = iter(seconds)

    def seconds(self, step: ScheduledStep) -> float:
        """Raises ValueError for a step after the last one that was recorded."""
        for seconds in self._seconds:
            return seconds
        raise ValueError(f"step {step.index}: no more steps were recorded")

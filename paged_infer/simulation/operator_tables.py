"""Step times from operators that LLMServingSim measured and publishes (its ``profiler/perf``), three files per prefix.

    PREFIX-dense.csv         layer, tokens, time_us                           one layer's products, norms and so on
    PREFIX-per_sequence.csv  layer, sequences, time_us                        head and sampler
    PREFIX-attention.csv     prefill_chunk, kv_prefill, n_decode, kv_decode, time_us    one layer's attention

Between the measured sizes, times are interpolated; beyond them they grow in proportion, which is counted in
``extrapolated``. Attention of decodes takes, per token of context, the mean over the rows with at least 8 decodes;
attention of prompts takes the time of one chunk without decodes. Rows with both are not used: their times are about the
sum.
"""

from __future__ import annotations

import bisect
import csv
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from paged_infer.control.step import ScheduledStep

NORMS_PER_LAYER = 2  # the tables have the time of one
ONCE = ("embedding", "final_layernorm")  # all other rows of the first file are per layer
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class OperatorTable:
    """Seconds of a step, from the times of its operators in microseconds. ``read`` makes one from files.

    ``num_layers``: the measured model's. ``step_overhead_s``: host time per step, which the tables do not have.
    ``extrapolated``: how often which size was beyond the tables.
    """

    num_layers: int
    dense: dict[str, Curve]
    per_sequence: dict[str, Curve]
    decode_us: float  # one layer's attention, per token of context
    chunks: dict[int, Curve]  # size of the chunk -> time as a function of the tokens before it
    step_overhead_s: float = 0.0
    extrapolated: Counter[str] = field(default_factory=Counter, init=False)

    @classmethod
    def read(cls, prefix: str, num_layers: int = 32, step_overhead_s: float = 0.0) -> OperatorTable:
        """Read the tables. ``prefix``: a path with the beginning of the files' names.

        Raises:
            ValueError: a file is missing, lacks a column or has no rows; the message names it.
        """
        dense, per_sequence = _curves(prefix, "dense", "tokens"), _curves(prefix, "per_sequence", "sequences")
        decode: list[tuple[int, float]] = []
        chunks: dict[int, Curve] = defaultdict(list)
        columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
        for (chunk, kv_prefill, num_decodes, kv_decode), _, time_us in _rows(prefix, "attention", columns):
            if chunk == 0 and num_decodes >= 8 and kv_decode >= 256:
                decode.append((num_decodes * kv_decode, time_us))
            elif chunk > 0 and num_decodes == 0:
                chunks[chunk].append((kv_prefill, time_us))
        if not decode or not chunks:
            raise ValueError(f"{prefix}-attention.csv: has no rows with only decodes, or none with only a prompt")
        decode_us = sum(time_us for _, time_us in decode) / sum(tokens for tokens, _ in decode)
        ordered = {chunk: sorted(curve) for chunk, curve in sorted(chunks.items())}
        return cls(num_layers, dense, per_sequence, decode_us, ordered, step_overhead_s)

    def seconds(self, step: ScheduledStep) -> float:
        num_tokens, num_sequences = step.num_tokens, len(step.sequences)
        microseconds = 0.0
        for layer, curve in self.dense.items():
            times = 1 if layer in ONCE else self.num_layers * (NORMS_PER_LAYER if layer == "layernorm" else 1)
            microseconds += times * self._at(curve, num_tokens, "tokens of a step")
        for curve in self.per_sequence.values():
            microseconds += self._at(curve, num_sequences, "sequences of a step")
        for one in step.sequences:
            if one.num_tokens == 1:
                attention_us = (one.num_computed_tokens + 1) * self.decode_us
            else:
                attention_us = self._chunk_us(one.num_tokens, one.num_computed_tokens)
            microseconds += self.num_layers * attention_us
        return 1e-6 * microseconds + self.step_overhead_s

    def _chunk_us(self, num_tokens: int, num_before: int) -> float:
        """Time of a chunk of ``num_tokens`` after ``num_before`` earlier ones, interpolated between measured chunks."""
        sizes = list(self.chunks)
        index = min(bisect.bisect_left(sizes, num_tokens), len(sizes) - 1)
        upper = sizes[index]
        time_us = self._at(self.chunks[upper], num_before, "tokens before a chunk")
        if num_tokens > upper:
            self.extrapolated["tokens of a chunk"] += 1
        if num_tokens >= upper or index == 0:
            return time_us * num_tokens / upper
        lower = sizes[index - 1]
        lower_us = self._at(self.chunks[lower], num_before, "tokens before a chunk")
        return lower_us + (time_us - lower_us) * (num_tokens - lower) / (upper - lower)

    def _at(self, curve: Curve, x: int, what: str) -> float:
        index = bisect.bisect_left(curve, (x, 0.0))
        if index == len(curve):
            last, time_us = curve[-1]
            self.extrapolated[what] += 1
            return time_us * x / last
        if index == 0:
            return curve[0][1]
        (a, a_us), (b, b_us) = curve[index - 1], curve[index]
        return a_us + (b_us - a_us) * (x - a) / (b - a)


def _rows(prefix: str, kind: str, sizes: tuple[str, ...]) -> Iterator[tuple[tuple[int, ...], str, float]]:
    """(sizes, layer, time_us) of each row."""
    path = Path(f"{prefix}-{kind}.csv")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                time_us = float(row["time_us"])
                if not 0 <= time_us < float("inf"):
                    raise ValueError(f"time_us={time_us}")
                yield tuple(int(row[name]) for name in sizes), row.get("layer", ""), time_us
    except OSError as error:
        raise ValueError(f"operator tables {prefix}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: must have the columns {', '.join(sizes)}, time_us of numbers: {error!r}") from None


def _curves(prefix: str, kind: str, size: str) -> dict[str, Curve]:
    curves: dict[str, Curve] = defaultdict(list)
    for (x,), layer, time_us in _rows(prefix, kind, (size,)):
        curves[layer].append((x, time_us))
    if not curves:
        raise ValueError(f"{prefix}-{kind}.csv: has no rows")
    return {layer: sorted(curve) for layer, curve in curves.items()}

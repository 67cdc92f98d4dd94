"""Which part of each tensor a rank holds: one column of the checkpoint layout, and the ranges to read that follow.

    rows       q k v, gate up, W_UV ...    a rank's own heads or columns of the MLP; the vocabulary
    columns    output, down                those that multiply the results of its rows
    rank 0     biases of these             added once, before the sum: other ranks hold zeros
    none       norms, routers, latents     every rank holds the whole tensor

The rows of a tensor form equal units (a head's rows, or single rows) of one matrix, or of several stacked ones (Phi-3's
q, k and v). If a matrix has fewer units than there are ranks, such as keys of few heads, several ranks hold the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """How ranks divide a tensor of the checkpoint.

    Attributes:
        along: the dimension that is divided; "rank 0": none, and the other ranks hold zeros.
        units: for rows: how many units each of the stacked matrices has. All units have the same number of rows.
    """

    along: Literal["rows", "columns", "rank 0"]
    units: tuple[int, ...] = ()

    def rows(self, count: int, rank: int, size: int) -> list[range]:
        """A rank's rows of a tensor with ``count`` rows, matrix by matrix."""
        unit, first, found = count // sum(self.units), 0, list[range]()
        for units in self.units:
            own = units_of_rank(units, rank, size)
            found.append(range((first + own.start) * unit, (first + own.stop) * unit))
            first += units
        return found


def by_rows(*units: int) -> Shard:
    return Shard("rows", units)


COLUMNS = Shard("columns")
RANK_0 = Shard("rank 0")


def units_of_rank(count: int, rank: int, size: int) -> range:
    """The units of one rank. If ``size`` does not divide ``count``, the last ranks have fewer, or none. If it is
    larger, each rank has one, and several ranks have the same.

    >>> [list(units_of_rank(2, rank, 4)) for rank in range(4)], [len(units_of_rank(5, rank, 3)) for rank in range(3)]
    ([[0], [0], [1], [1]], [2, 2, 1])
    """
    if count < size:
        first = rank * count // size
        return range(first, first + 1)
    share = -(-count // size)
    return range(min(rank * share, count), min((rank + 1) * share, count))


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a stored tensor that a rank reads.

    Attributes:
        shape: the whole tensor's.
        ranges: of each dimension, one after the other; their total is the part's shape.
        size: the number of ranks, for messages.
    """

    shape: tuple[int, ...]
    ranges: tuple[tuple[range, ...], ...]
    size: int

    @classmethod
    def along(cls, shape: tuple[int, ...], dim: int, ranges: Sequence[range], size: int) -> Cut:
        """Ranges of one dimension; the others are whole."""
        return cls(shape, tuple(tuple(ranges) if i == dim else (range(n),) for i, n in enumerate(shape)), size)

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of what is read."""
        return tuple(sum(map(len, ranges)) for ranges in self.ranges)

    def take(self, stored: Any) -> Tensor:
        """The part of a tensor, or of anything that returns tensors for slices, such as a tensor on disk."""

        def of(first: tuple[slice, ...], rest: tuple[tuple[range, ...], ...]) -> Tensor:
            if not rest:
                return stored[first]
            parts = [of((*first, slice(one.start, one.stop)), rest[1:]) for one in rest[0]]
            return parts[0] if len(parts) == 1 else torch.cat(parts, len(first))

        return of((), self.ranges)


def refusal(name: str, cut: Cut, length: int, step: int, axis: str) -> str:
    """Why a rank cannot read its part of a tensor whose rows or columns (``axis``) are stored in groups of ``step``."""
    fitting = ", ".join(str(n) for n in range(1, 65) if length % n == 0 and length // n % step == 0)
    would = f"of its {length} {axis}, {fitting} ranks would" if fitting else "no number of ranks would"
    return f"tensor_parallel_size={cut.size}: does not divide {name}, stored by groups of {step} {axis}; {would}"


def runs(numbers: Sequence[int]) -> list[range]:
    """Ascending numbers as ranges.

    >>> runs([2, 3, 4, 8, 9])
    [range(2, 5), range(8, 10)]
    """
    found = list[range]()
    for number in numbers:
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found

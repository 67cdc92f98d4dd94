"""The checkpoint's tensors of one quantised matrix, and a rank's part of each.

The part follows from the rank's part of the matrix, because each index of such a tensor stands for some rows or columns
of the matrix: a word for eight columns, a scale for a group of columns. If the part would begin or end within one of
these, loading is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal, NamedTuple

from torch import Tensor

from paged_infer.model.linear import Piece
from paged_infer.model.shard import Cut, refusal

_NO_PIECE = Piece("", ())


class Along(NamedTuple):
    """A dimension along the rows or columns of the matrix; each index stands for ``step`` of them."""

    axis: Literal["rows", "columns"]
    step: int | Fraction = 1


ROWS, COLUMNS = Along("rows"), Along("columns")
Dims = tuple[Along | int, ...]  # int: a dimension of this length on every rank


@dataclass(frozen=True, slots=True)
class StoredPiece(Piece):
    """A tensor of a quantised matrix.

    Attributes:
        source: the matrix, or the rank's part of it, as a dense checkpoint would store it.
        rows: how many rows of the parameter the tensor fills.
    """

    source: Piece = _NO_PIECE
    rows: int = 0

    @property
    def num_rows(self) -> int:
        return self.rows


def stored_piece(name: str, dims: Dims, source: Piece, *, is_float: bool, rows: int | None = None) -> StoredPiece:
    """The tensor ``name`` of the matrix ``source``, with the shape given by ``dims``.

    Args:
        rows: how many rows of the parameter it fills; None: as many as the matrix has.

    Raises:
        ValueError: the rank's part begins or ends within the rows or columns that one index stands for.
    """
    rows = source.num_rows if rows is None else rows
    shape = tuple(_length(dim, source, source.stored_shape) for dim in dims)
    cut = None
    if source.cut is not None:
        cut = Cut(shape, tuple(_ranges(dim, name, source, source.cut) for dim in dims), source.cut.size)
        shape, cut = cut.part, None if cut.part == shape else cut
    return StoredPiece(name, shape, is_float=is_float, source=source, rows=rows, cut=cut)


def whole_sizes(piece: Piece) -> tuple[int, int]:
    """N and K of the whole matrix, if the piece is a rank's part of it; for a stack, those of each matrix."""
    return piece.stored_shape[piece.row_dim], piece.stored_shape[piece.column_dim]


def own_groups(g_idx: Tensor, piece: Piece, group: int) -> Tensor:
    """``g_idx`` [K] of the rank's columns, renumbered so that the rank's first group is 0.

    Raises:
        ValueError: columns of the rank belong to groups that other ranks have columns of, too.
    """
    if piece.cut is None or piece.shape[piece.column_dim] == whole_sizes(piece)[1]:
        return g_idx
    columns = piece.shape[piece.column_dim]
    own = g_idx - piece.cut.ranges[piece.column_dim][0].start // group
    if bool(((own < 0) | (own >= columns // group)).any()):
        raise ValueError(
            f"tensor_parallel_size={piece.cut.size}: the columns of {piece.name} are in groups in arbitrary order "
            "(desc_act, actorder), which ranks cannot divide; it must be 1"
        )
    return own


def _dim_of(dim: Along, source: Piece) -> int:
    return source.row_dim if dim.axis == "rows" else source.column_dim


def _length(dim: Along | int, source: Piece, shape: tuple[int, ...]) -> int:
    return dim if isinstance(dim, int) else ceil(shape[_dim_of(dim, source)] / dim.step)


def _ranges(dim: Along | int, name: str, source: Piece, cut: Cut) -> tuple[range, ...]:
    if isinstance(dim, int):
        return (range(dim),)
    length, step = cut.shape[_dim_of(dim, source)], Fraction(dim.step)
    found = list[range]()
    for own in cut.ranges[_dim_of(dim, source)]:
        first, last = own.start / step, own.stop / step
        if first.denominator > 1 or (last.denominator > 1 and own.stop != length):
            raise ValueError(refusal(name, cut, length, step.numerator, dim.axis))
        found.append(range(int(first), ceil(last)))
    return tuple(found)

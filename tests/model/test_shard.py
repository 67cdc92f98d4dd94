"""The part of a tensor that a rank holds: parts of all ranks make up the tensor, and rows keep their order."""

from __future__ import annotations

import pytest
import torch

from paged_infer.model.linear import Piece
from paged_infer.model.shard import COLUMNS, RANK_0, Cut, by_rows, units_of_rank


@pytest.mark.parametrize(("count", "size"), [(8, 2), (7, 3), (2, 8), (1003, 4), (1, 2)])
def test_units_are_all_held_by_ranks_in_order(count, size) -> None:
    ranks = [units_of_rank(count, rank, size) for rank in range(size)]
    held = [unit for own in ranks for unit in own]
    assert held == sorted(held) and set(held) == {*range(count)}
    if count < size:
        assert all(len(own) == 1 for own in ranks) and {held.count(unit) for unit in held} == {size // count}
    else:
        assert len(held) == count


def test_a_cut_takes_its_ranges_of_every_dimension() -> None:
    stored = torch.arange(60).view(3, 4, 5)
    cut = Cut((3, 4, 5), ((range(3),), (range(1, 2), range(3, 4)), (range(2, 5),)), 2)
    assert torch.equal(cut.take(stored), stored[:, [1, 3], 2:])
    assert cut.part == (3, 2, 3)


def load(piece: Piece, stored: torch.Tensor) -> torch.Tensor:
    """The rows of our parameter."""
    tensor = stored if piece.cut is None else piece.cut.take(stored)
    assert tensor.shape == piece.shape
    if piece.order is not None:
        tensor = tensor.index_select(piece.row_dim, torch.tensor(piece.order))
    return piece.to_rows(tensor)


HEADS_IN_ORDER = (2, 0, 3, 1, 6, 4, 7, 5, 10, 8, 11, 9, 14, 12, 15, 13)  # of four heads of four rows
PIECES = {
    "rows": Piece("", (16, 6), shard=by_rows(4)),
    "rows in another order": Piece("", (16, 6), order=HEADS_IN_ORDER, shard=by_rows(4)),
    "two matrices": Piece("", (16, 6), order=HEADS_IN_ORDER, shard=by_rows(2, 2)),
    "a bias": Piece("", (16,), shard=by_rows(16)),
    "transposed": Piece("", (6, 16), row_dim=1, shard=by_rows(4)),
    "experts": Piece("", (3, 6, 16), row_dim=2, order=HEADS_IN_ORDER, is_stack=True, shard=by_rows(8, 8)),
}


@pytest.mark.parametrize("kind", PIECES)
def test_a_ranks_rows_are_its_share_of_each_matrix(kind) -> None:
    piece = PIECES[kind]
    stored = torch.randn(piece.shape)
    whole = load(piece, stored)
    matrices = whole.unflatten(0, (3 if piece.is_stack else 1, len(piece.shard.units), -1))  # [experts, matrices, rows]
    for rank in range(2):
        own = load(piece.of_rank(rank, 2), stored)
        assert torch.equal(own, matrices.chunk(2, 2)[rank].flatten(0, 2))


@pytest.mark.parametrize("piece", [Piece("", (5, 8)), Piece("", (8, 5), row_dim=1)])
def test_a_ranks_columns_are_neighbours(piece) -> None:
    piece = Piece(piece.name, piece.shape, piece.row_dim, shard=COLUMNS)
    stored = torch.randn(piece.shape)
    parts = [load(piece.of_rank(rank, 4), stored) for rank in range(4)]
    assert torch.equal(torch.cat(parts, 1), load(piece, stored))


def test_what_is_added_once_is_zero_on_all_ranks_but_the_first() -> None:
    piece = Piece("", (8,), shard=RANK_0)
    assert [piece.of_rank(rank, 3).is_zero for rank in range(3)] == [False, True, True]
    assert Piece("", (8,)).of_rank(1, 3) == Piece("", (8,))

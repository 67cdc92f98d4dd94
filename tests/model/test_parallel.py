"""Collectives: the sum and the list of what ranks hold, with the same bits on each, counted; here over real gloo."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from paged_infer.model.parallel import ALONE, Collective, TorchCollective, Traffic, add_in_order

T = TypeVar("T")


def on_ranks(size: int, work: Callable[[TorchCollective], T]) -> list[T]:
    """``work`` on each rank of a gloo group, every rank in a thread of this process."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        group: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        return work(TorchCollective(group))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


def of_rank(rank: int, rows: int) -> Tensor:
    return torch.randn(8, 37, generator=torch.Generator().manual_seed(rank))[:rows]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_get_the_sum_and_all_parts_in_order(size: int) -> None:
    def work(ranks: TorchCollective) -> tuple[Tensor, Tensor]:
        return ranks.all_reduce(of_rank(ranks.rank, 8)), ranks.all_gather(of_rank(ranks.rank, 8))

    parts = torch.stack([of_rank(rank, 8) for rank in range(size)])
    for total, gathered in on_ranks(size, work):
        assert torch.equal(total, add_in_order(parts))
        assert torch.equal(gathered, parts)


def test_the_bits_of_a_sum_depend_on_no_other_row() -> None:
    def work(ranks: TorchCollective) -> list[Tensor]:
        return [ranks.all_reduce(of_rank(ranks.rank, rows).clone())[:1] for rows in (1, 2, 7, 8)]

    for alone, *in_company in on_ranks(5, work):
        assert all(torch.equal(alone, other) for other in in_company)


def test_a_view_that_is_not_contiguous_is_taken() -> None:
    def work(ranks: TorchCollective) -> tuple[Tensor, Tensor]:
        x = of_rank(ranks.rank, 8).t()
        return ranks.all_gather(x), ranks.all_reduce(x)

    parts = torch.stack([of_rank(rank, 8).t() for rank in range(2)])
    for gathered, total in on_ranks(2, work):
        assert torch.equal(gathered, parts)
        assert torch.equal(total, parts.sum(0))


def test_calls_and_bytes_are_counted_until_they_are_reset() -> None:
    def work(ranks: TorchCollective) -> tuple[Traffic, int]:
        ranks.all_reduce(torch.ones(3, 5))
        ranks.all_gather(torch.ones(2, dtype=torch.bfloat16))
        ranks.all_reduce(torch.ones(1))
        counted = Traffic(ranks.traffic.all_reduces, ranks.traffic.all_gathers, ranks.traffic.num_bytes)
        ranks.traffic.reset()
        return counted, ranks.traffic.calls

    assert on_ranks(2, work) == [(Traffic(2, 1, 60 + 4 + 4), 0)] * 2


def test_alone_nothing_is_moved_or_counted() -> None:
    x, ranks = torch.ones(2, 3), ALONE
    as_protocol: Collective = ranks
    assert as_protocol.all_reduce(x) is x
    assert ranks.all_gather(x).shape == (1, 2, 3)
    assert ranks.all_gather(x).data_ptr() == x.data_ptr()
    assert (ranks.rank, ranks.size, ranks.traffic.calls, ranks.traffic.num_bytes) == (0, 1, 0, 0)

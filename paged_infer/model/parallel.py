"""Tensor parallelism: N ranks, each with a part of every matrix, and the collectives in which they meet.

    y = x W^T, z = y V^T      rank r holds rows of W and the same columns of V (Megatron-LM, Shoeybi 2019, section 3):
                              its y is complete for its rows, and z is the sum over ranks of its products

So attention and MLP take one sum each, two ``all_reduce`` a layer, wherever a matrix of columns (the output projection,
``down``) follows matrices of rows (queries, keys, values; gate, up). The vocabulary is cut into rows: one more sum for
the embedding, one ``all_gather`` for the logits.

All ranks call the same collectives in the same order, with tensors of the same shape, dtype and device, and get the
same bits. A decoder takes a ``Collective`` and does not branch on its size: ``ALONE`` returns what it is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class Traffic:
    """What one rank has handed to collectives since it was last reset. Steps that a CUDA graph replays do not count.

    Attributes:
        all_reduces, all_gathers: calls.
        num_bytes: of the tensors given, each once. What a link carries is more, by the algorithm.
    """

    all_reduces: int = 0
    all_gathers: int = 0
    num_bytes: int = 0

    @property
    def calls(self) -> int:
        return self.all_reduces + self.all_gathers

    def reset(self) -> None:
        self.all_reduces = self.all_gathers = self.num_bytes = 0


class Collective(Protocol):
    """One rank's place among ``size`` ranks, and what it computes together with them."""

    rank: int  # 0 .. size - 1
    size: int
    traffic: Traffic

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks of x, of any shape. x may be overwritten: use what is returned."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """x of every rank, in order: [size, *x.shape]. The result may share memory with x."""
        ...


class Alone:
    """The only rank. Nothing is computed, moved or counted."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.traffic = Traffic()

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]


ALONE = Alone()


class TorchCollective:
    """Over a group of ``torch.distributed``: gloo for tensors on a CPU, NCCL on CUDA.

    With NCCL neither call makes the host wait, so a CUDA graph can hold both. With gloo the host waits.

    A ring adds in an order that depends on an element's place in the tensor, so that the bits of a row would depend on
    how many rows there are. Two numbers have one sum. More ranks therefore gather and add in the order of ranks, which
    moves N - 1 times x to each rank instead of 2 (N - 1) / N times.

    Args:
        group: of all ranks, initialised; its errors and timeouts are raised by the calls.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.traffic = Traffic()

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self.traffic.all_reduces += 1
        self.traffic.num_bytes += x.nbytes
        if self.size > 2:
            return add_in_order(self._gather(x))
        dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self.traffic.all_gathers += 1
        self.traffic.num_bytes += x.nbytes
        return self._gather(x)

    def _gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty(self.size, *x.shape)
        dist.all_gather([*gathered], x, group=self.group)
        return gathered


def add_in_order(parts: Tensor) -> Tensor:
    """[N, ...] -> the sum over N, ((x_0 + x_1) + x_2) + ..., so that its bits depend on nothing else."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total

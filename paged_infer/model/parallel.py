"""Tensor parallelism: N ranks, each with a part of every matrix, and the collectives that connect them.

    y = x W^T, z = y V^T      rank r holds rows of W and the same columns of V (Megatron-LM, Shoeybi 2019, section 3):
                              its y is complete for its rows, and z is the sum over ranks of its products

So attention and MLP take one sum each, two ``all_reduce`` per layer: after each matrix cut by columns (the output
projection, ``down``), which follows matrices cut by rows (queries, keys, values; gate, up). The vocabulary is cut by
rows: one more sum for the embedding, and one ``all_gather`` for the logits.

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
        num_bytes: bytes of the tensors passed in, each counted once. A link carries more, depending on the algorithm.
    """

    all_reduces: int = 0
    all_gathers: int = 0
    num_bytes: int = 0

    @property
    def calls(self) -> int:
        return self.all_reduces + self.all_gathers

    def stats(self) -> dict[str, int]:
        """As ``LLMEngine.stats`` names them."""
        counts = {"all_reduces": self.all_reduces, "all_gathers": self.all_gathers}
        return {**counts, "collective_bytes": self.num_bytes}

    def reset(self) -> None:
        self.all_reduces = self.all_gathers = self.num_bytes = 0


class Collective(Protocol):
    """One rank of ``size``, and what it computes together with the others."""

    rank: int  # 0 .. size - 1
    size: int
    traffic: Traffic

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks of x, of any shape. x may be overwritten: use the result."""
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
    """Collectives of a ``torch.distributed`` group: gloo for tensors on a CPU, NCCL on CUDA.

    With NCCL neither call makes the host wait, so a CUDA graph can capture both. With gloo the host waits.

    A ring adds in an order that depends on an element's position in the tensor, so the bits of a row would depend on
    how many rows there are. For two ranks the order makes no difference. More ranks therefore gather, and add in the
    order of ranks, which moves N - 1 times x to each rank instead of 2 (N - 1) / N times.

    Args:
        group: the initialised group of all ranks. The calls raise its errors and timeouts.
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

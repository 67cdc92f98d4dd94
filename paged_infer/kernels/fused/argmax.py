"""The greedy draw. On a GPU it is part of ``kernels.sample``; for a CPU ``kernels.c`` looks at 64 logits at a time.

Torch keeps a place beside every maximum while it looks, and takes 4 ms for 32 rows of 151,936 logits. Who asks for the
place only when the maximum is known takes 0.6 ms (one thread, on the machine of the README).
"""

from __future__ import annotations

from torch import Tensor


def argmax_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row and its place, of equals the first: [R, V] -> values [R], int64 places [R].

    NaN is larger than all: a row that has one cannot be drawn from, and its value says so.
    """
    values, places = logits.max(dim=1)
    return values, places

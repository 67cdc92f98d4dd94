"""Why keys and values are stored by a kernel: the calls that it saves, counted.

A decode step writes one token's keys and values for every row, in every layer: thousands of bytes here and there, so
what it costs is calls, not bandwidth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paged_infer.bench.kernels.fused import FUSED, Shape
from paged_infer.bench.kernels.problems import Tensors
from paged_infer.bench.kernels.report import LaunchCount
from paged_infer.kernels.triton_runtime import launches_go_to

SHAPE = Shape()
STEP = f"{SHAPE.tokens} rows, {FUSED['store_kv'].layers} layers"


def count_store_calls() -> list[LaunchCount]:
    """What storing one decode step of all layers costs: launches of the kernel, which is not run, or ATen operations
    that torch runs instead, on a CPU; views of a tensor, which do nothing on a device, are left out.
    """
    kernel, tensors = FUSED["store_kv"], Tensors(torch.bfloat16, "cpu")
    layers = [kernel.arguments(SHAPE, tensors) for _ in range(kernel.layers)]
    grids: list[tuple[int, ...]] = []
    with launches_go_to(lambda kernel, grid, args, named: grids.append(grid), (9, 0)):
        kernel.run(kernel.function, layers)
    counts = [LaunchCount("store_kv", None, len(grids))]
    for name, function in (kernel.peers or {}).items():
        with _CountOperations() as mode:
            kernel.run(function, layers)
        counts.append(LaunchCount(name, mode.count, None))
    return counts


class _CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))

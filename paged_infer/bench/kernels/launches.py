"""Why keys and values are stored by a kernel: the calls that it saves, counted.

A decode step writes one token's keys and values for every row, in every layer: thousands of bytes here and there, so
what it costs is calls, not bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from paged_infer.bench.kernels.fused import FUSED, Shape
from paged_infer.bench.kernels.problems import Tensors
from paged_infer.bench.kernels.report import LaunchCount
from paged_infer.kernels.triton_runtime import launches_go_to

SHAPE = Shape()


def count_store_calls(device: torch.device) -> list[LaunchCount]:
    """What the stores of one decode step of all layers cost, counted while they run: ATen operations, and on CUDA what
    torch's profiler sees on the device. On a CPU a kernel's launches are counted where they are made.
    """
    kernel, tensors = FUSED["store_kv"], Tensors(torch.bfloat16, device)
    layers = [kernel.arguments(SHAPE, tensors) for _ in range(kernel.layers)]
    counts = []
    for name, function in kernel.contenders.items():
        is_ours, call = name == "store_kv", partial(kernel.run, function, layers)
        launches = _profiled_launches(call) if device.type == "cuda" else _kernel_launches(call) if is_ours else None
        counts.append(LaunchCount(name, None if is_ours else _operations(call), launches))
    return counts


def _operations(call: Callable[[], object]) -> int:
    """ATen operations that ``call`` makes; views of a tensor, which do nothing on a device, are left out."""
    with _CountOperations() as mode:
        call()
    return mode.count


class _CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _kernel_launches(call: Callable[[], object]) -> int:
    """Triton launches of ``call``, none of which is run."""
    grids = []
    with launches_go_to(lambda kernel, grid, args, named: grids.append(grid), (9, 0)):
        call()
    return len(grids)


def _profiled_launches(call: Callable[[], object]) -> int:
    """Kernels and copies that the device runs for ``call``."""
    call()  # compiled, and set up, before it is counted
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in seen.events() or [])

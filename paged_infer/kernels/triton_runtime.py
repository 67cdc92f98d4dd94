"""Triton on every machine: kernels are compiled for a GPU and interpreted on a CPU, without a flag to set.

Kernel files import ``triton``, ``tl`` and ``launch`` from here. Without a CUDA device, ``TRITON_INTERPRET=1`` is set
before triton is first imported (a value that is set already is kept), and kernels run tile by tile in numpy: slowly,
but with the same rounding. Where triton is not installed (macOS, Windows), the files still import, and a launch fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


class _Absent:
    """Replaces triton where it is not installed: decorators return the function, everything else raises."""

    @staticmethod
    def jit(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        return function if function is not None else lambda decorated: decorated

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("triton is not installed: use attention_backend='torch' or 'sdpa'")


try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = _Absent(), _Absent()

HAS_TRITON = not isinstance(triton, _Absent)
# Whether kernels are interpreted in this process. This is fixed when triton is imported, and its library with it.
INTERPRETED = HAS_TRITON and type(tl.cdiv).__name__ == "InterpretedFunction"

# triton 3.6 converts an array of one number to an int, which numpy 2.4 refuses: a loop up to a loaded length fails.
_INTERPRETER_FAILS = (
    INTERPRETED and triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
)

# (kernel, grid, positional arguments, keyword arguments) -> None, called instead of a launch; see ``launches_go_to``.
LaunchHook = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_hook: LaunchHook | None = None
_hook_capability: tuple[int, int] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, enable_fp_fusion: bool = True, **named: Any
) -> None:
    """Run ``kernel`` once for each program of ``grid``, on the device of the first argument, a tensor.

    Raises:
        RuntimeError: this process cannot run Triton kernels on that device; the message gives the reason.
    """
    if 0 in grid:
        return
    named |= {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}  # triton 3.10 would turn fusion off
    if _hook is not None:
        _hook(kernel, grid, args, named)
        return
    device = args[0].device
    if device.type == "cpu" and not can_run_on(device):
        raise RuntimeError(_no_interpreter_reason())
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **named)
    else:
        kernel[grid](*args, **named)


def _no_interpreter_reason() -> str:
    if _INTERPRETER_FAILS:
        return (
            f"the interpreter of triton {triton.__version__} does not work with numpy {np.__version__}: install "
            "triton 3.7 or newer, or numpy older than 2.4"
        )
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
        return "triton kernels on CPU tensors need its interpreter: start Python with TRITON_INTERPRET=1"
    return "triton was imported before paged_infer.kernels: import paged_infer first, or set TRITON_INTERPRET=1"


def can_run_on(device: torch.device) -> bool:
    """Whether ``launch`` works there: compiled on CUDA, interpreted on CPU."""
    if device.type == "cpu":
        return HAS_TRITON and INTERPRETED and not _INTERPRETER_FAILS
    return HAS_TRITON and device.type == "cuda" and not INTERPRETED


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability (major, minor), which determines the tile sizes; (0, 0) for the interpreter."""
    if _hook_capability is not None:
        return _hook_capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def num_processors(device: torch.device) -> int:
    """Number of streaming multiprocessors; 1 in the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if _hook is None else 132  # an H100's, when compiling ahead of time


def must_widen(x: Tensor) -> bool:
    """Whether kernels must cast to float32 right after a load: the interpreter's bfloat16 arithmetic is wrong."""
    return INTERPRETED and x.dtype == torch.bfloat16


@contextmanager
def launches_go_to(hook: LaunchHook, gpu_capability: tuple[int, int]) -> Iterator[None]:
    """Call ``hook`` instead of launching, with tile sizes for ``gpu_capability``; tensors may be on "meta"."""
    global _hook, _hook_capability
    _hook, _hook_capability = hook, gpu_capability
    try:
        yield
    finally:
        _hook, _hook_capability = None, None

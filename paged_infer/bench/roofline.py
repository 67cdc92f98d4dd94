"""The best rates of the machine, measured: every kernel and every step is compared to them.

A step that reads B bytes and computes F operations takes at least max(B / bandwidth, F / matmul rate) (Williams,
Waterman & Patterson 2009). Decoding is bound by bandwidth, long prompts by computing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paged_infer.bench.report import JsonReport
from paged_infer.bench.timing import time_on

# Bytes of one buffer, and n of an n x n matmul. A buffer must be many times the last cache (an H100's L2 is 50 MiB, a
# server's L3 32 MiB and more), or the cache is measured. On the CPU all of it should take a second or two.
CUDA_BUFFER_BYTES, CUDA_MATMUL_SIZE, CUDA_REPEATS = 2**30, 8192, 20
CPU_BUFFER_BYTES, CPU_MATMUL_SIZE, CPU_REPEATS = 2**28, 1024, 5


@dataclass(frozen=True, slots=True)
class Roofline(JsonReport):
    """Rates of one device. Bytes per second and floating-point operations per second; a multiply-add is two."""

    copy_bytes_per_s: float  # one buffer into another: bytes read + bytes written
    read_bytes_per_s: float  # a reduction: bytes read, next to nothing written
    matmul_flops_per_s: float
    matmul_dtype: str = ""
    device: str = ""

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """The better of copying and reading, so that no kernel is faster than the floor."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    @property
    def ridge_flops_per_byte(self) -> float:
        """Operations per byte above which a step is bound by computing."""
        return self.matmul_flops_per_s / self.bandwidth_bytes_per_s

    def decode_floor_s(self, weight_bytes: float, kv_bytes: float) -> float:
        """Seconds that a decode step takes at least: every weight and every cached key and value is read once.

        ``kv_bytes`` is 2 * layers * kv_heads * head_dim * bytes per number, times the sum of all contexts. This floor
        over a measured step's seconds is its MBU (model bandwidth utilisation).
        """
        return (weight_bytes + kv_bytes) / self.bandwidth_bytes_per_s

    def prefill_floor_s(self, flops: float) -> float:
        """Seconds that computing ``flops`` takes at least; a prompt needs 2 * params * tokens + its attention."""
        return flops / self.matmul_flops_per_s


def measure(device: torch.device | str, *, dtype: torch.dtype | None = None) -> Roofline:
    """Measure a device: medians, after warm-up, on buffers that no cache holds.

    CUDA: 1 GiB copied to another, 1 GiB reduced, and an 8192 x 8192 x 8192 matmul, each timed by events (about 2.5 GiB
    of device memory). CPU: a quarter of that and 1024, with as many threads as torch has. The matmul gets normal random
    numbers: on a GPU zeros draw less power and run at a higher clock than a model ever will.

    Args:
        dtype: of the matmul; bfloat16 on CUDA and float32 on CPU unless given.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    num_bytes, size, repeats = (
        (CUDA_BUFFER_BYTES, CUDA_MATMUL_SIZE, CUDA_REPEATS)
        if on_gpu
        else (CPU_BUFFER_BYTES, CPU_MATMUL_SIZE, CPU_REPEATS)
    )
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    return Roofline(
        copy_bytes_per_s=_copy_rate(device, num_bytes, repeats),
        read_bytes_per_s=_read_rate(device, num_bytes, repeats),
        matmul_flops_per_s=_matmul_rate(device, size, dtype, repeats),
        matmul_dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
    )


def _copy_rate(device: torch.device, num_bytes: int, repeats: int) -> float:
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_on(device, lambda: target.copy_(source), repeats=repeats).median_s


def _read_rate(device: torch.device, num_bytes: int, repeats: int) -> float:
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    rows = source.view(-1, 4096)
    # torch shares out the work differently for one sum and for a sum of each row: the better is nearer to the memory.
    one = time_on(device, lambda: source.sum(), repeats=repeats)
    each = time_on(device, lambda: rows.sum(1), repeats=repeats)
    return num_bytes / min(one.median_s, each.median_s)


def _matmul_rate(device: torch.device, size: int, dtype: torch.dtype, repeats: int) -> float:
    generator = torch.Generator(device).manual_seed(0)  # its own: a measurement must not move the user's seed
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / time_on(device, lambda: torch.mm(a, b, out=out), repeats=repeats).median_s

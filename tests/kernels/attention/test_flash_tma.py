"""Flash attention by descriptors: equal to the kernel with pointers, refused where it cannot run, TMA in its code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from holding import LIMIT_S

from paged_infer.kernels.attention.flash_attention import flash_attention, flash_attention_reference
from paged_infer.kernels.attention.flash_tma import flash_attention_tma
from paged_infer.kernels.triton_runtime import HAS_TRITON, INTERPRETED

ROOT = Path(__file__).resolve().parents[3]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="on tensors of the CPU")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@interpreted
@pytest.mark.parametrize(("queries", "keys", "causal"), [(37, 50, True), (50, 37, True), (16, 40, False), (1, 1, True)])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float16, 64)])
def test_it_equals_the_kernel_with_pointers(queries, keys, causal, dtype, dim) -> None:
    q, k, v = (random(2, heads, n, dim, dtype=dtype) for heads, n in ((4, queries), (2, keys), (2, keys)))
    v = v.flip(2).contiguous()
    out = flash_attention_tma(q, k, v, causal=causal, scale=0.2)
    torch.testing.assert_close(out, flash_attention(q, k, v, causal=causal, scale=0.2), atol=0, rtol=0)
    reference = flash_attention_reference(q, k, v, causal=causal, scale=0.2)
    torch.testing.assert_close(out.float(), reference.float(), atol=2e-2, rtol=2e-2)


@interpreted
def test_keys_may_be_a_view_of_packed_ones() -> None:
    packed = random(1, 40, 3, 2, 64)  # [B, M, q k v, H, D]
    q, k, v = (packed[:, :, part].transpose(1, 2) for part in range(3))
    torch.testing.assert_close(flash_attention_tma(q, k, v), flash_attention(q, k, v), atol=0, rtol=0)


def test_no_keys_give_zeros() -> None:
    assert not flash_attention_tma(random(1, 2, 3, 64), random(1, 2, 0, 64), random(1, 2, 0, 64)).any()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 8, 80), torch.bfloat16, "head_dim 64 or 128 .*got torch.bfloat16, 80"),
        ((1, 2, 8, 64), torch.float32, "TMA takes 16-bit tensors .*got torch.float32, 64"),
    ],
)
def test_what_it_cannot_load_is_refused(shape, dtype, message) -> None:
    x = random(*shape, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        flash_attention_tma(x, x, x)


def test_rows_that_are_not_aligned_are_refused() -> None:
    q = random(1, 2, 8, 64)
    gaps, shifted = random(1, 2, 8, 65)[..., :64], random(1032).narrow(0, 4, 1024).view(1, 2, 8, 64)
    for k in (gaps, shifted):
        with pytest.raises(ValueError, match="k: rows must be dense, strides and address multiples of 16 bytes"):
            flash_attention_tma(q, k, q)


_COMPILE = """
import json, torch
from paged_infer.kernels.ahead_of_time import compiling_for
from paged_infer.kernels.attention.flash_tma import flash_attention_tma
found = []
for arch, dim in ((90, 64), (90, 128), (100, 128)):
    q, k = (torch.empty(2, heads, 4096, dim, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    with compiling_for(arch) as compiled:
        flash_attention_tma(q, k, k)
    code = compiled[0].machine_code()
    found.append([arch, dim, compiled[0].registers, compiled[0].is_clean, code.tensor_ops, code.tma_copies, code.spills,
                  code.kv_buffers])
print(json.dumps(found))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_it_is_compiled_to_tma_loads_with_registers_to_spare() -> None:
    """The kernel with pointers has 254 registers on sm90."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    for arch, dim, registers, is_clean, tensor_ops, tma_copies, spills, kv_buffers in json.loads(child.stdout):
        assert is_clean and spills == 0, (arch, dim)
        assert tensor_ops >= 16 and tma_copies >= 4, (arch, dim)
        assert kv_buffers == 2 and registers <= (200 if arch == 90 else 210), (arch, dim, registers)

"""Paged attention on a CPU without a gather: decodes read keys and values where they lie, by ``c_kernels.c``.

Torch's batched products want their keys side by side, so ``paged_attention_sdpa`` copies every key and value of the
batch in every layer of every step, and fills rows up to the longest one. Here each (sequence, key head) walks along its
own block table, with the online softmax of the Triton kernels. Prompt chunks, where the products are worth the copy,
go the way of ``paged_attention_sdpa``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.cache.spec import StepMeta
from paged_infer.kernels.c_ops import suits
from paged_infer.kernels.c_runtime import library
from paged_infer.kernels.paged_attention_sdpa import attend_chunks, paged_attention_batched

_MAX_GROUP_WIDTH = 4096  # MAX_TASK_WIDTH of c_kernels.c


def paged_attention_c(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: StepMeta, *, window: int | None
) -> Tensor:
    """q [T, H, D]; caches [num_blocks, block_size, H_kv, D], contiguous -> [T, H, D]."""
    num_heads, dim = q.shape[1:]
    _, block_size, num_kv_heads, _ = k_cache.shape
    dense = (
        suits(q, k_cache, v_cache)
        and q.stride(1) == dim
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
    )
    if (
        not dense
        or v_cache.shape != k_cache.shape
        or num_heads // num_kv_heads * dim > _MAX_GROUP_WIDTH
        or step.block_tables.stride(-1) != 1
    ):
        return paged_attention_batched(q, k_cache, v_cache, step, window=window)
    out = torch.empty(q.shape, dtype=q.dtype)
    if step.num_decodes:
        library(q.dtype).paged_decode(
            out.data_ptr(),
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            step.block_tables.data_ptr(),
            step.seq_lens.data_ptr(),
            step.num_decodes,
            num_heads,
            num_kv_heads,
            dim,
            block_size,
            step.block_tables.stride(0),
            q.stride(0),
            2**62 if window is None else window,
            dim**-0.5,
            torch.get_num_threads(),
        )
    attend_chunks(out, q, k_cache, v_cache, step, window)
    return out

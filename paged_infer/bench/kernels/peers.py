"""The attention kernels that are compared: a peer is a function from a problem to a call.

    peer(problem) -> Ready(call, note)      raises Unavailable, or anything, with the reason why it cannot run

A new one is a function and its entry in ``PREFILL`` or ``DECODE``. What can be prepared beforehand (dense copies,
flashinfer's plans, repeated keys) is not timed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from paged_infer.bench.kernels.problems import PagedProblem
from paged_infer.kernels.attention.flash_attention import flash_attention
from paged_infer.kernels.attention.paged_attention import paged_attention

FLEX_SIZES = ((4096, 128),)  # (length, head_dim)
WORKSPACE_BYTES = 256 * 2**20


class Unavailable(Exception):
    """Why a peer cannot run."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A call that computes the attention: [T, H, D], or [B, H, N, D] of rows that are all alike."""

    call: Callable[[], Any]
    note: str = ""
    can_be_captured: bool = True  # False: the host waits for the device in it, so no CUDA graph can hold it


Peer = Callable[[PagedProblem], Ready]


def packed(out: Any) -> Tensor:
    """The attention of what may come with a log-sum-exp: [B, H, N, D] as [T, H, D]; [T, H, D] as it is."""
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(1, 2).flatten(0, 1) if out.dim() == 4 else out


# -- Ours


def our_flash(problem: PagedProblem, **options: Any) -> Ready:
    q, k, v = problem.dense
    return Ready(lambda: flash_attention(q, k, v, **options))


def our_paged(problem: PagedProblem, **options: Any) -> Ready:
    """The first call plans the splits of a decode; later calls share the plan, as the layers of a step do."""
    arguments = problem.arguments | {"shared": {}}
    return Ready(lambda: paged_attention(**arguments, **options))


# -- torch


def sdpa(backend: SDPBackend) -> Peer:
    """torch's scaled_dot_product_attention, held to one backend."""

    def prepare(problem: PagedProblem) -> Ready:
        q, k, v = problem.dense
        group = q.shape[1] // k.shape[1]

        def call(keys: Tensor, values: Tensor) -> Tensor:
            is_grouped = keys.shape[1] != q.shape[1]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=is_grouped)

        try:
            call(k, v)
            return Ready(lambda: call(k, v))
        except RuntimeError:  # a backend that cannot share key heads: it gets a copy for each query head
            keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
            call(keys, values)
            return Ready(lambda: call(keys, values), f"keys and values repeated {group} times beforehand")

    return prepare


def flex(problem: PagedProblem) -> Ready:
    """flex_attention, compiled for its shape: the fastest way to run it, but slow to compile, so for one shape only."""
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = problem.dense
    length = q.shape[2]
    if (length, q.shape[3]) not in FLEX_SIZES:
        sizes = " and ".join(f"{n:,} tokens of head_dim {dim}" for n, dim in FLEX_SIZES)
        raise Unavailable(f"is compiled for each shape: timed at {sizes} only")
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=str(q.device))
    compiled = _compiled_flex()
    return Ready(lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True))


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def varlen(problem: PagedProblem) -> Ready:
    """torch.nn.attention.varlen: packed sequences, keys packed too."""
    varlen_attn, causal = _varlen()
    starts, longest = problem.query_start_loc, problem.hints["max_query_len"]
    arguments = (problem.q, *problem.packed, starts, starts, longest, longest)
    return Ready(lambda: varlen_attn(*arguments, **causal))


def varlen_paged(problem: PagedProblem) -> Ready:
    """The same through a block table, where this torch and its flash attention can."""
    varlen_attn, causal = _varlen()
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        raise Unavailable(f"torch {torch.__version__} has no block_table in varlen_attn")
    key_starts = F.pad(problem.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    longest = (problem.hints["max_query_len"], problem.hints["max_seq_len"])
    arguments = (problem.q, problem.k_cache, problem.v_cache, problem.query_start_loc, key_starts, *longest)
    options = causal | {"seqused_k": problem.seq_lens, "block_table": problem.block_tables}
    return Ready(lambda: varlen_attn(*arguments, **options))


def _varlen() -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function, and the options of the installed torch for causal attention and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__}: {error}") from error
    names = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    return varlen_attn, causal | ({"enable_gqa": True} if "enable_gqa" in names else {})


def gather_and_sdpa(problem: PagedProblem) -> Ready:
    """torch on its own with a paged cache: gather the blocks, then attend. The copy is timed."""
    queries, tables = problem.q[:, :, None], problem.block_tables.long()
    length = problem.hints["max_seq_len"]

    def call() -> Tensor:
        k, v = (c[tables].flatten(1, 2)[:, :length].transpose(1, 2) for c in (problem.k_cache, problem.v_cache))
        return F.scaled_dot_product_attention(queries, k, v, enable_gqa=True)

    return Ready(call)


# -- flashinfer


def flashinfer_prefill(problem: PagedProblem) -> Ready:
    wrapper = _flashinfer(problem, "BatchPrefillWithRaggedKVCacheWrapper")
    k, v = problem.packed
    starts = problem.query_start_loc
    wrapper.plan(starts, starts, *_heads(problem), causal=True, q_data_type=problem.q.dtype)
    return Ready(lambda: wrapper.run(problem.q, k, v))


def flashinfer_paged_prefill(problem: PagedProblem) -> Ready:
    wrapper = _flashinfer(problem, "BatchPrefillWithPagedKVCacheWrapper")
    shape = (*_heads(problem), problem.k_cache.shape[1])
    wrapper.plan(problem.query_start_loc, *_pages(problem), *shape, causal=True, q_data_type=problem.q.dtype)
    return Ready(lambda: wrapper.run(problem.q, (problem.k_cache, problem.v_cache)))


def flashinfer_decode(problem: PagedProblem) -> Ready:
    wrapper = _flashinfer(problem, "BatchDecodeWithPagedKVCacheWrapper", use_tensor_cores=True)
    shape, dtype = (*_heads(problem), problem.k_cache.shape[1]), problem.q.dtype
    wrapper.plan(*_pages(problem), *shape, q_data_type=dtype, kv_data_type=dtype)
    return Ready(lambda: wrapper.run(problem.q, (problem.k_cache, problem.v_cache)))


def _flashinfer(problem: PagedProblem, wrapper: str, **options: Any) -> Any:
    try:
        import flashinfer
    except ImportError as error:
        raise Unavailable(f"not importable: {error}") from error
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=problem.q.device)
    return getattr(flashinfer, wrapper)(workspace, "NHD", **options)


def _heads(problem: PagedProblem) -> tuple[int, int, int]:
    return problem.q.shape[1], problem.k_cache.shape[2], problem.q.shape[2]


def _pages(problem: PagedProblem) -> tuple[Tensor, Tensor, Tensor]:
    """flashinfer's block tables: the start of each row, all rows in one list, tokens in each row's last block."""
    block_size = problem.k_cache.shape[1]
    counts = (problem.seq_lens + block_size - 1) // block_size
    rows = [problem.block_tables[row, :count] for row, count in enumerate(counts.tolist())]
    starts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return starts, torch.cat(rows), (problem.seq_lens - 1) % block_size + 1


PREFILL: dict[str, Peer] = {
    "flash_attention": our_flash,
    "paged_attention": our_paged,
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex_attention": flex,
    "varlen_attn": varlen,
    "varlen_attn, paged": varlen_paged,
    "flashinfer": flashinfer_prefill,
    "flashinfer, paged": flashinfer_paged_prefill,
}
DECODE: dict[str, Peer] = {
    "paged_attention": our_paged,
    "flashinfer": flashinfer_decode,
    "varlen_attn, paged": varlen_paged,
    "gather + SDPA": gather_and_sdpa,
}

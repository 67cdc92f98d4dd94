"""Checks of attention's arguments. They run before a launch, and raise one clear error with the shapes (law 5)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from paged_infer.kernels.checks import FLOATS, check_codes, shapes

MAX_HEAD_DIM = 256
MAX_ROWS = 65_535  # CUDA's limit on a grid's second and third axes
MAX_SCALE = 1e30  # times 1/ln 2 and any useful score, it still fits float32


def check_dense_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, window: int | None,
    softcap: float | None = None, sinks: Tensor | None = None, max_head_dim: int | None = MAX_HEAD_DIM,
) -> None:  # fmt: skip
    """Raises ValueError unless q [B, H, N, D], k and v [B, H_kv, M, D] fit together."""
    given = shapes(q=q, k=k, v=v)
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape != v.shape:
        raise ValueError(f"attention expects q [B, H, N, D], k and v [B, H_kv, M, D]; got {given}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must share batch size and head_dim; got {given}")
    _check_heads(q.shape[1], k.shape[1], q.shape[3], given, max_head_dim)
    _check_alike(q=q, k=k, v=v)
    _check_scores(q, q.shape[1], scale, window, softcap, sinks)
    if window is not None and not causal:
        raise ValueError(f"window={window} with causal=False: a window ends at the query's own position")


def check_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    scale: float | None, window: int | None, out: Tensor | None,
    softcap: float | None = None, sinks: Tensor | None = None, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Raises ValueError unless q [T, H, D], caches [num_blocks, block_size, H_kv, D] and the indices fit together."""
    given = shapes(q=q, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape or not k_cache.shape[1]:
        raise ValueError(
            f"paged attention expects q [T, H, D] and two caches [num_blocks, block_size, H_kv, D]; got {given}"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(f"the caches must be contiguous; got strides {k_cache.stride()} and {v_cache.stride()}")
    if q.shape[2] != k_cache.shape[3]:
        raise ValueError(f"q and the caches must share head_dim; got {given}")
    _check_heads(q.shape[1], k_cache.shape[2], q.shape[2], given)
    if k_scale is None and v_scale is None:
        _check_alike(q=q, k_cache=k_cache, v_cache=v_cache)
    else:
        check_codes(k_cache, v_cache, k_scale, v_scale)
        _check_alike(q=q)
    _check_scores(q, q.shape[1], scale, window, softcap, sinks)
    rows = seq_lens.shape[0] if seq_lens.dim() == 1 else -1
    if rows < 0 or block_tables.dim() != 2 or block_tables.shape[0] != rows or query_start_loc.shape != (rows + 1,):
        raise ValueError(
            "paged attention expects block_tables [B, max_blocks], seq_lens [B], query_start_loc [B + 1]; got "
            + shapes(block_tables=block_tables, seq_lens=seq_lens, query_start_loc=query_start_loc)
        )
    for name, index in (("block_tables", block_tables), ("seq_lens", seq_lens), ("query_start_loc", query_start_loc)):
        if index.dtype != torch.int32 or index.device != q.device:
            raise ValueError(f"{name} must be int32 on {q.device}; got {index.dtype} on {index.device}")
        if index.shape[-1] > 1 and index.stride(-1) != 1:
            raise ValueError(f"{name} must have dense rows; got strides {index.stride()}")
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows exceed the {MAX_ROWS} that one launch can have")
    if out is not None and (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        raise ValueError(f"out must be like q; got {shapes(q=q, out=out)}, {out.dtype} on {out.device}")
    if out is not None and q.shape[2] > 1 and out.stride(2) != 1:
        raise ValueError(f"out must have dense rows; got strides {out.stride()}")


def check_index_values(
    block_tables: Tensor, seq_lens: list[int], query_start_loc: list[int], num_queries: int, k_cache: Tensor
) -> None:
    """Raises ValueError for a table entry outside the cache, or lengths that disagree. The host waits for a GPU."""
    num_blocks, block_size = k_cache.shape[:2]
    bounds = query_start_loc
    if bounds[0] != 0 or bounds[-1] != num_queries or any(b > e for b, e in pairwise(bounds)):
        raise ValueError(f"query_start_loc must rise from 0 to the {num_queries} queries of q; got {bounds}")
    room = block_tables.shape[1] * block_size
    if seq_lens and not 0 <= min(seq_lens) <= max(seq_lens) <= room:
        raise ValueError(
            f"seq_lens {seq_lens} must be within 0..{room}: tables hold {block_tables.shape[1]} blocks of {block_size}"
        )
    for row, table in enumerate(block_tables.tolist()):
        used = table[: -(-seq_lens[row] // block_size)]
        if used and not 0 <= min(used) <= max(used) < num_blocks:
            raise ValueError(
                f"block table {row} is {used[:16]}: it points outside the {num_blocks} blocks of "
                f"the cache {list(k_cache.shape)}"
            )


def _check_heads(
    num_heads: int, num_kv_heads: int, dim: int, given: str, max_head_dim: int | None = MAX_HEAD_DIM
) -> None:  # fmt: skip
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key heads evenly; got {given}")
    if dim < 1 or (max_head_dim is not None and dim > max_head_dim):
        raise ValueError(f"head_dim={dim} must be within 1..{max_head_dim}; got {given}")


def _check_alike(**tensors: Tensor) -> None:
    dtypes = {x.dtype for x in tensors.values()}
    devices = {x.device for x in tensors.values()}
    if len(dtypes) > 1 or len(devices) > 1:
        each = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"attention expects one dtype and one device; got {each}")
    if dtypes - set(FLOATS):
        raise ValueError(f"attention supports float32, float16 and bfloat16; got {dtypes.pop()}")


def _check_scores(
    q: Tensor, num_heads: int, scale: float | None, window: int | None, softcap: float | None, sinks: Tensor | None
) -> None:
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not 0 < value <= MAX_SCALE:
            raise ValueError(f"{name}={value}: must be > 0 and <= {MAX_SCALE:g}")
    if sinks is not None and (sinks.shape != (num_heads,) or sinks.device != q.device or not sinks.is_contiguous()):
        raise ValueError(
            f"sinks must be [{num_heads}], one logit per query head, contiguous on {q.device}; "
            f"got {list(sinks.shape)} on {sinks.device}"
        )
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"window={window!r}: must be an integer >= 1, since it counts the token itself")

"""All layers of a decoder by one call of C (``layers.c``), for decoders of the usual kind.

Between two calls of C, a step on a CPU spends more time in Python than many of its products take: for one token of
SmolLM2-135M in bfloat16, 9 of 20 ms on two cores at 2.1 GHz. ``model.layers_in_c`` decides which decoders are of that
kind; all others, and those that were changed or got hooks after loading, make the calls one by one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.cpu.build import library
from paged_infer.kernels.cpu.linear import InC
from paged_infer.kernels.cpu.paged_attention import plan_queries
from paged_infer.kernels.kv_quant import FORMATS


class _Product(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("multiply", "weights", "start")),
        *((name, c_int64) for name in ("depth", "width", "digits")),
    ]


class _Layer(Structure):
    _fields_ = [
        *((name, _Product) for name in ("qkv", "output", "up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "qk_norm")),
        *((name, c_void_p) for name in ("k_cache", "v_cache", "k_scale", "v_scale")),
        *((name, c_int64) for name in ("window", "rope")),
    ]


class _Shape(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("num_heads", "num_kv_heads", "dim", "hidden", "block_size", "format")),
        *((name, c_float) for name in ("eps", "offset", "scale", "softcap")),
    ]


class _Tokens(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("num_tokens", "num_rows", "num_tasks", "row_stride", "table_stride")),
        ("slots", c_void_p),
        *((name, c_void_p) for name in ("row_tables", "row_lengths", "places", "tables", "lengths", "starts", "tasks")),
    ]


class LayerWeights(NamedTuple):
    """The weights of one layer. Those of the norms are contiguous and have one dtype, which x has, too."""

    qkv: InC
    output: InC
    up: InC
    down: InC
    attention_norm: Tensor  # [hidden]
    mlp_norm: Tensor  # [hidden]
    qk_norm: Tensor | None  # [H + H_kv, D]
    window: int | None
    rope: int  # index of its RoPE among the step's pairs of cos and sin


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """The sizes and constants that all layers share."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    eps: float  # of the norms
    offset: float
    scale: float | None  # of the scores; None: head_dim ** -0.5
    softcap: float | None


class PoolOfBlocks(Protocol):
    """What is used of a ``PagedCache``; its tensors are contiguous, [num_blocks + 1, block_size, H_kv, D]."""

    block_size: int
    keys: list[Tensor]
    values: list[Tensor]
    scales: list[dict[str, Tensor]]  # "k_scale" and "v_scale" of each layer, if the cache is quantised


class LayersInC:
    """All layers of one decoder. Its weights must stay at their addresses."""

    def __init__(self, layers: Sequence[LayerWeights], sizes: LayerSizes) -> None:
        self.dtype = layers[0].attention_norm.dtype
        self._library, self._layers, self._sizes = library(self.dtype), layers, sizes
        # For each cache, the addresses of its tensors and of the weights.
        self._tables: WeakKeyDictionary[PoolOfBlocks, tuple[ctypes.Array[_Layer], _Shape]] = WeakKeyDictionary()
        products = [one for layer in layers for one in layer[:4]]
        self._scratch = [one.scratch for one in products if one.digits]
        qk_rows = (sizes.num_heads + sizes.num_kv_heads) * sizes.head_dim
        self._wide = max(qk_rows, *(max(one.shape) for one in products))  # elements of the longest row between products
        self._room = sizes.hidden + 2 * self._wide + max(one.shape[1] for one in products) + 32  # elements per token

    def __call__(
        self, x: Tensor, ropes: Sequence[tuple[Tensor, Tensor]], cache: PoolOfBlocks, step: AttentionMetadata
    ) -> tuple[Tensor, Tensor] | None:
        """Embeddings x [T, hidden] -> the last sublayer's output and the residual stream, which overwrites ``x``.

        Args:
            ropes: cos and signed sin [T, 1, D] of each RoPE.

        Returns:
            None if C cannot compute this step; then nothing was written.
        """
        if (
            cache.keys[0].dtype not in (self.dtype, *FORMATS)
            or step.block_tables.stride(-1) != 1
            or not x.is_contiguous()
        ):
            return None
        plan = plan_queries(step, self.dtype)
        if plan is None:
            return None
        layers, shape = self._tables.get(cache) or self._addresses(cache)
        num_tokens, tasks, threads = len(x), plan.tasks, torch.get_num_threads()
        out, room = torch.empty_like(x), x.new_empty(num_tokens * self._room)
        scratch = room.new_empty(
            max((num_bytes(num_tokens, threads) for num_bytes in self._scratch), default=0), dtype=torch.uint8
        )
        tokens = _Tokens(
            num_tokens, plan.num_rows, 0 if tasks is None else len(tasks), plan.tables.stride(0),
            step.block_tables.stride(0), step.slot_mapping.data_ptr(), plan.tables.data_ptr(), plan.lengths.data_ptr(),
            None if plan.places is None else plan.places.data_ptr(), step.block_tables.data_ptr(),
            step.seq_lens.data_ptr(), step.query_start_loc.data_ptr(), None if tasks is None else tasks.data_ptr(),
        )  # fmt: skip
        addresses = c_void_p * len(ropes)
        cos, sin = (addresses(*(pair[i].data_ptr() for pair in ropes)) for i in (0, 1))
        self._library.decoder_layers(
            out.data_ptr(), x.data_ptr(), room.data_ptr(), scratch.data_ptr(), self._wide,
            layers, len(layers), byref(shape), byref(tokens), cos, sin, threads,
        )  # fmt: skip
        return out, x

    def _addresses(self, cache: PoolOfBlocks) -> tuple[ctypes.Array[_Layer], _Shape]:
        sizes, scale = self._sizes, self._sizes.scale
        layers = (_Layer * len(self._layers))(
            *(self._layer(*own) for own in zip(self._layers, cache.keys, cache.values, cache.scales, strict=True))
        )
        shape = _Shape(
            sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.hidden, cache.block_size,
            FORMATS.get(cache.keys[0].dtype, 0), sizes.eps, sizes.offset,
            sizes.head_dim**-0.5 if scale is None else scale, sizes.softcap or 0.0,
        )  # fmt: skip
        self._tables[cache] = layers, shape
        return layers, shape

    def _layer(self, layer: LayerWeights, keys: Tensor, values: Tensor, scales: dict[str, Tensor]) -> _Layer:
        return _Layer(
            *map(self._product, layer[:4]), layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr(),
            None if layer.qk_norm is None else layer.qk_norm.data_ptr(), keys.data_ptr(), values.data_ptr(),
            *(scales[name].data_ptr() if scales else None for name in ("k_scale", "v_scale")),
            2**62 if layer.window is None else layer.window, layer.rope,
        )  # fmt: skip

    def _product(self, product: InC) -> _Product:
        function = ctypes.cast(getattr(self._library, product.function), c_void_p)
        height, depth = product.shape
        start = None if product.start is None else product.start.data_ptr()
        return _Product(function, product.weights.data_ptr(), start, depth, height, product.digits)

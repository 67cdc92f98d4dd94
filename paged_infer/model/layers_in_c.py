"""Which decoders run all their layers by one call of C (``kernels.cpu.layers``), and when.

The modules stay what is read, tested and changed: the call is made only while they are as they were loaded. Once one
has a hook, another part, product, method, ``ops`` or ``forward``, or a parameter that is in no product, or torch has a
hook for all modules, or the cache has another ``attend`` or store, all are computed module by module. Numbers that a
module keeps, such as ``eps``, are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from paged_infer.cache.paged import PagedCache
from paged_infer.cache.spec import Cache
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.cpu.layers import LayersInC, LayerSizes, LayerWeights
from paged_infer.kernels.cpu.linear import InC, PanelProduct
from paged_infer.kernels.cpu.ops import store_kv_c
from paged_infer.kernels.cpu.paged_attention import paged_attention_c, takes_heads
from paged_infer.kernels.cpu.quant import QuantisedProduct
from paged_infer.model.attention import Rope
from paged_infer.model.config import ModelConfig
from paged_infer.model.linear import Linear


class WholeLayers:
    """Layers that C computes in one call as long as nothing was changed since they were loaded."""

    def __init__(self, layers: nn.ModuleList, in_c: LayersInC) -> None:
        modules = list(layers.modules())
        self._in_c = in_c
        self._hooks = [one for module in modules for one in (module._forward_hooks, module._forward_pre_hooks)]
        self._hooks += [of_all_modules._global_forward_hooks, of_all_modules._global_forward_pre_hooks]
        self._forwards = [(kind, kind.forward) for kind in {type(module) for module in modules}]
        self._parts = [module._modules for module in modules if module._modules]
        self._num_parts = [*map(len, self._parts)]
        items: list[tuple[dict[str, Any], str]] = [
            (module.__dict__, name)
            for module in modules
            for name in ("forward", "ops", "method", "product")
            if name == "forward" or name in module.__dict__
        ]
        items += [(parts, name) for parts in self._parts for name in parts]
        read = [module._parameters for module in modules if not isinstance(module, Linear)]  # a product has its own
        items += [(parameters, name) for parameters in read for name in parameters]
        self._owners, self._names = [own for own, _ in items], [name for _, name in items]
        self._values = [*map(dict.get, self._owners, self._names)]
        self._tensors = [one for parameters in read for one in parameters.values() if one is not None]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]

    def __call__(
        self, x: Tensor, ropes: Sequence[Rope], cache: Cache, step: AttentionMetadata
    ) -> tuple[Tensor, Tensor] | None:
        """What the layers give one by one for x [T, hidden], which may be overwritten; None: it is left to them."""
        if type(cache) is not PagedCache or not _is_usual(cache) or self._has_changed():
            return None
        return self._in_c(x, ropes, cache, step)

    def _has_changed(self) -> bool:
        # Asked in each step, after weights have swept the processor's caches: long lists of few objects, read by C.
        return (
            any(self._hooks)
            or any(map(is_not, map(dict.get, self._owners, self._names), self._values))
            or [*map(len, self._parts)] != self._num_parts
            or any(kind.forward is not known for kind, known in self._forwards)
            or [*map(Tensor.data_ptr, self._tensors)] != self._addresses
        )


_CACHE_METHODS = {name: getattr(PagedCache, name) for name in ("attend", "attend_stored", "slots")}


def _is_usual(cache: PagedCache) -> bool:
    """Whether C does what the cache would: it has C's backend and store, and its own methods."""
    return (
        cache.backend is paged_attention_c
        and cache.ops.store_kv is store_kv_c
        and vars(cache).keys().isdisjoint(_CACHE_METHODS)
        and all(getattr(PagedCache, name) is method for name, method in _CACHE_METHODS.items())
    )


def whole_layers(layers: nn.ModuleList, config: ModelConfig, dtype: torch.dtype) -> WholeLayers | None:
    """None: ``layers.c`` lacks something that the decoder needs, or a matrix is not in C's panels."""
    usual = config.norm == "rms" and config.pre_norm and not config.post_norm and config.residual_multiplier == 1
    usual = usual and config.gated_mlp and config.activation == "silu" and config.qk_norm in (None, "head")
    if not usual or config.mla or config.moe or config.attention_sinks or None in config.ropes:
        return None
    if not takes_heads(config.num_heads // config.num_kv_heads, config.head_dim, dtype):
        return None
    weights = list[LayerWeights]()
    for layer, window in zip(layers, config.sliding_windows, strict=True):
        part: Any = layer
        products = [
            _in_c(one, dtype) for one in (part.attention.qkv, part.attention.output, part.mlp.up, part.mlp.down)
        ]
        qkv, output, up, down = products
        if qkv is None or output is None or up is None or down is None:
            return None
        norms = part.attention_norm.weight, part.mlp_norm.weight, part.attention.qk_norm_weight
        weights.append(LayerWeights(qkv, output, up, down, *norms, window, part.rope_index))
    sizes = LayerSizes(
        config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size,
        config.norm_eps, config.norm_offset, config.attention_scale, config.softcap,
    )  # fmt: skip
    return WholeLayers(layers, LayersInC(weights, sizes))


def _in_c(linear: Linear, dtype: torch.dtype) -> InC | None:
    product = linear.product
    return product.in_c(dtype) if isinstance(product, PanelProduct | QuantisedProduct) else None

"""Fold the scales of a linear layer's inputs into the operation before it; the model computes the same function.

(x / s) (W s)^T = x W^T      x / s costs nothing where s can divide a norm's weight, or rows of the matrix before

attention_norm -> qkv      v rows of qkv -> output      mlp_norm -> up      up rows of up -> down
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.model.attention import Attention
from paged_infer.model.decoder import DecoderLayer
from paged_infer.model.layers import MLP, LayerNorm, RMSNorm
from paged_infer.model.linear import Linear


def shared(layer: DecoderLayer, name: str, inputs: Tensor) -> Tensor | None:
    """A statistic [K] of a linear layer's inputs, averaged over inputs that must have the same scale.

    With grouped-query attention, all query heads of a group read one value head, so their inputs to ``output`` share a
    mean.

    Args:
        name: of the linear layer, such as ``layers.3.mlp.up``.
        inputs: mean |x| or max |x| of each input channel.

    Returns:
        None if scales cannot be folded, because neither a norm's weight nor rows of a matrix scale these inputs.
    """
    attention, mlp, kind = layer.attention, layer.mlp, _kind(name)
    if kind == "attention.qkv" and isinstance(layer.attention_norm, RMSNorm | LayerNorm):
        return inputs
    if kind == "mlp.up" and isinstance(mlp, MLP) and isinstance(layer.mlp_norm, RMSNorm | LayerNorm):
        return inputs
    if kind == "mlp.down" and isinstance(mlp, MLP) and mlp.gated:
        return inputs
    if kind == "attention.output" and isinstance(attention, Attention):
        groups = inputs.view(attention.num_kv_heads, -1, attention.head_dim)  # [H_kv, H / H_kv, D]
        return groups.mean(1, keepdim=True).expand_as(groups).reshape(-1)
    return None


@torch.inference_mode()
def fold(layer: DecoderLayer, name: str, scales: Tensor) -> None:
    """Multiply the columns of a linear layer by ``scales`` [K], and divide the operation before it by them, in place.

    Args:
        name: of the linear layer, such as ``layers.3.mlp.up``.
        scales: computed from what ``shared`` returned, so they are equal where they must be.
    """
    attention, mlp, kind = layer.attention, layer.mlp, _kind(name)
    if kind in ("attention.qkv", "mlp.up"):
        norm = layer.attention_norm if kind == "attention.qkv" else layer.mlp_norm
        assert isinstance(norm, RMSNorm | LayerNorm)
        offset = norm.offset if isinstance(norm, RMSNorm) else 0.0
        norm.weight.data.copy_((norm.weight + offset) / scales - offset)
        if isinstance(norm, LayerNorm):
            norm.bias.data.div_(scales)
    elif kind == "mlp.down":
        assert isinstance(mlp, MLP)
        _divide_rows(mlp.up, slice(mlp.down.in_features, None), scales)
    else:
        assert isinstance(attention, Attention)
        heads = scales.view(attention.num_kv_heads, -1, attention.head_dim)[:, 0]  # [H_kv, D]
        first = (attention.num_heads + attention.num_kv_heads) * attention.head_dim
        _divide_rows(attention.qkv, slice(first, None), heads.flatten())
    linear = layer.get_submodule(kind)
    assert isinstance(linear, Linear)
    linear.weight.data.mul_(scales)


def _divide_rows(linear: Linear, rows: slice, scales: Tensor) -> None:
    linear.weight.data[rows].div_(scales[:, None])
    if linear.bias is not None:
        linear.bias.data[rows].div_(scales)


def _kind(name: str) -> str:
    """``layers.3.mlp.up`` -> ``mlp.up``."""
    return name.split(".", 2)[2]

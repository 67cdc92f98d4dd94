"""The pieces of a decoder layer that hold no state of the sequence: norms, rotary positions, the MLP.

T is the number of tokens in the step, all sequences packed one after the other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paged_infer.kernels.cpu.linear import PanelProduct
from paged_infer.kernels.op_sets import Ops
from paged_infer.model.config import ModelConfig
from paged_infer.model.linear import Linear
from paged_infer.model.rope_config import RopeConfig


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + offset) over the last dimension (Zhang and Sennrich 2019); the mean square in float32.

    Norms add first: the output of the last sublayer joins the residual stream, and the sum is normalised for the next.
    """

    def __init__(self, dim: int, eps: float, ops: Ops, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps, self.offset, self.ops = eps, offset, ops

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both [T, dim] -> the normalised sum and the sum, both [T, dim]."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dimension (Ba 2016), after adding as in ``RMSNorm``."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return F.layer_norm(total, self.weight.shape, self.weight, self.bias, self.eps), total


class AddOnly(nn.Module):
    """Adding without a norm, where a family normalises the outputs of sublayers alone (OLMo-2)."""

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return total, total


def make_norm(config: ModelConfig, ops: Ops) -> RMSNorm | LayerNorm:
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps, ops, config.norm_offset)
    return LayerNorm(config.hidden_size, config.norm_eps)


class Embedding(nn.Module):
    """Rows of a table [V, dim] by number. It is allocated, not initialised, as ``Linear`` is.

    Once a tied head is in C's panels (``head``), they are the table, and ``weight`` is a copy made when it is read.
    """

    weight: Tensor
    head: PanelProduct | None = None

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, dim))

    def use(self, head: PanelProduct) -> None:
        del self.weight
        self.head, self.panels = head, nn.Parameter(head.panels, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:  # [T] -> [T, dim]
        return F.embedding(ids, self.weight) if self.head is None else self.head.rows(ids)

    def __getattr__(self, name: str) -> Any:  # of what is no attribute and no parameter
        head = self.__dict__.get("head")
        return head.weight if name == "weight" and head is not None else super().__getattr__(name)


def inverse_frequencies(rope: RopeConfig, max_model_len: int) -> Tensor:
    """Angle per position of each rotated pair of a head's dimensions, in radians: [rotary_dim / 2], float32, on CPU.

    Su 2021 (RoFormer), equation 15, with the scaling of long wavelengths that ``rope`` asks for, computed in the order
    of transformers, so that the bits agree.
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64, device="cpu").float() / rope.rotary_dim
    wavelengths = rope.theta**exponents  # over 2 pi
    if rope.longrope is not None:
        return 1.0 / (torch.tensor(rope.longrope.chosen(max_model_len), device="cpu") * wavelengths)
    frequencies = 1.0 / wavelengths / rope.linear_factor
    if rope.llama3 is not None:
        turns = rope.llama3.original_max_position / (2 * math.pi / frequencies)  # within the original context
        low, high = rope.llama3.low_freq_factor, rope.llama3.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 0: slowed by the factor; 1: kept
        return (1 - keep) * frequencies / rope.llama3.factor + keep * frequencies
    if rope.yarn is not None:
        low, high = rope.yarn.low, rope.yarn.high
        pairs = torch.arange(rope.rotary_dim // 2, dtype=torch.float32, device="cpu")
        keep = 1 - ((pairs - low) / (high - low if high != low else 0.001)).clamp(0.0, 1.0)
        return 1.0 / (rope.yarn.factor * wavelengths) * (1 - keep) + frequencies * keep
    return frequencies


class RotaryEmbedding(nn.Module):
    """Turns positions into the two factors that rotate queries and keys, once per step for all layers that share it.

    x * cos + rotate_half(x) * sin, where the sign of rotate_half sits in sin, so that a roll replaces its copies.
    Dimensions beyond ``rotary_dim`` have cos 1 and sin 0; ``rotary_order`` puts each pair of the others in its place.
    """

    inverse_frequencies: Tensor
    scale: Tensor | None

    def __init__(self, rope: RopeConfig, config: ModelConfig) -> None:
        super().__init__()
        angles = inverse_frequencies(rope, config.max_model_len or config.max_position_embeddings)
        rest, device = config.head_dim // 2 - len(angles), torch.get_default_device()  # rest: pairs that stay
        scale = None
        if rope.attention_factor != 1:
            scale = F.pad(torch.full_like(angles, rope.attention_factor), (0, rest), value=1.0).to(device)
        self.register_buffer("inverse_frequencies", F.pad(angles, (0, rest)).to(device), persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos [T, 1, D] and signed sin [T, 1, D], where the first half of sin is negated."""
        angles = positions[:, None].float() * self.inverse_frequencies  # [T, D / 2]
        cos, sin = angles.cos(), angles.sin()
        if self.scale is not None:
            cos, sin = cos * self.scale, sin * self.scale
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos[:, None].to(dtype), sin[:, None].to(dtype)


def distinct_ropes(config: ModelConfig) -> list[RopeConfig]:
    return list(dict.fromkeys(rope for rope in config.ropes if rope is not None))


def make_rotary(config: ModelConfig) -> nn.ModuleList:
    """One for each distinct RoPE of the layers: float32 constants, computed on the CPU so that all devices agree."""
    return nn.ModuleList(RotaryEmbedding(rope, config) for rope in distinct_ropes(config))


def rotary_order(rope: RopeConfig, head_dim: int) -> tuple[int, ...]:
    """Our order of a head's dimensions: position -> the checkpoint's dimension, [head_dim].

    Ours rotates pairs (i, i + head_dim / 2) in all kernels, and leaves pairs from rotary_dim / 2 on as they are. The
    checkpoint's pairs are (i, i + rotary_dim / 2) or (2 i, 2 i + 1) in its first ``rotary_dim`` dimensions. Queries and
    keys take the same order, so that their products are the same.
    """
    half, rest = rope.rotary_dim // 2, (head_dim - rope.rotary_dim) // 2
    pairs = [(2 * i, 2 * i + 1) if rope.interleaved else (i, i + half) for i in range(half)]
    pairs += [(rope.rotary_dim + i, rope.rotary_dim + rest + i) for i in range(rest)]
    return (*(first for first, _ in pairs), *(second for _, second in pairs))


class MLP(nn.Module):
    """act(gate(x)) * up(x), then down (SwiGLU, Shazeer 2020), with gate and up in one matrix; or plain act(up(x))."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        width = config.intermediate_size * (2 if config.gated_mlp else 1)
        self.gated = config.gated_mlp
        self.activation = config.activation
        self.up = Linear(config.hidden_size, width, bias=config.mlp_bias)  # gated: rows are gate, then up
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # [T, hidden] -> [T, hidden]
        wide = self.up(x)
        if self.gated and self.activation == "silu":
            return self.down(self.ops.silu_mul(wide))
        if self.gated:
            gate, wide = wide.chunk(2, dim=-1)
            return self.down(activate(self.activation, gate) * wide)
        return self.down(activate(self.activation, wide))


def activate(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return x * sigmoid(x) if _rounds_by_place(x) else F.silu(x)
    if name == "relu":
        return F.relu(x)
    if name == "gelu_tanh" and _rounds_by_place(x):
        inner = (x * x).mul_(0.044715).add_(1).mul_(x).mul_(math.sqrt(2 / math.pi))
        return inner.tanh_().add_(1).mul_(x).mul_(0.5)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def sigmoid(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1).reciprocal_() if _rounds_by_place(x) else torch.sigmoid(x)


def _rounds_by_place(x: Tensor) -> bool:
    """Whether torch's sigmoid, SiLU and GELU round the elements that fill no whole vector differently.

    These are the last of a tensor, or of a thread's part of it, so the bits of a row would depend on the other rows.
    exp, tanh and arithmetic round all alike.
    """
    return x.is_cpu and x.dtype is torch.float32

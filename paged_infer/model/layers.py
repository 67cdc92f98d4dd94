"""The pieces of a decoder layer that hold no state of the sequence: norms, rotary positions, the MLP.

T is the number of tokens in the step, all sequences packed one after the other.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paged_infer.kernels.op_sets import Ops
from paged_infer.model.config import ModelConfig
from paged_infer.model.linear import Linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019); the mean square is taken in float32.

    Norms add first: the output of the last sublayer joins the residual stream, and the sum is normalised for the next.
    """

    def __init__(self, dim: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both [T, dim] -> the normalised sum and the sum, both [T, dim]."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


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


def make_norm(config: ModelConfig, ops: Ops) -> RMSNorm | LayerNorm:
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps, ops)
    return LayerNorm(config.hidden_size, config.norm_eps)


def make_embedding(num_rows: int, dim: int) -> nn.Embedding:
    """An embedding that is allocated, not initialised, as ``Linear`` is.

    A model is first built on the meta device, where PyTorch imports its compiler to draw random numbers: two seconds.
    """
    return nn.Embedding.from_pretrained(torch.empty(num_rows, dim), freeze=False)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of a head's dimensions, in radians: [head_dim / 2], float32, on the CPU.

    Su 2021 (RoFormer), equation 15, with Llama 3's scaling of long wavelengths if the configuration has it.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents) / config.rope_linear_factor
    scaling = config.rope_llama3
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelengths  # full turns within the context it was first trained on
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)  # 0: a long wave, slowed by the factor; 1: a short wave, kept
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


class RotaryEmbedding(nn.Module):
    """Turns positions into the two factors that rotate queries and keys, once per step for all layers.

    x * cos + rotate_half(x) * sin, where the sign of rotate_half sits in sin, so that a roll replaces its copies.
    """

    inverse_frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies = inverse_frequencies(config).to(torch.get_default_device())
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos [T, 1, D] and signed sin [T, 1, D], where the first half of sin is negated."""
        angles = positions[:, None].float() * self.inverse_frequencies  # [T, D / 2]
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos[:, None].to(dtype), sin[:, None].to(dtype)


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
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")

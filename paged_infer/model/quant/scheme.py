"""Quantisation schemes: the grid (scale and zero point) of each group of weights, and rounding to nearest on it.

    symmetric    scale = max |w| / (2^b - 1) * 2      zero point 0; one end may be clipped by half a step
    narrow       scale = max |w| / (2^(b-1) - 1)      zero point 0; the lowest code is not used (Jacob 2018)
    asymmetric   scale = (max - min) / (2^b - 1)      zero point: the code that stands for 0, rounded
    float8       scale = max |w| / largest float8     the codes are float8 values

A step is the distance between neighbouring values of the grid: the scale for integers; for float8 it grows with the
value. Rounding changes a weight by at most half a step. All rules but the narrow range are compressed-tensors'
(``calculate_qparams``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paged_infer.kernels.quant.weight import QuantisedWeight, dequantise, pack_int4

Strategy = Literal["tensor", "channel", "group"]
Codes = Literal["int", "float8_e4m3fn", "float8_e5m2"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are quantised: bits, symmetry, and what shares a scale.

    Attributes:
        bits: bits of a code, 2 to 8.
        symmetric: the zero point is code 0; otherwise each group also stores a zero point.
        strategy: what shares a scale: the tensor, a channel (one row of W), or a group of columns of a row.
        group_size: columns of a group; None for the other strategies.
        codes: integers, or float8 (8 bits, symmetric).
        narrow_range: for symmetric integers, as in TensorFlow: codes -7 .. 7 instead of -8 .. 7 (4 bits).

    Raises:
        ValueError: bits out of range, a group size without the strategy "group" or the reverse, asymmetric float8, or a
            narrow range without symmetric integers.
    """

    bits: int
    symmetric: bool = True
    strategy: Strategy = "channel"
    group_size: int | None = None
    codes: Codes = "int"
    narrow_range: bool = False

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits={self.bits}: must be 2 to 8")
        if self.strategy not in ("tensor", "channel", "group"):
            raise ValueError(f"strategy={self.strategy!r}: must be 'tensor', 'channel' or 'group'")
        if (self.group_size is not None) != (self.strategy == "group"):
            rule = "needs one" if self.group_size is None else "takes none"
            raise ValueError(f"group_size={self.group_size}: strategy {self.strategy!r} {rule}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: must be at least 1")
        if self.codes not in ("int", "float8_e4m3fn", "float8_e5m2"):
            raise ValueError(f"codes={self.codes!r}: must be 'int', 'float8_e4m3fn' or 'float8_e5m2'")
        if self.codes != "int" and (self.bits != 8 or not self.symmetric):
            raise ValueError(f"codes={self.codes!r}: must have bits=8 and symmetric=True")
        if self.narrow_range and (self.codes != "int" or not self.symmetric):
            raise ValueError("narrow_range=True: must have codes='int' and symmetric=True")

    @property
    def lowest(self) -> int:
        """The lowest integer code; the highest is ``-1 - lowest``."""
        return -(2 ** (self.bits - 1))

    @property
    def float_dtype(self) -> torch.dtype | None:
        """The dtype of float8 codes; None for integers."""
        return None if self.codes == "int" else getattr(torch, self.codes)

    def group(self, columns: int, name: str = "the weight") -> int:
        """How many columns share a scale, in a row of ``columns``.

        Raises:
            ValueError: the group size does not divide ``columns``; the message has ``name`` and sizes that do.
        """
        size = self.group_size
        if size is None:
            return columns
        if columns % size:
            fitting = [n for n in range(1, columns + 1) if columns % n == 0]
            near = [*[n for n in fitting if n < size][-1:], *[n for n in fitting if n > size][:1]]
            raise ValueError(
                f"group_size={size}: does not divide the {columns} columns of {name}; "
                f"{' or '.join(map(str, near))} would"
            )
        return size

    def bits_per_weight(self, columns: int, scale_bits: int = 16) -> float:
        """Bits per weight in rows of ``columns``, with scales of ``scale_bits`` and any zero points of ``bits``.

        The one scale of a tensor is not counted.
        """
        shared = 0 if self.strategy == "tensor" else scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + shared / self.group(columns)


def quantise(weight: Tensor, scheme: Scheme, name: str = "the weight") -> QuantisedWeight:
    """Round W [N, K] to nearest (RTN). After ``dequantise`` each weight has changed by at most half a step.

    Args:
        name: of W, for error messages.

    Raises:
        ValueError: the group size does not divide K, or W has values that are infinite or NaN.
    """
    scales, zeros = grid(weight, scheme, name)
    return encode(weight, scales, zeros, scheme)


def grid(weight: Tensor, scheme: Scheme, name: str = "the weight") -> tuple[Tensor, Tensor | None]:
    """W [N, K] -> the scales [N, G] of its groups and, if the scheme is asymmetric, their zero points as signed codes.

    A group whose weights are all 0 has scale 1.

    Raises:
        ValueError: as ``quantise``.
    """
    size = scheme.group(weight.shape[1], name)
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise ValueError(f"{name}: has values that are infinite or NaN")
    groups = weight.unflatten(1, (-1, size))  # [N, G, size]
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)  # so 0 is on the grid
    if scheme.strategy == "tensor":
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    steps = 2**scheme.bits - 1
    if scheme.float_dtype is not None:
        scales = torch.maximum(-low, high) / torch.finfo(scheme.float_dtype).max
    elif scheme.symmetric:
        scales = torch.maximum(-low, high) / (steps // 2 if scheme.narrow_range else steps / 2)
    else:
        scales = (high / 2 - low / 2) / (steps / 2)  # halved, so the difference cannot overflow; the bits are the same
    scales = torch.where(high > low, scales.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    if scheme.symmetric:
        return scales, None
    return scales, (scheme.lowest - (low / scales).round()).clamp(scheme.lowest, -1 - scheme.lowest)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> QuantisedWeight:
    """W [N, K], each weight as the nearest code of a grid such as ``grid`` returns: scales and zero points [N, G]."""
    rows, columns = weight.shape
    size = columns // scales.shape[1]
    codes = to_codes(weight.detach().float().unflatten(1, (-1, size)), scales[:, :, None], _wide(zeros), scheme)
    codes = codes.flatten(1)
    if scheme.float_dtype is not None:
        return QuantisedWeight(codes.to(scheme.float_dtype), scales, None, 8, size, (rows, columns))
    if scheme.bits == 4 and columns % 2 == 0:
        zeros, packed = None if zeros is None else zeros + 8, pack_int4(codes + 8)
        return QuantisedWeight(packed, scales, zeros, 4, size, (rows, columns))
    return QuantisedWeight(codes.to(torch.int8), scales, zeros, scheme.bits, size, (rows, columns))


def to_codes(weight: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """The nearest signed codes, in float32; scales and zero points broadcast with ``weight``."""
    codes = weight / scales
    if scheme.float_dtype is not None:
        limit = torch.finfo(scheme.float_dtype).max
        return codes.clamp(-limit, limit).to(scheme.float_dtype).float()
    codes = codes.round() if zeros is None else codes.round() + zeros
    return codes.clamp(scheme.lowest, -1 - scheme.lowest)


def rounded(weight: Tensor, scheme: Scheme, name: str = "the weight") -> Tensor:
    """W [N, K] quantised and dequantised, in float32."""
    return dequantise(quantise(weight, scheme, name))


def _wide(zeros: Tensor | None) -> Tensor | None:
    return None if zeros is None else zeros[:, :, None]

"""QuantisedWeight: the one form of a quantised matrix in memory, whatever the checkpoint's format.

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],   g = k // group_size

Codes of b bits are signed, -2^(b-1) .. 2^(b-1) - 1, and stored as int8. Two 4-bit codes are packed in a byte; packed
codes and their zero points are unsigned: the signed value + 8.

    values [N, K/2] uint8     bits 7..4: column 2 i + 1     bits 3..0: column 2 i
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeight:
    """W [N, K] as codes, with a scale for each group of ``group_size`` columns of a row; G = K / group_size.

    Attributes:
        values: the codes: int8 [N, K]; uint8 [N, K / 2], two 4-bit codes per byte; or float8 [N, K].
        scales: [N, G] float32.
        zeros: zero points, the codes that stand for 0, [N, G] float32; None: 0, or 8 for packed codes.
        bits: bits of a code.
        group_size: columns that share a scale.
        shape: (N, K).
        columns: [K] int64: the model's input k is multiplied by the stored column ``columns[k]``; None: by column k.

    Raises:
        ValueError: the group size does not divide K, or a tensor's shape does not fit; the message names it.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, int]
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if columns % self.group_size:
            raise ValueError(f"group_size={self.group_size}: must divide the {columns} columns")
        groups, width = columns // self.group_size, columns // 2 if self.is_packed else columns
        expected: dict[str, tuple[int, ...]] = {"values": (rows, width), "scales": (rows, groups)}
        expected |= {} if self.zeros is None else {"zeros": (rows, groups)}
        expected |= {} if self.columns is None else {"columns": (columns,)}
        for name, shape in expected.items():
            if (actual := tuple(getattr(self, name).shape)) != shape:
                raise ValueError(f"{name} has shape {list(actual)}, not {list(shape)}, for W {list(self.shape)}")

    @property
    def is_packed(self) -> bool:
        """Whether each byte of ``values`` holds two codes."""
        return self.values.dtype == torch.uint8

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.values, self.scales, self.zeros, self.columns)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def dequantise(weight: QuantisedWeight) -> Tensor:
    """W [N, K] in float32, its columns in the order of the model's inputs: the reference for all kernels."""
    codes = signed_codes(weight).unflatten(1, (-1, weight.group_size))  # [N, G, group_size]
    dense = (codes * weight.scales[:, :, None]).flatten(1)
    return dense if weight.columns is None else dense[:, weight.columns]


def signed_codes(weight: QuantisedWeight) -> Tensor:
    """code - zero point, [N, K] float32, in the stored order of the columns."""
    codes = unpack_int4(weight.values) if weight.is_packed else weight.values
    codes = codes.float().unflatten(1, (-1, weight.group_size))
    if weight.zeros is not None:
        codes = codes - weight.zeros[:, :, None]
    elif weight.is_packed:
        codes = codes - 8
    return codes.flatten(1)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0 .. 15, [..., K] -> uint8 [..., K / 2], the even column in the low bits.

    Raises:
        ValueError: K is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} columns: must be even, because 4-bit codes are packed in pairs")
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of ``pack_int4``: uint8 [..., K / 2] -> codes 0 .. 15, uint8 [..., K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)

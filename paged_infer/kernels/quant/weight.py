"""A matrix of few bits: the one form in memory, whatever the file's format was, and what it stands for.

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],   g = k // group_size

Codes of b bits are signed, -2^(b-1) .. 2^(b-1) - 1, and stored as int8. Codes of 4 bits are packed in pairs; a packed
one is unsigned: the signed code + 8, and so is its zero.

    values [N, K/2] uint8     bits 7..4: column 2 i + 1     bits 3..0: column 2 i
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeight:
    """W [N, K] as codes, and a scale for each group of ``group_size`` columns of a row; G = K / group_size.

    Attributes:
        values: int8 [N, K]; uint8 [N, K / 2], pairs of 4 bits; or float8 [N, K].
        scales: [N, G] float32.
        zeros: [N, G] float32, the code that stands for 0; None: 0, and 8 among packed codes.
        bits: of one code.
        shape: (N, K).
        columns: [K] int64, the stored column that the model's input k is multiplied by; None: k.
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
        """Whether each byte of ``values`` has two codes."""
        return self.values.dtype == torch.uint8

    @property
    def num_bytes(self) -> int:
        tensors = (self.values, self.scales, self.zeros, self.columns)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def dequantise(weight: QuantisedWeight) -> Tensor:
    """W [N, K] in float32, its columns in the order of the model's input; the reference of all kernels."""
    codes = signed_codes(weight).unflatten(1, (-1, weight.group_size))  # [N, G, group_size]
    dense = (codes * weight.scales[:, :, None]).flatten(1)
    return dense if weight.columns is None else dense[:, weight.columns]


def signed_codes(weight: QuantisedWeight) -> Tensor:
    """code - zero, [N, K] float32, in the order in which they are stored."""
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
        raise ValueError(f"{codes.shape[-1]} columns: codes of 4 bits are packed in pairs")
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of ``pack_int4``: uint8 [..., K / 2] -> codes 0 .. 15, uint8 [..., K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)

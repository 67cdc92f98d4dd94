"""Codes packed into words of 32 bits, and checks that the tensors of a checkpoint are such words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.model.linear import Piece


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] -> codes 0 .. 2^bits - 1, int32 [..., W * 32 // bits], lowest bits first, across words."""
    if 32 % bits:
        first = torch.arange(words.shape[-1] * 32 // bits, device=words.device) * bits
        wide = F.pad(words, (0, 1)).long() & 0xFFFFFFFF
        both = wide[..., first // 32] | wide[..., first // 32 + 1] << 32
        return (both >> first % 32 & 2**bits - 1).int()
    shifts = torch.arange(32 // bits, device=words.device, dtype=torch.int32) * bits
    return (words[..., None] >> shifts & 2**bits - 1).flatten(-2)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1, [..., K] -> int32 [..., ceil(K bits / 32)]: the inverse of ``unpack_words``."""
    each = (codes[..., None].int() >> torch.arange(bits, dtype=torch.int32) & 1).flatten(-2)
    words = F.pad(each, (0, -each.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (words << torch.arange(32, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def as_stored(tensor: Tensor, dtype: torch.dtype, piece: Piece, what: str = "codes") -> Tensor:
    """Raises ValueError for another dtype."""
    if tensor.dtype != dtype:
        raise ValueError(f"{piece.name}: {what} are stored as {tensor.dtype}, not {dtype}")
    return tensor


def checked_words(tensor: Tensor, piece: Piece, bits: int) -> Tensor:
    """``unpack_words`` of what must be words: others have fewer bits, or numbers that are no codes."""
    return unpack_words(as_stored(tensor, torch.int32, piece, "packed codes"), bits)


def group_numbers(tensor: Tensor, piece: Piece) -> Tensor:
    """Those of ``g_idx``, int32: another dtype could round them, or lose bits, as it becomes int32."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{piece.name}: g_idx is stored as {tensor.dtype}, not torch.int32")
    limits = torch.iinfo(torch.int32)
    return tensor.clamp(limits.min, limits.max).int()

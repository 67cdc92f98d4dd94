"""Codes packed into 32-bit words, and checks of the packed tensors of a checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.model.linear import Piece


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] -> codes 0 .. 2^bits - 1, int32 [..., W * 32 // bits].

    The first code is in the lowest bits. Where ``bits`` does not divide 32, a code may span two words.
    """
    if 32 % bits:
        first = torch.arange(words.shape[-1] * 32 // bits, device=words.device) * bits
        wide = F.pad(words, (0, 1)).long() & 0xFFFFFFFF
        both = wide[..., first // 32] | wide[..., first // 32 + 1] << 32
        return (both >> first % 32 & 2**bits - 1).int()
    shifts = torch.arange(32 // bits, device=words.device, dtype=torch.int32) * bits
    return (words[..., None] >> shifts & 2**bits - 1).flatten(-2)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1, [..., K] -> int32 [..., ceil(K bits / 32)]: the inverse of ``unpack_words``."""
    if 32 % bits == 0:
        shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
        codes = F.pad(codes.int(), (0, -codes.shape[-1] % len(shifts))).unflatten(-1, (-1, len(shifts)))
        return (codes << shifts).sum(-1, dtype=torch.int32)
    each = (codes[..., None].int() >> torch.arange(bits, dtype=torch.int32) & 1).flatten(-2)
    words = F.pad(each, (0, -each.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (words << torch.arange(32, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def as_stored(tensor: Tensor, dtype: torch.dtype, piece: Piece, what: str = "codes") -> Tensor:
    """``tensor`` itself; raises ValueError unless its dtype is ``dtype``. ``what`` is its name in the message."""
    if tensor.dtype != dtype:
        raise ValueError(f"{piece.name}: {what} are stored as {tensor.dtype}, not {dtype}")
    return tensor


def checked_words(tensor: Tensor, piece: Piece, bits: int) -> Tensor:
    """``unpack_words`` after a check of the dtype: a narrower one lacks bits, and floats hold no packed codes."""
    return unpack_words(as_stored(tensor, torch.int32, piece, "packed codes"), bits)


def group_numbers(tensor: Tensor, piece: Piece) -> Tensor:
    """``g_idx`` as int32. Raises ValueError unless it is int32 or int64: a float could lose bits.

    Numbers beyond int32 are clamped, not wrapped, so the check of the groups still refuses them.
    """
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{piece.name}: g_idx is stored as {tensor.dtype}, not torch.int32")
    limits = torch.iinfo(torch.int32)
    return tensor.clamp(limits.min, limits.max).int()

"""Formats whose blocks hold codes and scales together (GGUF, MXFP4), and rounding of float tensors on loading.

    Q8_0    32 weights in 34 bytes    d float16, codes int8
    Q4_0    32 in 18                  d, then 16 bytes: weight i in the low half of byte i, i + 16 in the high half
    Q4_1    32 in 20                  d, m, the same 16 bytes; w = code d + m
    Q4_K    256 in 144                d, dmin, 8 scales and 8 minima of 6 bits in 12 bytes, 128 bytes of codes
    Q6_K    256 in 210                low 4 bits, high 2 bits, 16 int8 scales, d
    MXFP4   32 in 16 + 1              float4 e2m1, the even weight in the low half; exponent e: the scale is 2^(e - 127)

Sources, read: ggml's ``get_scale_min_k4`` and ``dequantize_row_q6_K`` (``ggml-quants.c``); transformers 5.23
``integrations/mxfp4.py``. The other blocks are from memory, and tested against the ``gguf`` package.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from math import gcd

import torch
from torch import Tensor

from paged_infer.kernels.quant.product import Activations
from paged_infer.kernels.quant.weight import QuantisedWeight, pack_int4, unpack_int4
from paged_infer.model.linear import Piece
from paged_infer.model.quant.formats import Format
from paged_infer.model.quant.scheme import Scheme, encode, grid
from paged_infer.model.quant.stored_piece import ROWS, Along, StoredPiece, stored_piece
from paged_infer.model.quantization_config import StoredAs

logger = logging.getLogger(__name__)

FLOAT4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of e2m1, so that they are int8
Decoded = tuple[Tensor, Tensor, Tensor | None]  # codes [N, K]: 0 .. 15 or int8; scales [N, G]; zeros [N, G] or None


class Rounded(Format):
    """A float checkpoint, rounded to nearest tensor by tensor while it is loaded.

    A scale depends on all columns that share it. So a rank that holds some of the columns reads all of them, and scales
    do not depend on the number of ranks. Activations, though, are rounded by each rank with its own scales.
    """

    def __init__(self, scheme: Scheme, activations: Activations | None = None) -> None:
        super().__init__(StoredAs("plain", scheme.bits, has_zeros=not scheme.symmetric, activations=activations))
        self.scheme = scheme

    def group(self, columns: int) -> int:
        """A group size that does not divide the columns is reduced to their greatest common divisor."""
        return columns if self.scheme.group_size is None else gcd(self.scheme.group_size, columns)

    def tensors(self, piece: Piece) -> dict[str, StoredPiece]:
        columns = piece.shape[piece.column_dim]
        if self.group(columns) != (self.scheme.group_size or columns):
            _warn_about_group(self.scheme.group_size, columns, self.group(columns))
        if piece.shard is not None and piece.shard.along == "columns":
            return {"values": replace(_dense(piece), shape=piece.stored_shape, cut=None)}
        return {"values": _dense(piece)}

    def decode(self, parameter: str, piece: Piece, tensor: Tensor) -> dict[str, Tensor]:
        rows = piece.to_rows(tensor)
        scheme = self.scheme
        if scheme.group_size is not None:
            scheme = Scheme(scheme.bits, scheme.symmetric, "group", self.group(rows.shape[1]), scheme.codes)
        scales, zeros = grid(rows, scheme, piece.name)
        own = slice(0, rows.shape[1])
        if (columns := piece.shape[piece.column_dim]) < rows.shape[1] and piece.cut is not None:
            (share,), group = piece.cut.ranges[piece.column_dim], self.group(columns)
            own = slice(share.start, share.stop)
            if scheme.group_size is not None:
                groups, repeats = slice(own.start // group, own.stop // group), scheme.group_size // group
                scales = scales.repeat_interleave(repeats, 1)[:, groups]
                zeros = None if zeros is None else zeros.repeat_interleave(repeats, 1)[:, groups]
        found = encode(rows[:, own], scales, zeros, scheme)
        return {"values": found.values, "scales": found.scales} | (
            {} if found.zeros is None else {"zeros": found.zeros}
        )


@cache
def _warn_about_group(size: int | None, columns: int, group: int) -> None:
    logger.warning("group_size=%d: does not divide rows of %d columns; they use group_size=%d", size, columns, group)


def _dense(piece: Piece, as_stored: bool = False) -> StoredPiece:
    name, shape, rows = piece.name, piece.shape, piece.num_rows
    return StoredPiece(name, shape, source=piece, rows=rows, as_stored=as_stored, cut=piece.cut)


class Gguf(Format):
    """The blocks of a GGUF file.

    Args:
        types: type of each matrix by its name, all in ``GGUF_TYPES``. If one Linear has several types (such as q and v
            in Q4_K_M), they are held in one form: int8 if any type has 8 or 6 bits, zero points if any type has minima,
            and the smallest group size.
    """

    strict = False  # a block of zeros has scale 0

    def __init__(self, types: Mapping[str, str]) -> None:
        used = {*types.values()}
        are_nibbles = all(kind.startswith("Q4") for kind in used)
        zeros = bool(used & {"Q4_1", "Q4_K"})
        super().__init__(StoredAs("plain", 4 if are_nibbles else 8, 16 if "Q6_K" in used else 32, has_zeros=zeros))
        self.types = types

    def tensors(self, piece: Piece) -> dict[str, StoredPiece]:
        return {"values": _dense(piece, as_stored=True)}

    def decode(self, parameter: str, piece: Piece, tensor: Tensor) -> dict[str, Tensor]:
        kind = self.types[piece.name]
        codes, scales, zeros = GGUF_TYPES[kind](tensor)
        middle = 8 if kind.startswith("Q4") else 0
        zeros = torch.full_like(scales, middle) if zeros is None else zeros
        if self.bits == 4:
            values = pack_int4(codes)
        else:
            values, zeros = (codes.to(torch.int16) - middle).to(torch.int8), zeros - middle
        repeats = codes.shape[1] // scales.shape[1] // self.group(codes.shape[1])
        grid = {"scales": scales.repeat_interleave(repeats, 1), "zeros": zeros.repeat_interleave(repeats, 1)}
        return {"values": values} | (grid if self.has_zeros else {"scales": grid["scales"]})


def _blocks(tensor: Tensor, size: int) -> Tensor:
    """uint8 [N, row bytes] -> [N, G, size]."""
    return tensor.unflatten(1, (-1, size))


def _half(blocks: Tensor, first: int) -> Tensor:
    """The float16 at byte ``first`` of each block: [N, G] float32."""
    return blocks[..., first : first + 2].contiguous().view(torch.float16)[..., 0].float()


def _nibbles(packed: Tensor) -> Tensor:
    """Bytes [..., B] -> the low halves of all, then the high halves, [..., 2 B]."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _with_minimum(codes: Tensor, scales: Tensor, minima: Tensor) -> Decoded:
    """w = code * scale + minimum, as (code - zero) * scale. Where scale is 0, w is the minimum: (0 - -1) * minimum."""
    flat = scales == 0
    scales, zeros = torch.where(flat, minima, scales), torch.where(flat, -1.0, -minima / scales)
    groups = codes.unflatten(1, (scales.shape[1], -1)).masked_fill(flat[..., None], 0)
    return groups.flatten(1), scales, zeros


def q8_0(tensor: Tensor) -> Decoded:
    blocks = _blocks(tensor, 34)
    return blocks[..., 2:].contiguous().view(torch.int8).flatten(1), _half(blocks, 0), None


def q4_0(tensor: Tensor) -> Decoded:
    blocks = _blocks(tensor, 18)
    return _nibbles(blocks[..., 2:]).flatten(1), _half(blocks, 0), None


def q4_1(tensor: Tensor) -> Decoded:
    blocks = _blocks(tensor, 20)
    return _with_minimum(_nibbles(blocks[..., 4:]).flatten(1), _half(blocks, 0), _half(blocks, 2))


def q4_k(tensor: Tensor) -> Decoded:
    blocks = _blocks(tensor, 144)
    low, middle, high = blocks[..., 4:16].split(4, -1)  # scales 0..3, minima 0..3, and the low 4 bits of both for 4..7
    scales = torch.cat((low & 63, high & 15 | low >> 6 << 4), -1)
    minima = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), -1)
    codes = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(1)
    scales = _half(blocks, 0)[..., None] * scales
    return _with_minimum(codes, scales.flatten(1), (-_half(blocks, 2)[..., None] * minima).flatten(1))


def q6_k(tensor: Tensor) -> Decoded:
    blocks = _blocks(tensor, 210)
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))  # [N, G, 2, 128]
    high = blocks[..., 128:192].unflatten(-1, (2, 32))
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    codes = ((low | high << 4).to(torch.int8) - 32).flatten(1)
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    return codes, (_half(blocks, 208)[..., None] * scales).flatten(1), None


GGUF_TYPES: dict[str, Callable[[Tensor], Decoded]] = {
    "Q8_0": q8_0,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q4_K": q4_k,
    "Q6_K": q6_k,
}


class Mxfp4(Format):
    """gpt-oss' experts, all in one tensor, held as they are stored; ``weight`` expands them to int8 in each product."""

    strict = False
    is_expanded = True

    def describe(self) -> str:
        return "MXFP4"

    def held(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"values": ((rows, columns // 2), torch.uint8), "scales": ((rows, columns // 32), torch.uint8)}

    def tensors(self, piece: Piece) -> dict[str, StoredPiece]:
        if not piece.is_stack:
            raise ValueError(f"{piece.name}: MXFP4 is supported only for experts stored as one tensor")
        experts, columns = piece.stored_shape[:2]
        if columns % 32:
            raise ValueError(f"group_size=32: does not divide the {columns} columns of {piece.name}")
        dims = experts, ROWS, Along("columns", 32)
        return {
            "values": stored_piece(f"{piece.name}_blocks", (*dims, 16), piece, is_float=False),
            "scales": stored_piece(f"{piece.name}_scales", dims, piece, is_float=False),
        }

    def decode(self, parameter: str, piece: Piece, tensor: Tensor) -> dict[str, Tensor]:
        if tensor.dtype != torch.uint8:
            raise ValueError(f"{piece.name}: {parameter} are stored as {tensor.dtype}, not torch.uint8")
        if parameter == "scales" and bool((tensor == 255).any()):
            raise ValueError(f"{piece.name}_scales: exponent 255, which is NaN: must be 0 to 254")
        return {parameter: tensor.flatten(0, 1).flatten(1)}

    def weight(self, held: dict[str, Tensor], shape: tuple[int, int], columns: Tensor | None) -> QuantisedWeight:
        table = torch.tensor(FLOAT4, dtype=torch.int8, device=held["values"].device)
        scales = torch.exp2(held["scales"].float() - 128)
        return QuantisedWeight(table[unpack_int4(held["values"]).long()], scales, None, 8, 32, shape)

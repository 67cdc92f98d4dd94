"""Quantised checkpoint formats: the tensors that store one matrix W [N, K], and how they are decoded.

    packed  compressed-tensors   weight_packed [N, K b / 32] int32, codes + 2^(b-1) along K, lowest bits first, across
                                 words; weight_scale [N, G], weight_zero_point [N b / 32, G] int32, packed along N;
                                 weight_shape [2], weight_g_idx [K]
    plain   compressed-tensors   weight [N, K] int8 or float8, weight_scale [N, G], [N, 1] or [1]
    awq     AutoAWQ, gemm        qweight [K, N / 8] int32, qzeros [K / g, N / 8], scales [K / g, N]; bits 4 i .. 4 i + 3
                                 of a word are column (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight
    gptq    GPTQ v1, v2          qweight [K b / 32, N] int32, qzeros [G, N b / 32], scales [G, N], g_idx [K]; v1 stores
                                 each zero point minus one
    fp8     DeepSeek             weight [N, K] float8, weight_scale_inv: a scale for each block, of 128 by 128

A code has b bits, a group g columns, and a row G groups. Sources, read: compressed-tensors 0.20.1
``compressors/pack_quantized``, AutoAWQ ``awq/utils/packing_utils.py``, GPTQModel ``utils/model.py`` (v1's zero points),
transformers 5.23 ``integrations/finegrained_fp8.py``. From memory: the layout of GPTQ's words and compressed-tensors'
``weight_g_idx``, which the tests pack by themselves.
"""

from __future__ import annotations

from fractions import Fraction
from math import gcd, prod

import torch
from torch import Tensor

from paged_infer.kernels.quant.product import Activations
from paged_infer.kernels.quant.weight import QuantisedWeight, pack_int4
from paged_infer.model.linear import Piece
from paged_infer.model.quant.stored_piece import (
    COLUMNS,
    ROWS,
    Along,
    Dims,
    StoredPiece,
    own_groups,
    stored_piece,
    whole_sizes,
)
from paged_infer.model.quant.words import as_stored, checked_words, group_numbers
from paged_infer.model.quantization_config import StoredAs

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # column j of eight is nibble AWQ_ORDER[j]


class Format:
    """How W is held in memory, and which tensors of the checkpoint store it. A subclass reads some ``StoredAs.kind``.

    Attributes:
        has_zeros, has_order: ``zeros`` and ``g_idx`` are held.
        float_dtype: dtype of float codes; None: integers.
        activations: how x is rounded before the product; None: weight-only.
        strict: a scale <= 0 is an error.
        is_expanded: ``weight`` is larger than what is held, so it is computed in every product.
    """

    float_dtype: torch.dtype | None = None
    strict = True
    is_expanded = False

    def __init__(self, stored: StoredAs) -> None:
        self.stored = stored
        self.bits, self.has_zeros, self.has_order = stored.bits, stored.has_zeros, stored.has_order
        self.activations: Activations | None = stored.activations
        self.float_dtype = torch.float8_e4m3fn if stored.is_float else None

    def describe(self) -> str:
        """The type of the codes, for messages."""
        return f"{self.bits} bits" if self.float_dtype is None else "float8"

    def describe_group(self, columns: int) -> str:
        """What shares a scale in rows of ``columns``, for messages."""
        if self.stored.block is not None:
            return "one scale per block of {} x {}".format(*self.stored.block)
        group = self.group(columns)
        return "one scale per row" if group == columns else f"group size {group}"

    def packs(self, columns: int) -> bool:
        """Whether codes are held in pairs, two to a byte."""
        return self.float_dtype is None and self.bits <= 4 and columns % 2 == 0

    def group(self, columns: int) -> int:
        """How many columns share a scale in memory."""
        return self.stored.group_size or columns

    def held(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors in memory: ``values``, ``scales`` and, if ``has_zeros``, ``zeros``."""
        is_packed = self.packs(columns)
        grid = (rows, columns // self.group(columns)), torch.float32
        held: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"scales": grid}
        held["values"] = (rows, columns // 2), torch.uint8
        if not is_packed:
            held["values"] = (rows, columns), self.float_dtype or torch.int8
        return held | ({"zeros": grid} if self.has_zeros else {})

    def tensors(self, piece: Piece) -> dict[str, StoredPiece]:
        """Our parameter (``values``, ``scales``, ...) -> the checkpoint's tensor that fills it.

        Raises:
            ValueError: the matrix cannot be stored in this format: the group size does not divide its columns, or ranks
                do not divide its groups.
        """
        raise NotImplementedError

    def decode(self, parameter: str, piece: Piece, tensor: Tensor) -> dict[str, Tensor]:
        """The checkpoint's tensor for ``parameter`` -> rows of our parameters, in the checkpoint's order."""
        raise NotImplementedError

    def weight(self, held: dict[str, Tensor], shape: tuple[int, int], columns: Tensor | None) -> QuantisedWeight:
        """W from the tensors in memory; zero points that are all 0 are left out."""
        values, zeros = held["values"], held.get("zeros")
        if zeros is not None and bool((zeros == (8 if values.dtype == torch.uint8 else 0)).all()):
            zeros = None
        bits = 4 if values.dtype == torch.uint8 else 8
        return QuantisedWeight(values, held["scales"], zeros, bits, shape[1] // held["scales"].shape[1], shape, columns)

    def codes(self, codes: Tensor) -> Tensor:
        """Codes 0 .. 2^b - 1, [N, K] -> ``values``."""
        is_packed = self.packs(codes.shape[1])
        codes = codes + self.shift(codes.shape[1])
        return pack_int4(codes) if is_packed else codes.to(torch.int8)

    def shift(self, columns: int) -> int:
        """What is added to a code 0 .. 2^b - 1 to get the code that we hold."""
        return (8 if self.packs(columns) else 0) - 2 ** (self.bits - 1)

    def zero_points(self, zeros: Tensor, piece: Piece) -> Tensor:
        """Zero points 0 .. 2^b - 1, [N, G] -> ``zeros``. Raises ValueError for one out of range."""
        if (wrong := zeros[(zeros < 0) | (zeros >= 2**self.bits)]).numel():
            raise ValueError(f"{piece.name}: zero point {int(wrong[0])}: must be 0 to {2**self.bits - 1}")
        return (zeros + self.shift(_sizes(piece)[1])).float()

    def _groups(self, piece: Piece) -> Along | int:
        """The dimension of the scales along the groups of a row; 1 if the whole row shares a scale."""
        size, columns = self.stored.group_size, whole_sizes(piece)[1]
        if size is not None and columns % size:
            raise ValueError(f"group_size={size}: does not divide the {columns} columns of {piece.name}")
        return 1 if size is None else Along("columns", size)

    def _refuse_stack(self, piece: Piece) -> None:
        if piece.is_stack:
            raise ValueError(f"{piece.name}: experts stored as one tensor must be floats or MXFP4")


def _sizes(piece: Piece) -> tuple[int, int]:
    """N and K of the matrix, or of the rank's part of it."""
    return piece.num_rows, prod(piece.shape) // piece.num_rows


def _module(piece: Piece) -> str:
    return piece.name.removesuffix(".weight")


def _named(piece: Piece, **tensors: tuple[str, Dims]) -> dict[str, StoredPiece]:
    """Pieces from the ending of each tensor's name and its dimensions. Scales must be stored as floats."""
    found = {}
    for parameter, (ending, dims) in tensors.items():
        name, rows = f"{_module(piece)}.{ending}", 1 if parameter in ("g_idx", "shape") else None
        found[parameter] = stored_piece(name, dims, piece, is_float=parameter == "scales", rows=rows)
    return found


class Compressed(Format):
    """compressed-tensors, ``packed`` and ``plain``."""

    scales = "weight_scale"

    def tensors(self, piece: Piece) -> dict[str, StoredPiece]:
        self._refuse_stack(piece)
        stored, groups = self.stored, self._groups(piece)
        grid: Dims = (1,) if stored.per_tensor else (ROWS, groups)
        if stored.block is not None:
            grid = Along("rows", stored.block[0]), Along("columns", stored.block[1])
        tensors: dict[str, tuple[str, Dims]] = {"values": ("weight", (ROWS, COLUMNS)), "scales": (self.scales, grid)}
        zeros = grid
        if stored.kind == "packed":
            in_word = Fraction(32, stored.bits)
            tensors["values"] = ("weight_packed", (ROWS, Along("columns", in_word)))
            tensors["shape"] = ("weight_shape", (2,))
            zeros = Along("rows", in_word), groups
        if stored.has_zeros:
            tensors["zeros"] = ("weight_zero_point", zeros)
        if stored.has_order:
            tensors["g_idx"] = ("weight_g_idx", (COLUMNS,))
        return _named(piece, **tensors)

    def group(self, columns: int) -> int:
        return super().group(columns) if self.stored.block is None else gcd(self.stored.block[1], columns)

    def decode(self, parameter: str, piece: Piece, tensor: Tensor) -> dict[str, Tensor]:
        rows, columns = _sizes(piece)
        is_packed, middle = self.stored.kind == "packed", 2 ** (self.bits - 1)
        if parameter == "values" and self.float_dtype is not None:
            return {"values": as_stored(tensor, self.float_dtype, piece)}
        if parameter == "values":
            if is_packed:
                return {"values": self.codes(checked_words(tensor, piece, self.bits)[:, :columns])}
            codes = tensor.to(torch.int32) + middle
            if tensor.dtype != torch.int8 or bool(((codes < 0) | (codes >= 2 * middle)).any()):
                raise ValueError(f"{piece.name}: must have int8 codes within {-middle} .. {middle - 1}")
            return {"values": self.codes(codes)}
        if parameter == "zeros" and not is_packed:
            codes = as_stored(tensor, torch.int8, piece, "zero points").to(torch.int32) + middle
            return {"zeros": self.zero_points(codes.expand(rows, -1), piece)}
        if parameter == "zeros":
            return {"zeros": self.zero_points(checked_words(tensor.t(), piece, self.bits)[:, :rows].t(), piece)}
        if parameter == "scales":
            return {"scales": _spread(tensor, rows, columns, self.stored.block, self.group(columns))}
        if parameter == "shape" and (tensor.is_complex() or tensor.tolist() != [*whole_sizes(piece)]):
            raise ValueError(f"{_module(piece)}.weight_shape is {tensor.tolist()}, not {[*whole_sizes(piece)]}")
        if parameter == "g_idx":
            return {"g_idx": own_groups(group_numbers(tensor, piece), piece, self.group(columns))[None]}
        return {parameter: tensor[None]}


def _spread(scales: Tensor, rows: int, columns: int, block: tuple[int, int] | None, group: int) -> Tensor:
    """Scales [1], [N, G] or one per block -> [N, G]."""
    if block is None:
        return scales.float().reshape(-1, 1 if scales.dim() == 1 else scales.shape[1]).expand(rows, -1)
    row, column = (torch.arange(*span, device=scales.device) for span in ((0, rows), (0, columns, group)))
    return scales.float()[row // block[0]][:, column // block[1]]


class Fp8(Compressed):
    """DeepSeek's block-wise float8. The product is weight-only, as in transformers on a CPU, which dequantises."""

    scales = "weight_scale_inv"


class Awq(Format):
    def tensors(self, piece: Piece) -> dict[str, StoredPiece]:
        self._refuse_stack(piece)
        groups, rows = self._groups(piece), whole_sizes(piece)[0]
        if rows % 8:
            raise ValueError(f"{piece.name} has {rows} rows: must be a multiple of 8, the codes in an AWQ word")
        return _named(
            piece,
            values=("qweight", (COLUMNS, Along("rows", 8))),
            scales=("scales", (groups, ROWS)),
            zeros=("qzeros", (groups, Along("rows", 8))),
        )

    def decode(self, parameter: str, piece: Piece, tensor: Tensor) -> dict[str, Tensor]:
        if parameter == "scales":
            return {"scales": tensor.t().float()}
        nibbles = checked_words(tensor, piece, 4).unflatten(1, (-1, 8))
        codes = nibbles[..., list(AWQ_ORDER)].flatten(1).t()
        return {parameter: self.codes(codes) if parameter == "values" else self.zero_points(codes, piece)}


class Gptq(Format):
    def tensors(self, piece: Piece) -> dict[str, StoredPiece]:
        self._refuse_stack(piece)
        (rows, columns), groups, per_word = whole_sizes(piece), self._groups(piece), 32 // self.bits
        if rows % per_word or columns % per_word:
            raise ValueError(f"{piece.name} is {[rows, columns]}: both must be multiples of {per_word}, as GPTQ packs")
        return _named(
            piece,
            values=("qweight", (Along("columns", per_word), ROWS)),
            scales=("scales", (groups, ROWS)),
            zeros=("qzeros", (groups, Along("rows", per_word))),
            g_idx=("g_idx", (COLUMNS,)),
        )

    def decode(self, parameter: str, piece: Piece, tensor: Tensor) -> dict[str, Tensor]:
        if parameter == "scales":
            return {"scales": tensor.t().float()}
        if parameter == "g_idx":
            return {"g_idx": own_groups(group_numbers(tensor, piece), piece, self.group(_sizes(piece)[1]))[None]}
        if parameter == "values":
            return {"values": self.codes(checked_words(tensor.t(), piece, self.bits))}
        zeros = checked_words(tensor, piece, self.bits).t() + self.stored.zero_offset
        return {"zeros": self.zero_points(zeros, piece)}


FORMATS: dict[str, type[Format]] = {"packed": Compressed, "plain": Compressed, "awq": Awq, "gptq": Gptq, "fp8": Fp8}

"""x W^T + b for quantised W, in Triton on tensor cores. The reference is ``product.quantised_linear``.

A program multiplies a tile of W, HEIGHT of its rows, by a tile of x, ROWS tokens, DEPTH columns at a time:

    codes of W [HEIGHT, DEPTH]  x  x transposed [DEPTH, ROWS]  ->  sums [HEIGHT, ROWS]

    x is      W is                 multiplied as        summed in                      scaled
    float     int4, int8, float8   x's dtype            float32                        after each group of columns
    int8      int8, no groups      int8                 int32, which is exact          at the end, with x's scale
    float8    float8               float8               float32, after each product    after each group, and at the end

A group's scale multiplies its sums, not its weights: codes are exact in x's dtype, so W is not rounded to that dtype.

W is the left operand because a tensor core instruction takes 64 rows of it, but any multiple of 8 tokens. So few tokens
waste little, and any number of tokens uses the same instruction.

Split-K: few tokens give too few tiles to keep the memory busy. Then the columns are divided into ``splits``, each
computed by its own program, and a second kernel adds their sums in order (no atomics). With many tokens one program
computes all splits in turn and adds their sums in the same order. How many splits there are depends on the shape of W
and on the GPU, never on the number of tokens, so a row has the same bits in any batch.

4-bit codes are rearranged, so that a tile is contiguous and each half of its bytes is a run of columns:

    panels [K / (2 DEPTH), N, DEPTH] uint8    byte j of panel p: columns 2 p DEPTH + j (low) and (2 p + 1) DEPTH + j
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.kernels.checks import FLOATS
from paged_infer.kernels.quant.product import Activations, float8_tokens
from paged_infer.kernels.quant.rounding import round_tokens
from paged_infer.kernels.quant.tiles import FEW_TOKENS, linear_tile, num_splits
from paged_infer.kernels.quant.weight import QuantisedWeight, unpack_int4
from paged_infer.kernels.triton_runtime import capability, launch, must_widen, tl, triton

COMBINED = 256  # outputs of a program of the second kernel


@dataclass(frozen=True, slots=True, eq=False)
class TritonProduct:
    """x [T, K] -> x W^T + b. It is batch-invariant: the bits of a row do not depend on the other rows.

    Attributes:
        form: the codes that the kernel decodes: "int4", "int8" or "float8"; "none": it multiplies them as they are.
        values: int4: panels; else [N, K].
        scales, zeros: [G, N] float32.
        order: [K], the columns of x in the stored order of the codes; None: they are in that order.
        depth: columns of one ``tl.dot``.
    """

    shape: tuple[int, int]
    form: str
    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    order: Tensor | None
    activations: Activations | None
    depth: int
    splits: int

    @property
    def kernel(self) -> str:
        """Its name in a tile table."""
        return {"int4": "w4a16", "none": "w8a8"}.get(self.form, "w8a16")

    def __call__(self, x: Tensor) -> Tensor:
        """
        Raises:
            ValueError: x does not have K columns, is not a float tensor, or is on another device.
        """
        height, columns = self.shape
        if x.shape[-1] != columns or x.dtype not in FLOATS or x.device != self.values.device:
            ours = f"W {[height, columns]} on {self.values.device}"
            raise ValueError(f"x {list(x.shape)} of {x.dtype} on {x.device} does not fit {ours}")
        if x.dim() != 2:
            return self(x.reshape(-1, columns)).view(*x.shape[:-1], height)
        if self.order is not None:
            x = x.index_select(1, self.order)
        elif x.stride(1) != 1:
            x = x.contiguous()
        out, x_scales = x.new_empty(len(x), height), None
        if self.activations is not None and self.form == "none":
            x, x_scales = round_tokens(x, self.activations)
        elif self.activations is not None:  # float8, on a GPU whose tensor cores do not multiply it
            codes, scales = float8_tokens(x)
            x = (codes.float() * scales).to(x.dtype)
        self._multiply(x, x_scales, out)
        return out

    def _multiply(self, x: Tensor, x_scales: Tensor | None, out: Tensor) -> None:
        (height, columns), num_rows, groups = self.shape, len(x), len(self.scales)
        tile = linear_tile(capability(x.device), self.kernel, out.dtype, num_rows)
        is_packed, is_split = self.form == "int4", self.splits > 1 and num_rows <= FEW_TOKENS
        strides = (height * self.depth, self.depth) if is_packed else (self.depth, columns)
        steps = -(-columns // (self.depth * (1 + is_packed)))
        splits = 1 if x.dtype == torch.int8 and not is_split else self.splits  # int32 sums are exact in any order
        sums = torch.int32 if x.dtype == torch.int8 else torch.float32
        parts = out.new_empty(self.splits, num_rows, height, dtype=sums) if is_split else out
        zeros, *others = (out if one is None else one for one in (self.zeros, x_scales, self.bias))  # out: never read
        epilogue = (self.scales, *others, num_rows, height)
        flags = {"HAS_GROUPS": groups > 1, "HAS_X_SCALES": x_scales is not None, "HAS_BIAS": self.bias is not None}
        flags["enable_fp_fusion"] = sums == torch.float32  # integer sums are scaled without FMA, like the reference's
        launch(
            _quantised_kernel,
            (triton.cdiv(height, tile.block_n), self.splits if is_split else 1, triton.cdiv(num_rows, tile.block_m)),
            *(out, parts, x, self.values, zeros, *epilogue, columns, x.stride(0), *strides),
            *(columns // groups, steps, triton.cdiv(steps, splits), splits),
            **flags,
            FORM=self.form,
            HAS_ZEROS=self.zeros is not None,
            IS_SPLIT=is_split,
            IN_TURN=not is_split and splits > 1,
            HEIGHT=tile.block_n,
            ROWS=tile.block_m,
            DEPTH=self.depth,
            WIDEN=must_widen(x),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if is_split:
            grid = (triton.cdiv(height, COMBINED), num_rows)
            launch(_add_splits_kernel, grid, out, parts, *epilogue, self.splits, **flags, BLOCK=COMBINED)


def pack_triton(
    weight: QuantisedWeight, bias: Tensor | None, activations: Activations | None = None
) -> TritonProduct | None:
    """The product with W and b; None if the kernel lacks it: a group size that is no multiple of 16 (32 if x is
    rounded), float8 e5m2 or NaN, or, if x is rounded, W of another type, with zero points, or of int8 in groups."""
    values, device = weight.values, weight.values.device
    form = {torch.uint8: "int4", torch.int8: "int8", torch.float8_e4m3fn: "float8"}.get(values.dtype)
    has_groups = weight.scales.shape[1] > 1
    if activations is not None and (form != activations or weight.zeros is not None or (form == "int8" and has_groups)):
        return None
    is_rounded = activations == "int8" or (activations == "float8" and not (0, 0) < capability(device) < (8, 9))
    depths = (128, 64, 32) if is_rounded else (64, 32, 16)
    depth = next((n for n in depths if not has_groups or weight.group_size % n == 0), None)
    if depth is None or form is None:
        return None
    if form == "float8" and not values.is_meta and bool((values.view(torch.uint8) & 0x7F == 0x7F).any()):
        return None  # the kernel would decode NaN as 480
    with torch.inference_mode(False), torch.no_grad():
        return _packed(weight, bias, activations, "none" if is_rounded else form, depth)


def _packed(
    weight: QuantisedWeight, bias: Tensor | None, activations: Activations | None, form: str, depth: int
) -> TritonProduct:
    (height, columns), values = weight.shape, weight.values
    steps = -(-columns // depth)
    if form == "int4":
        steps = -(-steps // 2)
        codes = F.pad(unpack_int4(values), (0, steps * 2 * depth - columns)).view(height, steps, 2, depth)
        values = (codes[:, :, 0] | codes[:, :, 1] << 4).transpose(0, 1)
    elif form == "float8":
        values = values.view(torch.uint8)
    return TritonProduct(
        weight.shape,
        form,
        values.contiguous(),
        weight.scales.float().t().contiguous(),
        None if weight.zeros is None else weight.zeros.float().t().contiguous(),
        None if bias is None else bias.detach(),
        None if weight.columns is None else weight.columns.argsort(),
        activations,
        depth,
        num_splits(height, steps, values.device),
    )


@triton.jit
def _quantised_kernel(
    out, parts, x, values, zeros, scales, x_scales, bias, num_rows, height, columns, x_stride, step_stride, row_stride,
    group_size, steps, steps_per_split, splits,
    HAS_GROUPS: tl.constexpr, HAS_X_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, FORM: tl.constexpr,
    HAS_ZEROS: tl.constexpr, IS_SPLIT: tl.constexpr, IN_TURN: tl.constexpr, HEIGHT: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip  # one program: a tile of the output, or the part of it that one split of the columns gives
    n = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    split = tl.program_id(1)
    t = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = tl.float32 if WIDEN else x.dtype.element_ty
    total = tl.zeros([HEIGHT, ROWS], tl.int32 if dtype == tl.int8 else tl.float32)
    if IN_TURN:
        for one in range(splits):
            total += _sum_columns(
                x, values, zeros, scales, one * steps_per_split, steps, steps_per_split, n, t, num_rows, height,
                columns, x_stride, step_stride, row_stride, group_size,
                HAS_GROUPS, FORM, HAS_ZEROS, HEIGHT, ROWS, DEPTH, dtype,
            )  # fmt: skip
    else:
        total = _sum_columns(
            x, values, zeros, scales, split * steps_per_split, steps, steps_per_split, n, t, num_rows, height,
            columns, x_stride, step_stride, row_stride, group_size,
            HAS_GROUPS, FORM, HAS_ZEROS, HEIGHT, ROWS, DEPTH, dtype,
        )  # fmt: skip
    to = n[:, None] + t.to(tl.int64)[None, :] * height
    inside = (n < height)[:, None] & (t < num_rows)[None, :]
    if IS_SPLIT:
        tl.store(parts + split.to(tl.int64) * num_rows * height + to, total, mask=inside)
    else:
        y = total.to(tl.float32)
        if not HAS_GROUPS:
            y *= tl.load(scales + n, mask=n < height, other=0.0)[:, None]
        if HAS_X_SCALES:
            y *= tl.load(x_scales + t, mask=t < num_rows, other=0.0)[None, :]
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < height, other=0.0).to(tl.float32)[:, None]
        tl.store(out + to, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_columns(
    x, values, zeros, scales, first_step, steps, num_steps, n, t, num_rows, height, columns, x_stride, step_stride,
    row_stride, group_size,
    HAS_GROUPS: tl.constexpr, FORM: tl.constexpr, HAS_ZEROS: tl.constexpr, HEIGHT: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip  # [HEIGHT, ROWS], the sum over the columns of ``num_steps`` steps
    k = tl.arange(0, DEPTH)
    is_row, is_token = n < height, t < num_rows
    matrix = values + n.to(tl.int64)[:, None] * row_stride + k[None, :]
    rows = x + t.to(tl.int64)[None, :] * x_stride + k[:, None]
    halves: tl.constexpr = 2 if FORM == "int4" else 1
    total = tl.zeros([HEIGHT, ROWS], tl.int32 if dtype == tl.int8 else tl.float32)
    for step in range(first_step, min(first_step + num_steps, steps)):
        start = step * halves * DEPTH
        inside = is_row[:, None] if FORM == "int4" else is_row[:, None] & (k[None, :] < columns - start)
        stored = tl.load(matrix + step * step_stride.to(tl.int64), mask=inside, other=0.0)
        for half in tl.static_range(halves):
            column = start + half * DEPTH
            b = tl.load(rows + column, mask=is_token[None, :] & (k[:, None] < columns - column), other=0.0).to(dtype)
            group = tl.minimum(column, columns - 1) // group_size
            a = stored
            if FORM == "int4":
                a = (stored >> 4 * half) & 15
            if FORM == "float8":
                a = _float8(stored, dtype)
            if HAS_ZEROS:  # if zero points are integers, the difference is exact in every dtype
                a = a.to(tl.float32) - tl.load(zeros + group * height + n, mask=is_row, other=0.0)[:, None]
            elif FORM == "int4":
                a = _less_eight(a, dtype)
            if FORM != "none":
                a = a.to(dtype)
            if HAS_GROUPS:
                scale = tl.load(scales + group * height + n, mask=is_row, other=0.0)
                total += tl.dot(a, b, input_precision="ieee") * scale[:, None]
            elif dtype == tl.float8e4nv:  # sm90 sums float8 products with few bits: only DEPTH, then in float32
                total += tl.dot(a, b)
            else:
                total = tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit
def _less_eight(codes, dtype: tl.constexpr):  # codes - 8: 0 .. 15 become the last bits of 128 (or 1,024), then subtract
    if dtype == tl.bfloat16:
        return (codes.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - tl.full([], 136.0, tl.bfloat16)
    elif dtype == tl.float16:
        return (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - tl.full([], 1032.0, tl.float16)
    else:
        return codes.to(dtype) - 8.0


@triton.jit
def _float8(stored, dtype: tl.constexpr):  # e4m3 bytes without NaN: shift the bits into dtype, correct the bias
    bits = stored.to(tl.int16)
    if dtype == tl.bfloat16:
        small = ((bits & 0x80) << 8) | ((bits & 0x7F) << 4)
        return small.to(tl.bfloat16, bitcast=True) * tl.full([], 2.0**120, tl.bfloat16)
    else:
        small = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return small.to(tl.float16, bitcast=True) * tl.full([], 256.0, tl.float16)


@triton.jit
def _add_splits_kernel(
    out, parts, scales, x_scales, bias, num_rows, height, splits,
    HAS_GROUPS: tl.constexpr, HAS_X_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # one program: BLOCK outputs of a token; it adds their splits in order
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(1).to(tl.int64)
    is_row = n < height
    total = tl.zeros([BLOCK], parts.dtype.element_ty)
    for split in range(splits):
        total += tl.load(parts + (split * num_rows + t) * height + n, mask=is_row, other=0)
    y = total.to(tl.float32)
    if not HAS_GROUPS:
        y *= tl.load(scales + n, mask=is_row, other=0.0)
    if HAS_X_SCALES:
        y *= tl.load(x_scales + t)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out + t * height + n, y.to(out.dtype.element_ty), mask=is_row)

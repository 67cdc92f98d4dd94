"""Tiles of the products with quantised weights, and the number of splits of their columns (``gemm``).

A measured table (``attention.tile_table``) comes first. Without an entry there, the sizes are those for which the
compiler reports no spill on sm80, sm90 and sm100 and, for few tokens, at least two CTAs per SM.
"""

from __future__ import annotations

from functools import cache

import torch

from paged_infer.kernels.attention.tile_table import LinearKey, Tile, measured
from paged_infer.kernels.triton_runtime import capability, num_processors, triton

FEW_TOKENS = 64  # up to this number of tokens, each split of the columns is a program of its own
_PER_PROCESSOR, _MIN_STEPS, _MAX_SPLITS = 4, 4, 16  # programs wanted per processor (SM); the fewest steps of a split
_SPLIT_ROWS = 64  # rows of W per program, to count splits; not the tile's, so that no table changes a row's bits


def linear_tile(gpu: tuple[int, int], kernel: str, dtype: torch.dtype, num_tokens: int) -> Tile:
    """The tile of a kernel for a number of tokens.

    Args:
        gpu: compute capability; (0, 0): the interpreter.
        kernel: one of ``LINEAR_KERNELS``.
        dtype: of x, before it is rounded.
    """
    is_few = num_tokens <= FEW_TOKENS
    chosen = measured(gpu, _key(kernel, dtype, is_few))
    tile = _default(gpu, kernel, dtype, is_few) if chosen is None else chosen[0]
    return tile._replace(block_m=min(tile.block_m, max(16, triton.next_power_of_2(num_tokens))))


def num_splits(height: int, steps: int, device: torch.device) -> int:
    """The number of splits for W of ``height`` rows, where a product takes ``steps`` steps along the columns."""
    if capability(device) == (0, 0):  # the interpreter: small matrices are split, too
        return min(3, steps)
    programs = _PER_PROCESSOR * num_processors(device) // triton.cdiv(height, _SPLIT_ROWS)
    return max(1, min(programs, steps // _MIN_STEPS, _MAX_SPLITS))


@cache
def _key(kernel: str, dtype: torch.dtype, is_few: bool) -> LinearKey:
    return LinearKey(kernel, str(dtype).removeprefix("torch."), is_few)


def _default(gpu: tuple[int, int], kernel: str, dtype: torch.dtype, is_few: bool) -> Tile:
    if gpu == (0, 0):
        return Tile(16, 64, 4, 1)
    if dtype == torch.float32 and kernel != "w8a8":  # without tensor cores a product takes many registers
        return Tile(32, 32, 8 if gpu[0] == 10 and is_few else 4, 2)  # on sm100 four warps would spill 8 bytes
    if is_few:
        return Tile(64, 64, 4, 4)
    # Decoding takes registers, too, most of all for 4-bit and float8 codes.
    return Tile(128, 128, 8, 3) if kernel == "w8a8" else Tile(64, 128, 8, 3)

"""Tiles of the products with weights of few bits, and into how many splits their columns are cut (``gemm``).

A measured table (``attention.tile_table``) comes first. Without an entry the numbers follow from what the compiler
reports on sm80, sm90 and sm100: no spill, and with few tokens two blocks or more on a processor.
"""

from __future__ import annotations

from functools import cache

import torch

from paged_infer.kernels.attention.tile_table import LinearKey, Tile, measured
from paged_infer.kernels.triton_runtime import capability, num_processors, triton

FEW_TOKENS = 64  # up to which the splits of the columns have programs of their own
_PER_PROCESSOR, _MIN_STEPS, _MAX_SPLITS = 4, 4, 16  # programs that a processor should have; steps of a split
_SPLIT_ROWS = 64  # of W in a program, for the count of splits: not the tile's, so that no table changes a row's bits


def linear_tile(gpu: tuple[int, int], kernel: str, dtype: torch.dtype, num_tokens: int) -> Tile:
    """
    Args:
        kernel: one of ``LINEAR_KERNELS``.
        dtype: of x, before it is rounded.
    """
    is_few = num_tokens <= FEW_TOKENS
    chosen = measured(gpu, _key(kernel, dtype, is_few))
    tile = _default(gpu, kernel, dtype, is_few) if chosen is None else chosen[0]
    return tile._replace(block_m=min(tile.block_m, max(16, triton.next_power_of_2(num_tokens))))


def num_splits(height: int, steps: int, device: torch.device) -> int:
    """For W of ``height`` rows, in products that take ``steps`` steps along its columns."""
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
    if dtype == torch.float32 and kernel != "w8a8":  # no tensor cores: products take many registers
        return Tile(32, 32, 8 if gpu[0] == 10 and is_few else 4, 2)  # four warps spill 8 bytes there
    if is_few:
        return Tile(64, 64, 4, 4)
    # Codes that are decoded take registers, too, and those of 4 bits and of float8 the most.
    return Tile(128, 128, 8, 3) if kernel == "w8a8" else Tile(64, 128, 8, 3)

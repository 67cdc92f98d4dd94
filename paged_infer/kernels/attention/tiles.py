"""How large a tile each attention kernel takes, on which chip: chosen from the shapes alone, before a launch.

A measured table (``tile_table``) comes first; where it has no entry, these functions choose. ``paged-infer bench
kernels --compile-only`` prints what the compiler spills with each tile, for every architecture.
"""

from __future__ import annotations

from functools import cache

import torch

from paged_infer.kernels.attention.tile_table import Key, SplitRule, Tile, measured
from paged_infer.kernels.triton_runtime import triton

INTERPRETED_SPLITS = SplitRule(per_processor=2**20, min_keys=32, max_splits=3)  # few, and short contexts are split too


def flash_tiles(gpu: tuple[int, int], dim: int, dtype: torch.dtype, group: int, window: int | None) -> Tile:
    """For ``flash_attention``."""
    chosen = measured(gpu, _key("flash", dim, dtype, group, window is not None))
    return _flash_tiles(gpu, dim, dtype, window) if chosen is None else chosen[0]


def prefill_tiles(
    gpu: tuple[int, int], dim: int, dtype: torch.dtype, group: int, window: int | None, max_query_len: int,
    is_coded: bool = False,
) -> Tile:  # fmt: skip
    """For ``paged_prefill``: no more rows than queries. ``is_coded``: a quantised cache; measured tables ignore it."""
    chosen = measured(gpu, _key("prefill", dim, dtype, group, window is not None))
    tile = _prefill_tiles(gpu, dim, dtype, window, is_coded) if chosen is None else chosen[0]
    return tile._replace(block_m=min(tile.block_m, max(16, triton.next_power_of_2(max_query_len))))


def decode_tiles(
    gpu: tuple[int, int], dim: int, dtype: torch.dtype, group: int, is_coded: bool = False
) -> tuple[Tile, SplitRule]:
    """For ``paged_decode``, with the rule by which its rows are split. ``is_coded``: as in ``prefill_tiles``."""
    tile, splits = measured(gpu, _key("decode", dim, dtype, group, False)) or (None, None)
    default = INTERPRETED_SPLITS if gpu == (0, 0) else SplitRule()
    return tile or _decode_tiles(gpu, dim, dtype, group, is_coded), splits or default


def latent_tiles(gpu: tuple[int, int], dtype: torch.dtype, is_coded: bool) -> tuple[Tile, SplitRule]:
    """For ``latent_decode``: 16 query heads, as a row of the output is 512 wide. No measured table has entries for it.

    With 512 + 64 elements the compiler reports 55 KiB of shared memory in bfloat16 and 72 in float32, and no spill.
    Four warps would spill while they convert 8-bit codes.
    """
    if gpu == (0, 0):
        return Tile(16, 16, 4, 1), INTERPRETED_SPLITS
    if dtype == torch.float32:
        return Tile(16, 16, 8, 1), SplitRule()
    return Tile(16, 32, 8 if is_coded else 4, 2), SplitRule()


@cache
def _key(kernel: str, dim: int, dtype: torch.dtype, group: int, has_window: bool) -> Key:
    return Key(kernel, str(dtype).removeprefix("torch."), dim, group, has_window)


# -- Without an entry in a table ---------------------------------------------------------------------------------------


def _flash_tiles(gpu: tuple[int, int], dim: int, dtype: torch.dtype, window: int | None) -> Tile:
    """As large as registers and shared memory allow without a spill."""
    if gpu == (0, 0):  # the interpreter: small, so that small shapes have several tiles
        return Tile(16, 16, 4, 1)
    if dtype == torch.float32:  # float32 has no tensor cores: products take many registers
        tile = Tile(32, 64, 8, 2) if dim <= 64 else Tile(16, 32 if dim <= 128 else 16, 8, 2)
    elif gpu[0] == 9 and dim in (64, 128):  # no padding, and registers to spare
        tile = Tile(128, 128, 8, 3)
    elif dim <= 64:
        tile = Tile(128, 32, 8, 3) if gpu[0] == 10 else Tile(128, 64, 8, 3)
    elif dim <= 128:
        tile = Tile(128, 32, 8, 3) if gpu[0] == 8 and dim < 128 else Tile(128, 64, 8, 3)
    else:  # 8.6, 8.9 and 12.x have 99 KiB of shared memory a block
        tile = Tile(64, 64, 8, 2) if dim == 256 and gpu in ((8, 0), (9, 0), (10, 0)) else Tile(64, 32, 8, 2)
    if window is not None:  # the loop along the edge of the window needs more registers
        tile = tile._replace(block_n=max(16, tile.block_n // 2))
    return tile


def _prefill_tiles(
    gpu: tuple[int, int], dim: int, dtype: torch.dtype, window: int | None, is_coded: bool
) -> Tile:  # fmt: skip
    """The dense kernel's tile with fewer keys, as each key needs an address, and with stages that load these addresses.

    Three of five stages hold keys and values (two on 8.x and 12.x). 8-bit codes are converted in registers, so tiles
    that would then spill are halved.
    """
    tile = _flash_tiles(gpu, dim, dtype, window)
    block_n = min(tile.block_n, 32 if gpu[0] in (8, 12) and dim > 64 else 64)
    has_room = dim <= 128 or gpu in ((8, 0), (9, 0), (10, 0))  # the others have 99 KiB of shared memory a block
    has_registers = gpu[0] != 8 or dim > 64 or window is None  # triton 3.9 spills there with more than three stages
    has_stages = gpu != (0, 0) and dtype != torch.float32 and has_room and has_registers
    num_stages = 5 if has_stages else tile.num_stages
    tile = tile._replace(block_n=block_n, num_stages=num_stages)
    if not is_coded or gpu == (0, 0):
        return tile
    if dtype == torch.float32:
        return tile._replace(block_n=max(16, block_n // 2))
    return tile._replace(block_m=tile.block_m // 2) if gpu[0] == 9 and dim >= 128 else tile


def _decode_tiles(gpu: tuple[int, int], dim: int, dtype: torch.dtype, group: int, is_coded: bool) -> Tile:
    """The query heads of a group, at least 16 in a product; small tiles of keys.

    A group that is too large for the registers takes several programs, which read the same keys. 8-bit codes are
    converted in registers: four warps would spill in float32, and for wide heads with 32 keys.
    """
    block_m = min(max(16, triton.next_power_of_2(group)), 16 if dtype == torch.float32 or dim > 128 else 32)
    if gpu == (0, 0):
        return Tile(block_m, 16, 4, 1)
    if dtype == torch.float32:
        return Tile(block_m, 16, 8 if is_coded else 4, 4)
    # The address of a key is itself loaded, so only two of six stages hold tiles of keys.
    return Tile(block_m, 64 if dim <= 64 else 16 if is_coded and dim > 128 else 32, 4, 6)

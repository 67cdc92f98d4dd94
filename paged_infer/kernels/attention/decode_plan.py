"""The number of splits of each row of a decode: computed on the device, once a step, for all layers.

    places = 6 (programs of one head that run at once)         item    0   1   2   3   4   5
    rows of 300, 300, 2,100 and 250 keys                       row     0   1   2   2   2   3
    keys per split = 700                                       split   0   0   0   1   2   0

An item is one split of one row. Lengths differ within a batch, and a captured launch has a fixed grid. So the grid has
as many programs as any lengths can give items, which is at most the number of rows and of places together, and a list
has the row of each item. SGLang also has a number of splits for each row, and FlashInfer and FlashMLA have such a list
of work; all of them plan it before a step.

The number of keys per split is the smallest with which all programs run at once. A row of s > 1 splits takes s places.
Rows that are not split share places: as many rows share one as can run in it, one after the other, while a split of
that many keys runs. Equal rows therefore get equal splits, in whole waves, and a long row among short ones gets many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paged_infer.kernels.attention.tile_table import SplitRule
from paged_infer.kernels.triton_runtime import launch, tl, triton

_PLACE = 1024  # parts of a place, so that they can be counted in integers


class SplitBounds(NamedTuple):
    """What the host fixes before lengths are known."""

    places: int  # programs of one KV head that run at once
    max_items: int  # splits of all rows together
    max_split_rows: int  # rows that can have more than one split
    rule: SplitRule


class DecodePlan(NamedTuple):
    """The splits of each row of a decode, on the device."""

    starts: Tensor  # [B + 2] int32, the first item of each row, then the numbers of items and of split rows
    item_rows: Tensor  # [max_items] int32, the row of each item
    split_rows: Tensor  # [max_split_rows] int32, the rows with more than one split


def split_bounds(rule: SplitRule, num_rows: int, programs_per_row: int, max_keys: int, processors: int) -> SplitBounds:
    """Bounds for rows of at most ``max_keys`` keys, each with ``programs_per_row`` programs if it is not split."""
    places = rule.per_processor * processors // max(1, programs_per_row)
    most = min(rule.max_splits, -(-max_keys // rule.min_keys))  # of a row
    if most <= 1 or places <= 1:
        return SplitBounds(places, num_rows, 0, rule)
    return SplitBounds(places, min(num_rows + places, num_rows * most), min(num_rows, places // 2), rule)


def splits_reference(keys: list[int], bounds: SplitBounds) -> list[int]:
    """The number of splits of each row, by its number of keys: ``plan_decode`` in plain Python."""
    longest = max(keys, default=0)
    low = max(bounds.rule.min_keys, -(-longest // bounds.rule.max_splits))
    high = max(low, longest)  # no row is split
    while low < high:
        middle = (low + high) // 2
        taken = 0
        for n in keys:
            taken += -(-n // middle) * _PLACE if n > middle else _PLACE // (middle // max(n, 1))
        low, high = (low, middle) if taken <= bounds.places * _PLACE else (middle + 1, high)
    return [max(1, -(-n // low)) for n in keys]


def plan_decode(seq_lens: Tensor, num_rows: int, max_keys: int, bounds: SplitBounds) -> DecodePlan:
    """The plan for the first ``num_rows`` rows. The host does not wait, and a CUDA graph can capture it."""
    starts, item_rows, split_rows = (
        torch.empty(size, dtype=torch.int32, device=seq_lens.device)
        for size in (num_rows + 2, bounds.max_items, bounds.max_split_rows)
    )
    launch(
        _plan_kernel,
        (1,),
        seq_lens, starts, item_rows, split_rows,
        num_rows, max_keys, bounds.places, bounds.rule.min_keys, bounds.rule.max_splits,
        PLACE=_PLACE, BLOCK_B=max(256, triton.next_power_of_2(num_rows)),  # one kernel for all smaller batches
    )  # fmt: skip
    return DecodePlan(starts, item_rows, split_rows)


# Values that change between steps must not compile the kernel again.
@triton.jit(do_not_specialize=["num_rows", "max_keys", "places", "min_keys", "max_splits"])
def _plan_kernel(
    seq_lens_ptr, starts_ptr, item_rows_ptr, split_rows_ptr, num_rows, max_keys, places, min_keys, max_splits,
    PLACE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK_B)
    there = row < num_rows
    keys = tl.minimum(tl.load(seq_lens_ptr + row, mask=there, other=0), max_keys)
    longest = tl.max(keys, 0)
    low = tl.maximum(min_keys, tl.cdiv(longest, max_splits))
    high = tl.maximum(low, longest)
    while low < high:
        middle = (low + high) // 2
        shared = PLACE // tl.maximum(middle // tl.maximum(keys, 1), 1)
        taken = tl.sum(tl.where(keys > middle, tl.cdiv(keys, middle) * PLACE, tl.where(there, shared, 0)), 0)
        fits = taken <= places * PLACE
        low, high = tl.where(fits, low, middle + 1), tl.where(fits, middle, high)
    splits = tl.where(there, tl.maximum(tl.cdiv(keys, low), 1), 0)
    is_split = (splits > 1).to(tl.int32)
    starts = tl.cumsum(splits, 0) - splits
    tl.store(starts_ptr + row, starts, mask=there)
    tl.store(starts_ptr + num_rows, tl.sum(splits, 0))
    tl.store(starts_ptr + num_rows + 1, tl.sum(is_split, 0))
    tl.store(split_rows_ptr + tl.cumsum(is_split, 0) - is_split, row, mask=splits > 1)
    for split in tl.range(0, tl.max(splits, 0)):
        tl.store(item_rows_ptr + starts + split, row, mask=split < splits)

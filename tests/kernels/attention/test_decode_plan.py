"""The splits of a decode: whole waves for equal rows, many for a long row among short ones, and a list of them all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paged_infer.kernels.attention.decode_plan import plan_decode, split_bounds, splits_reference
from paged_infer.kernels.attention.tile_table import SplitRule
from paged_infer.kernels.triton_runtime import INTERPRETED

PROCESSORS, KV_HEADS, RULE = 132, 8, SplitRule()
PLACES = 66  # 4 programs on each of 132 processors, for 8 heads
LENGTHS = st.lists(st.integers(0, 600) | st.integers(0, 40_000), min_size=1, max_size=150)


def bounds_of(keys: list[int], rule: SplitRule = RULE, kv_heads: int = KV_HEADS):
    return split_bounds(rule, len(keys), kv_heads, max(keys), PROCESSORS)


def splits_of(keys: list[int]) -> list[int]:
    bounds = bounds_of(keys)
    return splits_reference(keys, bounds) if bounds.max_split_rows else [1] * len(keys)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 12, 16, 17, 24, 31, 32, 33, 40, 48, 64, 66, 67, 96, 128, 256, 512])
@pytest.mark.parametrize("length", [257, 1000, 4096, 20_000])
def test_equal_rows_are_split_into_whole_waves(rows: int, length: int) -> None:
    splits = splits_of([length] * rows)
    assert len(set(splits)) == 1
    by_keys = -(-length // RULE.min_keys)
    assert splits[0] == max(1, min(PLACES // rows, by_keys, RULE.max_splits))


def test_a_long_row_among_short_ones_is_cut_into_many_and_they_into_none() -> None:
    splits = splits_of([300] * 40 + [16_000] + [300] * 23)
    assert splits[:40] == [1] * 40 and splits[41:] == [1] * 23
    assert 16 <= splits[40] <= RULE.max_splits


def test_more_rows_than_places_still_leave_some_to_a_long_row() -> None:
    splits = splits_of([500] * 255 + [30_000])
    assert splits[:-1] == [1] * 255
    assert splits[-1] >= 8


def test_short_contexts_need_no_plan() -> None:
    assert bounds_of([256] * 4).max_split_rows == 0
    assert bounds_of([257] * 4).max_split_rows == 4
    assert bounds_of([9000] * 4, kv_heads=4 * PROCESSORS).max_split_rows == 0  # only one place: nothing to split into


@given(LENGTHS, st.sampled_from([RULE, SplitRule(2, 512, 16), SplitRule(8, 32, 3)]), st.sampled_from([1, 8]))
@example([300] * 63 + [16_000], RULE, 8)
@settings(max_examples=60)
def test_all_split_rows_run_at_once_and_the_bounds_hold(keys: list[int], rule: SplitRule, kv_heads: int) -> None:
    bounds = bounds_of(keys, rule, kv_heads)
    splits = splits_reference(keys, bounds)
    assert all(1 <= one <= rule.max_splits for one in splits)
    assert all(one <= max(1, -(-n // rule.min_keys)) for one, n in zip(splits, keys, strict=True))
    assert sum(one for one in splits if one > 1) <= bounds.places
    if bounds.max_split_rows:
        assert sum(splits) <= bounds.max_items
        assert sum(one > 1 for one in splits) <= bounds.max_split_rows


@pytest.mark.skipif(not INTERPRETED, reason="on tensors of the CPU")
@given(LENGTHS, st.sampled_from([RULE, SplitRule(2, 512, 16), SplitRule(2**20, 32, 3)]), st.integers(0, 3))
@example([300] * 63 + [16_000], RULE, 2)
@example([0, 0, 9000], RULE, 0)
@settings(max_examples=25, deadline=None)
def test_the_plan_lists_each_split_of_each_row_once(keys: list[int], rule: SplitRule, padding: int) -> None:
    keys = keys + [0] * padding  # rows that fill up a batch
    bounds = split_bounds(rule, len(keys), KV_HEADS, max(keys), 1 if rule.per_processor > 8 else PROCESSORS)
    if not bounds.max_split_rows:
        return
    further = [7, 10**6]  # rows that are not decodes
    plan = plan_decode(torch.tensor(keys + further, dtype=torch.int32), len(keys), max(keys), bounds)
    splits = splits_reference(keys, bounds)
    ends = torch.tensor([0, *splits]).cumsum(0).tolist()
    split_rows = [row for row, number in enumerate(splits) if number > 1]
    assert plan.starts.tolist() == [*ends, len(split_rows)]
    assert plan.item_rows[: ends[-1]].tolist() == [row for row, number in enumerate(splits) for _ in range(number)]
    assert plan.split_rows[: len(split_rows)].tolist() == split_rows


@pytest.mark.skipif(not INTERPRETED, reason="on tensors of the CPU")
def test_a_row_longer_than_was_promised_writes_no_further_than_the_list() -> None:
    bounds = split_bounds(RULE, 3, KV_HEADS, 1000, PROCESSORS)
    plan = plan_decode(torch.tensor([10**6, 900, 10**6], dtype=torch.int32), 3, 1000, bounds)
    assert plan.starts.tolist()[:4] == [0, 4, 8, 12]
    assert bounds.max_items == 12

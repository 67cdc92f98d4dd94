"""Splits of a decode: whole waves of programs."""

from __future__ import annotations

import pytest

from paged_infer.kernels.attention.tile_table import SplitRule
from paged_infer.kernels.attention.tiles import num_splits

PROCESSORS, RULE = 132, SplitRule()


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 12, 16, 17, 24, 31, 32, 33, 40, 48, 64, 66, 67, 96, 128, 256, 512])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_split_programs_all_run_at_once(rows: int, kv_heads: int) -> None:
    splits = num_splits(RULE, rows * kv_heads, 2**20, PROCESSORS)
    places = RULE.per_processor * PROCESSORS
    assert 1 <= splits <= RULE.max_splits
    if splits > 1:
        assert rows * kv_heads * splits <= places
    if splits < RULE.max_splits:  # one more would not fit
        assert rows * kv_heads * (splits + 1) > places


@pytest.mark.parametrize(("max_keys", "splits"), [(1, 1), (256, 1), (257, 2), (1024, 4), (32_768, 64)])
def test_a_split_has_about_256_keys(max_keys: int, splits: int) -> None:
    assert num_splits(RULE, 8, max_keys, PROCESSORS) == splits

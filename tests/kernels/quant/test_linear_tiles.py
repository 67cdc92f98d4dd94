"""The tile of a product with quantised weights, and its splits: defaults, tables, and what no table changes."""

from __future__ import annotations

import json

import pytest
import torch

from paged_infer.kernels.attention import tile_table
from paged_infer.kernels.attention.tile_table import LinearKey, Tile, forced, read_table, tables, write_table
from paged_infer.kernels.quant.gemm import pack_triton
from paged_infer.kernels.quant.tiles import FEW_TOKENS, linear_tile, num_splits
from paged_infer.kernels.quant.weight import QuantisedWeight
from paged_infer.kernels.triton_runtime import launches_go_to

SM90, META = (9, 0), torch.device("meta")
ENTRY = {"kernel": "w4a16", "dtype": "bfloat16", "few": True}
ENTRY |= {"block_m": 32, "block_n": 128, "num_warps": 8, "num_stages": 5}


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Write a table of these entries, which is then read instead of the package's."""
    monkeypatch.setattr(tile_table, "FOLDER", tmp_path / "absent")

    def give(*entries) -> None:
        path = tmp_path / "given.json"
        path.write_text(json.dumps({"arch": 90, "entries": entries}))
        monkeypatch.setenv("PAGED_INFER_TILES", str(path))
        tables.cache_clear()

    yield give
    tables.cache_clear()


def launched(num_tokens: int, height: int = 4096) -> list[tuple[str, tuple[int, ...], dict]]:
    """The kernels, grids and constants of a product of int4 in bfloat16 on an H100."""
    seen = []
    values, scales = torch.empty(height, 2048, dtype=torch.uint8, device=META), torch.empty(height, 32, device=META)
    weight = QuantisedWeight(values, scales, None, 4, 128, (height, 4096))
    with launches_go_to(lambda kernel, grid, args, named: seen.append((kernel.fn.__name__, grid, named)), SM90):
        product = pack_triton(weight, None)
        product(torch.empty(num_tokens, 4096, dtype=torch.bfloat16, device=META))
    return seen


def test_a_tile_has_no_more_tokens_than_the_step() -> None:
    for tokens, block_m in ((1, 16), (17, 32), (64, 64), (3000, 64)):
        assert linear_tile(SM90, "w4a16", torch.bfloat16, tokens).block_m == block_m


def test_few_tokens_are_split_and_combined_and_many_are_not() -> None:
    """4,096 rows are 64 tiles; wanted are 4 programs on each of 132 processors, in splits of at least 4 of 32 steps."""
    (product, grid, named), (combine, combined, _) = launched(FEW_TOKENS)
    assert (product, combine) == ("_quantised_kernel", "_add_splits_kernel")
    assert grid == (64, 8, 1) and combined == (16, FEW_TOKENS) and named["IS_SPLIT"]
    ((_, grid, named),) = launched(FEW_TOKENS + 1)
    assert grid == (32, 1, 2) and named["IN_TURN"]
    ((_, grid, named),) = launched(1, height=64 * 4 * 132)
    assert grid == (528, 1, 1) and not named["IS_SPLIT"] and not named["IN_TURN"]


def test_splits_follow_from_the_shape_of_w_and_the_chip_alone(given) -> None:
    splits = lambda: [num_splits(4096, steps, META) for steps in (1, 7, 8, 32, 1000)]  # noqa: E731
    with launches_go_to(lambda *call: None, SM90):
        before = splits()
        given(ENTRY)
        assert splits() == before == [1, 1, 2, 8, 8]


def test_an_entry_of_a_table_is_taken_for_its_dtype_and_number_of_tokens(given) -> None:
    given(ENTRY)
    assert linear_tile(SM90, "w4a16", torch.bfloat16, 20) == Tile(32, 128, 8, 5)
    for other in (("w4a16", torch.bfloat16, 65), ("w4a16", torch.float16, 20), ("w8a16", torch.bfloat16, 20)):
        assert linear_tile(SM90, *other) != Tile(32, 128, 8, 5)
    assert linear_tile((8, 0), "w4a16", torch.bfloat16, 20) != Tile(32, 128, 8, 5)
    with forced("w4a16", Tile(64, 64, 4, 6)):
        assert linear_tile(SM90, "w4a16", torch.bfloat16, 20) == Tile(32, 64, 4, 6)


def test_what_is_written_is_what_is_read(tmp_path) -> None:
    entries = {LinearKey("w8a8", "bfloat16", False): (Tile(128, 64, 8, 4), None)}
    write_table(tmp_path / "sm90.json", 90, entries, "a machine")
    assert read_table(tmp_path / "sm90.json") == (90, entries)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_n": 48}, "block_n=48: must be a power of two in 16..128"),
        ({"few": 1}, "few true or false"),
        ({"dtype": "int8"}, "dtype must be in"),
        ({"head_dim": 128}, "expected kernel, dtype, few, block_m"),
        ({"splits": None}, "expected kernel, dtype, few, block_m"),
    ],
)
def test_an_entry_that_cannot_be_run_is_refused(change, reason, given) -> None:
    given(ENTRY | change)
    with pytest.raises(ValueError, match=rf"entry 1, .*{reason}"):
        tables()

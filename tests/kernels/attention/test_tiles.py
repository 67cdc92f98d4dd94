"""A measured table decides which tile a kernel takes; without an entry in one, the functions do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from holding import LIMIT_S

from paged_infer.bench.kernels.peers import our_flash, our_paged
from paged_infer.bench.kernels.problems import paged_problem
from paged_infer.kernels.attention import tile_table
from paged_infer.kernels.attention.tile_table import Key, SplitRule, Tile, forced, read_table, tables, write_table
from paged_infer.kernels.attention.tiles import decode_tiles, flash_tiles, prefill_tiles
from paged_infer.kernels.triton_runtime import INTERPRETED, launches_go_to

ROOT = Path(__file__).resolve().parents[3]
SM90, BF16 = (9, 0), torch.bfloat16
LLAMA = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
DECODE = {
    "kernel": "decode", "dtype": "bfloat16", "head_dim": 128, "group": 4,
    "block_m": 16, "block_n": 64, "num_warps": 2, "num_stages": 8,
    "splits": {"per_processor": 2, "min_keys": 512, "max_splits": 16},
}  # fmt: skip
FLASH = {
    "kernel": "flash", "dtype": "bfloat16", "head_dim": 128, "group": 4,
    "block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 3,
}  # fmt: skip
PREFILL = FLASH | {"kernel": "prefill", "block_n": 32, "num_stages": 5}


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Entries as the table that PAGED_INFER_TILES names, in a process that has read none."""

    def give(*entries: dict, arch: int = 90) -> Path:
        path = tmp_path / "measured.json"
        path.write_text(json.dumps({"arch": arch, "entries": entries}))
        monkeypatch.setenv("PAGED_INFER_TILES", str(path))
        tables.cache_clear()
        return path

    yield give
    tables.cache_clear()


def launched(sequences: list[tuple[int, int]], call=our_paged, gpu=SM90, **options) -> dict[str, dict]:
    """The constants of the kernels that a call of Llama-3-8B's shape launches on that chip, by the kernel's name."""
    seen = {}
    problem = paged_problem(sequences, **LLAMA, device="meta", poison=False)
    with launches_go_to(lambda kernel, grid, args, named: seen.update({kernel.fn.__name__: named}), gpu):
        call(problem, **options).call()
    return seen


def tile_of(named: dict) -> tuple[int, int, int, int]:
    block_m = named["BLOCK_M"] if "BLOCK_M" in named else named["BLOCK_G"]
    return block_m, named["BLOCK_N"], named["num_warps"], named["num_stages"]


# -- Which tile is taken


def test_each_kernel_is_launched_with_the_tile_of_its_entry(given):
    given(DECODE, FLASH, PREFILL)
    assert tile_of(launched([(0, 4096)] * 2, our_flash)["_flash_kernel"]) == (64, 64, 4, 3)
    assert tile_of(launched([(4096, 512)])["_prefill_kernel"]) == (64, 32, 4, 5)
    assert tile_of(launched([(4095, 1)] * 8)["_decode_kernel"]) == (16, 64, 2, 8)


def test_flash_loads_by_tma_if_its_entry_asks_for_it_and_the_call_allows_it(given):
    given(FLASH | {"use_tma": True})
    by_tma = launched([(0, 4096)] * 2, our_flash)
    assert [*by_tma] == ["_flash_tma_kernel"] and tile_of(by_tma["_flash_tma_kernel"]) == (64, 64, 4, 3)
    for options in ({"return_lse": True}, {"window": 100}):
        assert [*launched([(0, 4096)] * 2, our_flash, **options)] == ["_flash_kernel"]
    given(FLASH)
    assert [*launched([(0, 4096)] * 2, our_flash)] == ["_flash_kernel"]


def test_a_prefill_takes_no_more_rows_than_queries_whatever_the_table_has(given):
    given(PREFILL)
    assert tile_of(launched([(4096, 20)])["_prefill_kernel"]) == (32, 32, 4, 5)


def test_without_an_entry_in_the_table_the_functions_decide(given):
    cases = [
        lambda: flash_tiles(SM90, 128, BF16, 4, window=100),
        lambda: flash_tiles(SM90, 128, torch.float16, 4, None),
        lambda: flash_tiles(SM90, 64, BF16, 4, None),
        lambda: flash_tiles(SM90, 128, BF16, 2, None),
        lambda: flash_tiles((8, 0), 128, BF16, 4, None),
        lambda: prefill_tiles(SM90, 128, BF16, 4, None, 4096),  # an entry of flash does not change it
        lambda: decode_tiles(SM90, 128, BF16, 8),
    ]
    tables.cache_clear()
    silent = [case() for case in cases]
    given(FLASH, DECODE)
    assert [case() for case in cases] == silent
    given(FLASH | {"window": True})
    assert cases[0]() == Tile(64, 64, 4, 3)


def test_the_interpreter_reads_no_table(given):
    given(DECODE)
    before = decode_tiles((0, 0), 128, BF16, 4)
    assert before[0] != Tile(16, 64, 2, 8)


def test_a_decodes_split_rule_is_the_tables(given):
    """132 processors, 8 KV heads: 4 programs a processor are 66 items beside those of the 4 rows, 2 are 33."""
    sequences = [(32_767, 1)] * 4
    items = [grid_of_decode(sequences)]
    given(DECODE)
    items.append(grid_of_decode(sequences))
    assert items == [4 + 66, 4 + 33]


def grid_of_decode(sequences: list[tuple[int, int]]) -> int:
    grids = {}
    problem = paged_problem(sequences, **LLAMA, device="meta", poison=False)
    with launches_go_to(lambda kernel, grid, args, named: grids.update({kernel.fn.__name__: grid}), SM90):
        our_paged(problem).call()
    return grids["_decode_kernel"][1]


def test_a_forced_tile_comes_before_the_table_and_ends_with_its_block(given):
    given(FLASH, DECODE)
    with forced("flash", Tile(32, 32, 4, 2)), forced("decode", Tile(16, 16, 1, 8), SplitRule(1, 16, 2)):
        assert flash_tiles(SM90, 128, BF16, 4, None) == Tile(32, 32, 4, 2)
        assert decode_tiles(SM90, 128, BF16, 4) == (Tile(16, 16, 1, 8), SplitRule(1, 16, 2))
        with forced("flash", Tile(16, 16, 4, 1)):
            assert flash_tiles(SM90, 128, BF16, 4, None) == Tile(16, 16, 4, 1)
        assert flash_tiles(SM90, 128, BF16, 4, None) == Tile(32, 32, 4, 2)
    assert flash_tiles(SM90, 128, BF16, 4, None) == Tile(64, 64, 4, 3)
    with pytest.raises(ValueError, match="kernel='sample': must be one of flash, prefill, decode"):
        forced("sample", Tile(16, 16, 4, 1)).__enter__()


def test_a_tile_is_forced_in_its_own_thread_alone():
    """And blocks that overlap leave nothing behind."""
    tiles, both_are_inside = {}, threading.Barrier(2)

    def use(kernel: str, tile: Tile) -> None:
        with forced(kernel, tile):
            both_are_inside.wait(LIMIT_S)
            tiles[kernel] = flash_tiles(SM90, 128, BF16, 4, None), prefill_tiles(SM90, 128, BF16, 4, None, 999)
            both_are_inside.wait(LIMIT_S)

    usual = flash_tiles(SM90, 128, BF16, 4, None), prefill_tiles(SM90, 128, BF16, 4, None, 999)
    mine = Tile(32, 32, 4, 2)
    threads = [threading.Thread(target=use, args=(kernel, mine)) for kernel in ("flash", "prefill")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert tiles == {"flash": (mine, usual[1]), "prefill": (usual[0], mine)}
    assert (flash_tiles(SM90, 128, BF16, 4, None), prefill_tiles(SM90, 128, BF16, 4, None, 999)) == usual


@pytest.mark.skipif(not INTERPRETED, reason="needs triton, interpreting")
def test_a_kernel_computes_the_same_with_a_forced_tile():
    problem = paged_problem([(60, 1), (0, 1), (5, 20)], num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    expected = our_paged(problem).call()
    with forced("decode", Tile(32, 64, 4, 1), SplitRule(10**4, 16, 5)), forced("prefill", Tile(64, 32, 4, 1)):
        torch.testing.assert_close(our_paged(problem).call(), expected, atol=1e-5, rtol=1e-5)


# -- Which tables are read


def test_every_table_of_the_package_can_be_read(monkeypatch):
    monkeypatch.delenv("PAGED_INFER_TILES", raising=False)
    tables.cache_clear()
    assert all(tables().values())
    tables.cache_clear()


def test_without_a_folder_of_tables_the_functions_decide(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_table, "FOLDER", tmp_path / "absent")
    monkeypatch.delenv("PAGED_INFER_TILES", raising=False)
    tables.cache_clear()
    assert tables() == {}
    tables.cache_clear()


def test_the_file_that_is_named_replaces_the_table_of_its_chip_alone(tmp_path, monkeypatch, given):
    monkeypatch.setattr(tile_table, "FOLDER", tmp_path / "package")
    (tmp_path / "package").mkdir()
    for arch in (80, 90):
        table = {"arch": arch, "entries": [FLASH | {"block_m": 32}, PREFILL]}
        (tmp_path / f"package/sm{arch}.json").write_text(json.dumps(table))
    given(FLASH)
    assert {arch: len(entries) for arch, entries in tables().items()} == {80: 2, 90: 1}
    assert flash_tiles(SM90, 128, BF16, 4, None).block_m == 64
    assert flash_tiles((8, 0), 128, BF16, 4, None).block_m == 32


def test_a_table_is_read_once(given):
    path = given(FLASH)
    assert tables()[90]
    path.unlink()
    assert flash_tiles(SM90, 128, BF16, 4, None) == Tile(64, 64, 4, 3)


def test_what_a_sweep_writes_is_what_is_read(tmp_path):
    rule = SplitRule(6, 128, 32)
    entries = {
        Key("decode", "bfloat16", 128, 2): (Tile(16, 32, 1, 6), rule),
        Key("flash", "float16", 64, 1, True): (Tile(64, 64, 4, 3), None),
        Key("flash", "float16", 64, 1): (Tile(64, 64, 4, 3, use_tma=True), None),
    }
    write_table(tmp_path / "new" / "sm90.json", 90, entries, "a machine")
    assert read_table(tmp_path / "new" / "sm90.json") == (90, entries)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sm90.json"]


def test_a_table_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "sm90.json"
    write_table(path, 90, {Key("flash", "float16", 64, 1): (Tile(64, 64, 4, 3), None)}, "a machine")
    before = path.read_text()

    def full(self, text, encoding):
        with self.open("w", encoding=encoding) as file:
            file.write(text[:20])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        write_table(path, 90, {}, "a machine")
    assert path.read_text() == before


def test_a_table_of_an_installed_package_is_found(tmp_path):
    """Built as a wheel is: sm90.json has to be among the files of paged_infer.kernels."""
    source, built = tmp_path / "source", tmp_path / "built"
    package = source / "paged_infer"
    shutil.copytree(ROOT / "paged_infer/kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "paged_infer/files.py", package)  # which the kernels import
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (package / "kernels/tiles/sm90.json").write_text(json.dumps({"arch": 90, "entries": [FLASH]}))
    build = (
        "from setuptools import Distribution; d = Distribution({'script_name': 'setup.py'}); d.parse_config_files(); "
        f"b = d.get_command_obj('build_py'); b.build_lib = {str(built)!r}; b.ensure_finalized(); b.run()"
    )
    run(source, build)
    look = "from paged_infer.kernels.attention import tile_table as t; print(t.__file__, len(t.tables()[90]))"
    assert run(built, look).split() == [str(built / "paged_infer/kernels/attention/tile_table.py"), "1"]


def run(folder: Path, code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PAGED_INFER_TILES"}
    environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=LIMIT_S)
    assert result.returncode == 0, result.stderr
    return result.stdout


# -- What is refused


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (
            FLASH | {"block_n": 128, "num_stages": 4},
            "needs at least 262,144 bytes of shared memory a block, sm90 has 232,448",
        ),
        (FLASH | {"block_n": 48}, "block_n=48: must be a power of two in 16..128"),
        (FLASH | {"block_n": 256}, "block_n=256: must be a power of two in 16..128"),
        (FLASH | {"block_m": 8}, "block_m=8: must be a power of two in 16..128"),
        (FLASH | {"num_warps": 3}, "num_warps=3: must be a power of two in 1..16"),
        (FLASH | {"num_stages": 0}, "num_stages=0: must be a number in 1..10"),
        (FLASH | {"num_warps": True}, "num_warps=True: must be a power of two"),
        (FLASH | {"kernel": "flashy"}, "kernel must be in"),
        (FLASH | {"dtype": "float8"}, "kernel must be in"),
        (FLASH | {"head_dim": 512}, r"head_dim must be a number in 1\.\.256"),
        (FLASH | {"splits": DECODE["splits"]}, "only a decode has splits"),
        (FLASH | {"blockn": 64}, "expected kernel, dtype, head_dim, group, window, block_m"),
        ({"kernel": "flash"}, "expected kernel, dtype, head_dim, group, window, block_m"),
        ("flash", "expected kernel, dtype"),
        (DECODE | {"splits": {}}, "splits of a decode: expected per_processor, min_keys, max_splits"),
        (DECODE | {"splits": DECODE["splits"] | {"min_keys": 0}}, r"splits: min_keys=0: must be a number in 16\.\."),
        (DECODE | {"splits": DECODE["splits"] | {"per_processor": 2**20}}, "splits: per_processor=1048576: must be"),
        (FLASH | {"use_tma": 1}, "use_tma=1: must be true or false"),
        (FLASH | {"use_tma": True, "head_dim": 80}, "use_tma is for flash on sm90 or later, in 16 bits, head_dim 64"),
        (FLASH | {"use_tma": True, "window": True}, "use_tma is for flash on sm90 or later"),
        (DECODE | {"use_tma": True}, "use_tma is for flash on sm90 or later"),
        (DECODE | {"window": True}, "a decode's tile does not depend on a window"),
    ],
)
def test_an_entry_that_cannot_be_run_is_refused_by_file_and_entry(entry, reason, given):
    path = given(PREFILL, entry)
    with pytest.raises(ValueError, match=rf"^{path}, entry 2, .*: {reason}"):
        flash_tiles(SM90, 128, BF16, 4, None)


def test_two_entries_of_the_same_key_are_refused(given):
    given(FLASH, FLASH | {"block_m": 32})
    with pytest.raises(ValueError, match=r"entry 2, .*: an earlier entry has the same key"):
        tables()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices must be integers"),
        ('{"entries": []}', "'arch' is missing"),
        ('{"arch": 90.0, "entries": []}', '"arch" must be one of 80, 86, .*; got arch 90.0'),
        ("[" * 100_000, "maximum recursion depth"),
        ('{"arch": 75, "entries": []}', '"arch" must be one of 80, 86, .*, and "entries" a list; got arch 75'),
    ],
)
def test_a_file_that_is_no_table_is_one_error_that_names_it(text, reason, given):
    path = given()
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path} is not a table of tiles: {reason}"):
        tables()


def test_a_file_that_is_missing_or_has_another_chips_name_is_an_error(tmp_path, monkeypatch, given):
    monkeypatch.setattr(tile_table, "FOLDER", tmp_path)
    monkeypatch.setenv("PAGED_INFER_TILES", str(tmp_path / "gone.json"))
    tables.cache_clear()
    with pytest.raises(ValueError, match=r"PAGED_INFER_TILES=.*gone\.json: there is no such file"):
        tables()
    monkeypatch.delenv("PAGED_INFER_TILES")
    (tmp_path / "sm80.json").write_text(json.dumps({"arch": 90, "entries": []}))
    with pytest.raises(ValueError, match=r'"arch" is 90, so its name must be sm90\.json'):
        tables()

"""Kernels compiled for three chips that are not here: clean, and the table says so, or says what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paged_infer.bench.kernels import compile_table as kernel_table
from paged_infer.bench.kernels import variants as kernel_variants
from paged_infer.bench.kernels.compile_table import CHIPS, CompiledRow, load_table, save_table
from paged_infer.bench.kernels.variants import CALLS, HEAD_DIMS, QUICK, full_variants
from paged_infer.cli import app
from paged_infer.kernels.ahead_of_time import SHARED_LIMIT
from paged_infer.kernels.triton_runtime import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
GOOD = CompiledRow("flash bfloat16 128", "flash", 90, 200, 0, 163_840, SHARED_LIMIT[90], 8, 2)
# Every family's kernels, as their names stand in the table.
KERNELS = {
    "flash", "prefill", "plan", "decode", "combine", "store_kv", "copy_blocks", "add_rms_norm", "qk_norm_rope",
    "silu_mul", "race", "final", "latent_decode", "count", "place", "grouped", "sum", "quantised", "add_splits",
    "round", "store_codes", "store_latents",
}  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], list[CompiledRow]]:
    """The command, in a process of its own; what it compiled once it finds in Triton's cache."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "paged_infer.bench.kernels.cli", "--compile-only", "--quick"]
    result = subprocess.run(
        [*command, "--figures", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    table = folder / "kernels-compiled.json"
    assert table.exists(), result.stderr
    return result, load_table(table)


@needs_triton
def test_every_kernel_fits_every_chip_without_a_spill(quick):
    result, rows = quick
    assert [(row.variant, row.arch, row.problem) for row in rows if row.problem] == []
    assert result.returncode == 0, result.stdout + result.stderr
    for arch in CHIPS:
        assert {row.kernel for row in rows if row.arch == arch} == KERNELS
    for row in rows:
        assert 0 < row.registers <= 255
        assert row.shared_bytes <= row.shared_limit == SHARED_LIMIT[row.arch]


@needs_triton
def test_float32_products_are_full_float32(quick):
    """Both attention kernels and the decode are among them: every kernel with a dot."""
    _, rows = quick
    with_dots = {row.kernel for row in rows if "float32" in row.variant.split()}
    assert {"flash", "prefill", "decode"} <= with_dots
    assert [row.variant for row in rows if row.uses_tf32] == []


@needs_triton
def test_the_command_prints_a_table_for_each_chip(quick):
    result, rows = quick
    for arch in CHIPS:
        assert f"sm{arch}: " in result.stdout and f"(limit {SHARED_LIMIT[arch]:,})" in result.stdout
    for row in rows:
        assert row.variant in result.stdout
    unclean = sum(bool(row.problem) for row in rows)
    assert f"{len(rows)} kernels" in result.stdout and f"{unclean} not clean" in result.stdout


def test_the_lists_hold_every_family_head_dim_and_block_size():
    full = full_variants()
    quick = [variant for variant in full if variant.label in QUICK]
    for variants in (quick, full):
        assert {variant.family for variant in variants} == set(CALLS)
        assert len({variant.label for variant in variants}) == len(variants)
    assert len(quick) == len(QUICK)
    flash = [variant for variant in full if variant.family == "flash"]
    assert {v.width for v in flash if v.dtype == "float32"} == set(HEAD_DIMS)
    for family in ("prefill", "decode"):
        paged = [variant.options for variant in full if variant.family == family]
        assert {options["group"] for options in paged} == {1, 4, 8}
        assert {options.get("block", 16) for options in paged} == {1, 3, 16}
        assert any("window" in options for options in paged)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spill_bytes": 48}, "spills 48 bytes a thread"),
        ({"shared_bytes": 240_000}, "240,000 bytes of shared memory, the chip has 232,448"),
        ({"uses_tf32": True}, "multiplies in tf32"),
        ({"error": "PTXASError: no"}, "PTXASError: no"),
    ],
)
def test_what_is_not_clean_is_said_and_fails_the_command(changes, said, tmp_path, monkeypatch):
    bad = replace(GOOD, **changes)
    assert GOOD.problem == "" and bad.problem == said
    monkeypatch.setattr(kernel_table, "compile_table", lambda labels, chips: [GOOD, bad])
    arguments = ["bench", "kernels", "--compile-only", "--figures", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert f"sm90 flash bfloat16 128 (flash): {said}" in result.output
    assert "2 kernels" in result.output and "1 not clean" in result.output


def test_a_table_survives_its_json(tmp_path):
    rows = [GOOD, replace(GOOD, arch=80, uses_tf32=True)]
    save_table(rows, tmp_path / "deep" / "table.json")
    assert load_table(tmp_path / "deep" / "table.json") == rows
    assert len(json.loads((tmp_path / "deep" / "table.json").read_text())) == 2


@needs_triton
def test_a_call_that_cannot_be_compiled_is_a_row_that_says_why(monkeypatch):
    """Here, where triton interprets, nothing can be compiled at all."""
    row, *others = kernel_table.compile_variant(kernel_variants.Variant("silu_mul", "bfloat16", 64), 90)
    assert others == []
    needs = "ahead-of-time compilation needs triton, and a process started with TRITON_INTERPRET=0"
    assert row.problem == f"RuntimeError: {needs}"


@needs_triton
def test_a_child_that_ends_early_is_an_error_and_not_a_short_table(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the compiling process ended with status 1"):
        kernel_table.compile_table(QUICK)


def test_a_label_that_no_variant_has_is_refused():
    with pytest.raises(ValueError, match=r"labels=\['flash bfloat17'\]: no variant has such a label"):
        kernel_table.compile_table(["flash bfloat17"])


def test_without_triton_the_command_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("paged_infer.kernels.triton_runtime.HAS_TRITON", False)
    result = CliRunner().invoke(app, ["bench", "kernels", "--compile-only", "--figures", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.strip() == "error: triton is not installed: it is what compiles the kernels"
    assert list(Path(tmp_path).iterdir()) == []

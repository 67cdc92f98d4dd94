"""The machine code of quantised products: the tensor cores of their operands' type, no spills, two CTAs per SM.

Compiled in a child process for GPUs that are not here.
"""

from __future__ import annotations

import pytest

from paged_infer.bench.kernels.compile_table import CHIPS, CompiledRow, compile_table
from paged_infer.kernels.triton_runtime import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

W4A16, W8A8 = "quantised bfloat16 4096 grid w4a16 tokens 16", "quantised bfloat16 4096 grid w8a8 tokens 2048"
FLOAT8 = "quantised bfloat16 4096 grid float8, blocks tokens 16"
# On sm80, sm90 and sm100. sm80 has no products of float8: the codes become bfloat16.
INSTRUCTIONS = {
    W4A16: ("HMMA", "HGMMA", "UTCHMMA"), W8A8: ("IMMA", "IGMMA", "UTCIMMA"), FLOAT8: ("HMMA", "QGMMA", "UTCQMMA"),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, int], CompiledRow]:
    """One row per variant and GPU, without the kernels that round x and add splits."""
    return {
        (row.variant, row.arch): row for row in compile_table(INSTRUCTIONS) if row.kernel not in ("add_splits", "round")
    }


@pytest.mark.parametrize(("label", "arch"), [(label, arch) for label in INSTRUCTIONS for arch in CHIPS])
def test_it_multiplies_on_the_tensor_cores_of_its_numbers_and_spills_nothing(rows, label: str, arch: int) -> None:
    row = rows[label, arch]
    assert row.problem == "" and row.spills == 0
    assert row.tensor_kinds == [INSTRUCTIONS[label][CHIPS.index(arch)]]
    assert row.wide_copies >= 4
    assert row.blocks_per_sm >= (1 if label == W8A8 else 4)
    assert all(left is None or left >= 2 for left in row.in_flight)  # copies, while a loop multiplies

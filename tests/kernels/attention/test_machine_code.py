"""The machine code of the attention kernels: tensor cores, wide copies, and waits that leave copies in flight.

Compiled for chips that are not here, in a child process. Numbers of buffers and of blocks are those that the choice of
tiles rests on: a stage fewer or a larger tile changes them.
"""

from __future__ import annotations

import pytest

from paged_infer.bench.kernels.compile_table import CHIPS, CompiledRow, compile_table
from paged_infer.kernels.triton_runtime import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

FLASH, FLASH_64 = "flash bfloat16 128 causal", "flash bfloat16 64 causal"
PREFILL, PREFILL_64 = "prefill bfloat16 128 group 4 block 16", "prefill bfloat16 64 group 4 block 16"
DECODE, DECODE_UNSPLIT = "decode bfloat16 128 group 4 block 16", "decode bfloat16 128 group 4 short lse"
LABELS = (FLASH, FLASH_64, PREFILL, PREFILL_64, DECODE, DECODE_UNSPLIT)
# On sm80, sm90 and sm100: buffers of keys and values.
BUFFERS = {
    FLASH: (2, 3, 3), FLASH_64: (2, 3, 3), PREFILL: (2, 3, 3), PREFILL_64: (2, 3, 3),
    DECODE: (2, 2, 2), DECODE_UNSPLIT: (2, 2, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, int], CompiledRow]:
    """One row of each variant and chip; what plans and combines the splits of a decode has no product."""
    rows = compile_table(LABELS)
    return {(row.variant, row.arch): row for row in rows if row.kernel not in ("plan", "combine")}


ON_EVERY_CHIP = pytest.mark.parametrize(("label", "arch"), [(label, arch) for label in LABELS for arch in CHIPS])


@ON_EVERY_CHIP
def test_it_multiplies_on_tensor_cores_and_spills_nothing(rows, label: str, arch: int) -> None:
    row = rows[label, arch]
    assert row.problem == ""
    assert row.spills == 0
    assert row.tensor_ops >= 16


@ON_EVERY_CHIP
def test_it_copies_sixteen_bytes_a_thread_without_waiting(rows, label: str, arch: int) -> None:
    assert rows[label, arch].wide_copies >= 14


@ON_EVERY_CHIP
def test_each_main_loop_leaves_copies_in_flight_while_it_multiplies(rows, label: str, arch: int) -> None:
    in_flight = rows[label, arch].in_flight
    assert len(in_flight) == 2  # tiles without a mask, and those with one
    assert all(left is not None and left >= 2 for left in in_flight), in_flight


@ON_EVERY_CHIP
def test_it_has_as_many_buffers_as_its_stages_were_chosen_for(rows, label: str, arch: int) -> None:
    assert rows[label, arch].kv_buffers == BUFFERS[label][CHIPS.index(arch)]


@ON_EVERY_CHIP
def test_a_processor_holds_the_blocks_that_splits_are_counted_for(rows, label: str, arch: int) -> None:
    blocks = rows[label, arch].blocks_per_sm
    assert blocks >= (4 if label.startswith("decode") else 2 if label == PREFILL_64 and arch != 80 else 1)

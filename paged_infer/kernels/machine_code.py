"""What a compiled kernel does, read from its machine code (SASS) and from Triton's intermediate code (TTGIR).

    .L_x_1:                                          the main loop: from a label to the branch back to it, with
        DEPBAR.LE SB0, 0x2                           tensor-core instructions in between. This wait leaves two groups
        HGMMA.64x128x16.F32.BF16 ...                 of copies in flight while the loop multiplies. 0x0 would wait
        LDGSTS.E.BYPASS.128 ...                      for every copy, and the memory would rest meanwhile.
        @!P2 BRA `(.L_x_1)

None of this is a measurement. It shows without a GPU whether the number of stages is right: ``num_stages`` also counts
loads of block tables, so it does not give the number of buffers for keys and values.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paged_infer.kernels.triton_runtime import triton

# HMMA: sm80, and small products everywhere. HGMMA: sm90, of four warps. UTCHMMA: sm100, by the tensor memory.
# The same with I: of int8, and with Q: of float8.
_TENSOR = re.compile(r"\b([HIQ]MMA|[HIQ]GMMA|UTC[HIQ]MMA)\b")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_EXIT = re.compile(r"\*/ +EXIT\b")  # the end of the kernel; paths behind it branch back into the middle
_WAIT = re.compile(r"(?<!WARPGROUP\.)DEPBAR\.LE SB0, 0x([0-9a-f]+)")  # SB0 counts groups of copies (LDGDEPBAR)
# Buffers x keys x head_dim, in shared memory. Barriers and block-table entries are integers.
_BUFFERS = re.compile(r"memdesc<(\d+)x\d+x\d+x(?:bf16|f16|f32), #\w+, #smem, mutable")


@dataclass(frozen=True, slots=True)
class MachineCode:
    """Counts of instructions in the whole kernel, and the waits of its main loops."""

    tensor_ops: int
    wide_copies: int  # asynchronous copies of 16 bytes a thread, from global to shared memory
    tma_copies: int  # asynchronous copies of a tile
    spills: int  # loads and stores of local memory
    in_flight: tuple[int | None, ...]  # for each main loop, the groups of copies that its strictest wait leaves
    kv_buffers: int  # tiles of keys that are in shared memory at once; 0 where no loop is pipelined
    tensor_kinds: tuple[str, ...] = ()  # the names of the tensor-core instructions


def read_machine_code(cubin: bytes, ttgir: str) -> MachineCode:
    """Disassemble a kernel and count.

    Raises:
        RuntimeError: nvdisasm, which comes with triton, cannot read the kernel.
    """
    sass = _disassemble(cubin)
    return MachineCode(
        tensor_ops=len(_TENSOR.findall(sass)),
        wide_copies=len(re.findall(r"\bLDGSTS\.\S*\.128\b", sass)),
        tma_copies=len(re.findall(r"\bUTMALDG\b", sass)),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        in_flight=tuple(_strictest_wait(loop) for loop in _main_loops(sass.splitlines())),
        kv_buffers=min((int(count) for count in _BUFFERS.findall(ttgir)), default=0),
        tensor_kinds=tuple(sorted(set(_TENSOR.findall(sass)))),
    )


def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        result = subprocess.run([triton.knobs.nvidia.nvdisasm.path, "-c", str(path)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"nvdisasm failed with status {result.returncode}: {result.stderr[-500:]}")
    return result.stdout


def _main_loops(lines: list[str]) -> Iterator[str]:
    """The text of each innermost loop that has tensor-core instructions."""
    label_at: dict[str, int] = {}
    begins: list[int] = []  # of the loops found
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            label_at[label[1]] = number
        elif (branch := _BRANCH.search(line)) and branch[1] in label_at:
            begin = label_at[branch[1]]
            body = "\n".join(lines[begin:number])
            holds_another = any(begin <= inner for inner in begins)
            if not holds_another and _TENSOR.search(body) and not _EXIT.search(body):
                begins.append(begin)
                yield body


def _strictest_wait(loop: str) -> int | None:
    """The least number of copy groups left in flight; None for a loop that waits for no copy, or at a barrier (TMA)."""
    return min((int(left, 16) for left in _WAIT.findall(loop)), default=None)

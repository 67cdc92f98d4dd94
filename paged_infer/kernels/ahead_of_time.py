"""Compilation of kernels without a GPU: registers, spills and shared memory, as Triton's compiler reports them.

Inside ``compiling_for(arch)`` a launch compiles its kernel for that architecture, with the tile sizes that the wrapper
chooses for it, and does not run it. Tensors may be on "meta", so shapes of any size cost nothing. Triton must not be
interpreting: start the process with ``TRITON_INTERPRET=0``, as ``paged-infer bench kernels --compile-only`` does.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paged_infer.kernels.machine_code import MachineCode, read_machine_code
from paged_infer.kernels.triton_runtime import HAS_TRITON, INTERPRETED, launches_go_to, triton

# CUDA programming guide, table of technical specifications: shared memory limit of a block in bytes, and the warps and
# blocks that a processor (SM) holds.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
_MAX_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
_MAX_BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
_REGISTERS, _RESERVED_SHARED = 65_536, 1024  # of a processor; of each block, for the system


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel, compiled for one architecture."""

    kernel: str
    arch: int  # 90: sm90
    registers: int  # per thread
    spill_bytes: int  # per thread, stores and loads
    shared_bytes: int  # per block
    num_warps: int
    num_stages: int
    ptx: str
    ttgir: str
    cubin: bytes

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that a processor holds at once: registers, shared memory and warps allow no more."""
        registers_per_warp = -(-self.registers * 32 // 256) * 256  # they are handed out in units of 256
        return min(
            _REGISTERS // registers_per_warp // self.num_warps,
            (SHARED_LIMIT[self.arch] + _RESERVED_SHARED) // (self.shared_bytes + _RESERVED_SHARED),
            _MAX_WARPS[self.arch] // self.num_warps,
            _MAX_BLOCKS[self.arch],
        )

    def machine_code(self) -> MachineCode:
        """Its machine code, read. Takes about 50 ms."""
        return read_machine_code(self.cubin, self.ttgir)

    @property
    def is_clean(self) -> bool:
        """Whether no register is spilled, and the block fits in its chip's shared memory."""
        return self.spill_bytes == 0 and self.shared_bytes <= SHARED_LIMIT[self.arch]


class _Driver:
    """A driver that only reports a target: enough for triton to compile, not to run."""

    def __init__(self, arch: int) -> None:
        self._target = triton.backends.compiler.GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Compiled]]:
    """Compile launches inside this block for sm``arch``, and append them to the list that it yields.

    Raises:
        RuntimeError: triton is missing, or was imported as an interpreter.
    """
    if not HAS_TRITON or INTERPRETED:
        raise RuntimeError("ahead-of-time compilation needs triton, and a process started with TRITON_INTERPRET=0")
    compiled: list[Compiled] = []
    kernels: set[Any] = set()

    def compile_it(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        binary = kernel.warmup(*args, grid=grid, **named)
        kernels.add(kernel)
        registers, spill_bytes = _resources(binary.asm["cubin"])
        meta = binary.metadata
        sizes = (registers, spill_bytes, meta.shared, meta.num_warps, meta.num_stages)
        code = (binary.asm["ptx"], binary.asm["ttgir"], binary.asm["cubin"])
        compiled.append(Compiled(kernel.fn.__name__, arch, *sizes, *code))

    triton.runtime.driver.set_active(_Driver(arch))
    try:
        with launches_go_to(compile_it, divmod(arch, 10)):
            yield compiled
    finally:
        if torch.cuda.is_available():
            triton.runtime.driver.reset_active()
        for kernel in kernels:
            kernel.device_caches.clear()  # the key is the device number, which is 0 for every architecture here


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread; registers are spilled to the stack."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers: {report[-500:]}")
    return int(found[1]), int(found[2])

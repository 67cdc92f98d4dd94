"""Every kernel compiled for chips that are not here: registers, shared memory and what the machine code does.

    variant  "flash bfloat16 128 causal"  x  chip sm80, sm90, sm100   ->   registers, spills, copies in flight

``compile_table`` starts a child process with TRITON_INTERPRET=0 (in this one Triton may be an interpreter already),
which uses one process a core. Triton keeps what it compiled in its cache folder, so a second run only reads. No GPU is
needed, and none is used.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Collection
from collections.abc import Sequence as ReadOnlyList
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from paged_infer.bench.kernels.variants import Variant, full_variants
from paged_infer.kernels.ahead_of_time import SHARED_LIMIT, compiling_for
from paged_infer.kernels.triton_runtime import HAS_TRITON

CHIPS = (80, 90, 100)


@dataclass(frozen=True, slots=True)
class CompiledRow:
    """One kernel on one chip. ``error`` is the compiler's message if it failed; then the rest is empty."""

    variant: str
    kernel: str
    arch: int
    registers: int = 0  # a thread
    spill_bytes: int = 0  # a thread
    shared_bytes: int = 0  # a block
    shared_limit: int = 0
    num_warps: int = 0
    num_stages: int = 0
    uses_tf32: bool = False
    blocks_per_sm: int = 0  # that registers, shared memory and warps allow
    tensor_ops: int = 0  # this and the next six: see ``MachineCode``
    wide_copies: int = 0
    tma_copies: int = 0
    spills: int = 0
    in_flight: list[int | None] = field(default_factory=list)
    kv_buffers: int = 0
    tensor_kinds: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    @property
    def problem(self) -> str:
        """What is wrong with it, or an empty string."""
        problems = [self.error] if self.error else []
        if self.spill_bytes:
            problems.append(f"spills {self.spill_bytes} bytes a thread")
        if self.shared_bytes > self.shared_limit:
            problems.append(f"{self.shared_bytes:,} bytes of shared memory, the chip has {self.shared_limit:,}")
        if self.uses_tf32:
            problems.append("multiplies in tf32")
        return ", ".join(problems)


def compile_table(labels: Collection[str] | None = None, chips: ReadOnlyList[int] = CHIPS) -> list[CompiledRow]:
    """Compile the variants with these labels (default: all) for ``chips``, in a child process.

    Args:
        labels: ``Variant.label`` of each; ``QUICK`` has a few of each kernel.
        chips: keys of ``SHARED_LIMIT``: 90 is sm90.

    Raises:
        ValueError: no variant has such a label.
        RuntimeError: triton is missing, or the child ended before its work.
    """
    if unknown := set(labels or ()) - {variant.label for variant in full_variants()}:
        raise ValueError(f"labels={sorted(unknown)}: no variant has such a label")
    if not HAS_TRITON:
        raise RuntimeError("triton is not installed: it is what compiles the kernels")
    root = Path(__file__).resolve().parents[3]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = None if labels is None else sorted(labels)
    child = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import print_rows; print_rows({wanted}, {tuple(chips)})"],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(f"the compiling process ended with status {child.returncode}: its message is above")
    return [CompiledRow(**row) for row in json.loads(child.stdout)]


def save_table(rows: list[CompiledRow], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f" {json.dumps(asdict(row))}" for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def load_table(path: Path) -> list[CompiledRow]:
    return [CompiledRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


# -- In the child, where triton compiles -----------------------------------------------------------------------------


def print_rows(labels: Collection[str] | None, chips: ReadOnlyList[int]) -> None:
    """Compile, and print all rows as JSON; a bar on standard error counts the variants."""
    wanted = [variant for variant in full_variants() if labels is None or variant.label in labels]
    tasks = list(product(wanted, chips))
    # A server that has imported torch and triton once, and forks: a worker starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as workers:
        found = workers.map(compile_variant, *zip(*tasks, strict=True))
        bar = tqdm(found, "compiling", len(tasks), disable=not sys.stderr.isatty())
        print(json.dumps([asdict(row) for rows in bar for row in rows]))


def compile_variant(variant: Variant, arch: int) -> list[CompiledRow]:
    """What a call of ``variant`` launches on sm``arch``: one row, or two where it launches two kernels."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        with compiling_for(arch) as compiled:
            variant.call()
    except Exception as error:  # whatever the compiler raises is a row of the table
        message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return [CompiledRow(variant.label, variant.family, arch, error=message)]
    seconds = (time.perf_counter() - start) / max(1, len(compiled))
    sizes = ("registers", "spill_bytes", "shared_bytes", "num_warps", "num_stages", "blocks_per_sm")
    return [
        CompiledRow(
            variant=variant.label,
            kernel=one.kernel.removeprefix("_").removesuffix("_kernel"),
            arch=arch,
            shared_limit=SHARED_LIMIT[arch],
            uses_tf32="tf32" in one.ptx,
            **asdict(one.machine_code()),
            seconds=round(seconds, 2),
            **{name: getattr(one, name) for name in sizes},
        )
        for one in compiled
    ]

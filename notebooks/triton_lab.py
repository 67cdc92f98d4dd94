"""What a Triton kernel touches, and what the compiler makes of it, on a machine without a GPU as on one with it.

>>> seen = watched(copy_kernel, (3,), x, out, 10, BLOCK=4)   # launches it
>>> seen.num_read, seen.num_written                          # elements that it loaded and stored
>>> seen.writers[1]                                          # of argument 1: which program wrote each element
>>> compiled(matmul_kernel, a, b, c, 256, 256, 256, variants=[{"BLOCK": 64, "num_stages": 3}])   # for an H100

``watched`` reads the loads and stores of Triton's interpreter, and ``compiled`` asks Triton's compiler, which needs no
GPU. A process does one or the other, so what this one cannot do runs in a child process.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paged_infer.kernels.ahead_of_time import compiling_for
from paged_infer.kernels.triton_runtime import INTERPRETED, capability, launch, launches_go_to

H100 = 90  # its architecture, and an H200's: sm90
_HEADER = "from paged_infer.kernels.triton_runtime import launch, tl, triton\n\n"


@dataclass
class Accesses:
    """What the programs of one launch load and store. Arguments are counted from 0, programs along the first axis.

    Attributes:
        reads: by the number of a tensor among the arguments, how many times each of its elements is loaded.
        writers: likewise, the program that stores each element last; -1 where none does.
    """

    num_read: int = 0
    num_written: int = 0
    reads: dict[int, Tensor] = field(default_factory=dict)
    writers: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_moved(self) -> int:
        return self.num_read + self.num_written


def watched(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> Accesses:
    """Launch ``kernel``, and report what its programs load and store."""
    if INTERPRETED:
        return _interpret(kernel, grid, args, named)
    copies = [arg.cpu() if isinstance(arg, Tensor) else arg for arg in args]
    launch(kernel, grid, *args, **named)
    return _in_child("_interpret", kernel, (grid, copies, named), "1")


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched within the block, in order; they run as usual."""
    names: list[str] = []

    def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        names.append(kernel.fn.__name__)
        kernel[grid](*args, **named)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with launches_go_to(run, capability(device)):
        yield names


def compiled(kernel: Any, *args: Any, variants: list[dict[str, Any]], arch: int = H100) -> list[dict[str, Any]]:
    """What Triton's compiler reports of ``kernel`` for a chip, once for each set of named arguments in ``variants``.

    Returns:
        for each variant: registers (a thread), shared_bytes (a block), spill_bytes, num_warps, num_stages,
        blocks_per_sm, tensor_ops, wide_copies, and in_flight: the groups of copies that the main loop's wait leaves.
    """
    on_meta = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args]
    return _in_child("_compile", kernel, (on_meta, variants, arch), "0")


def _interpret(kernel: Any, grid: tuple[int, ...], args: Any, named: dict[str, Any]) -> Accesses:
    from triton.runtime.interpreter import interpreter_builder as builder

    seen, size = Accesses(), (*grid, 1, 1)
    tensors = {number: arg for number, arg in enumerate(args) if isinstance(arg, Tensor)}
    for number, tensor in tensors.items():
        seen.reads[number] = torch.zeros(tensor.numel(), dtype=torch.int64)
        seen.writers[number] = torch.full((tensor.numel(),), -1)
    load, store = builder.create_masked_load, builder.create_masked_store

    def places(pointers: Any, mask: Any) -> tuple[int, Iterator[tuple[int, Tensor]]]:
        addresses = torch.from_numpy(pointers.data[mask.data].astype("int64"))
        found = ((n, (addresses - t.data_ptr()) // t.element_size()) for n, t in tensors.items())
        inside = ((n, at[(at >= 0) & (at < tensors[n].numel())]) for n, at in found)
        return addresses.numel(), inside

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        count, inside = places(pointers, mask)
        seen.num_read += count
        for number, at in inside:
            seen.reads[number].index_add_(0, at, torch.ones_like(at))
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count, inside = places(pointers, mask)
        seen.num_written += count
        x, y, z = builder.grid_idx
        for number, at in inside:
            seen.writers[number][at] = x + size[0] * (y + size[1] * z)
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        launch(kernel, grid, *args, **named)
    finally:
        del builder.create_masked_load, builder.create_masked_store
    for maps in (seen.reads, seen.writers):
        maps.update({number: flat.view(tensors[number].shape) for number, flat in maps.items()})
    return seen


def _compile(kernel: Any, args: Any, variants: list[dict[str, Any]], arch: int) -> list[dict[str, Any]]:
    found = []
    for variant in variants:
        with compiling_for(arch) as kernels:
            launch(kernel, (1,), *args, **variant)
        (one,) = kernels
        names = ("registers", "spill_bytes", "shared_bytes", "num_warps", "num_stages", "blocks_per_sm")
        found.append({name: getattr(one, name) for name in names} | asdict(one.machine_code()))
    return found


def _in_child(function: str, kernel: Any, job: tuple[Any, ...], interpret: str) -> Any:
    """``function(kernel, *job)`` in a process of its own, in which Triton interprets ("1") or compiles ("0")."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": os.pathsep.join(paths)}
    if interpret == "1":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel_source.py").write_text(_HEADER + inspect.getsource(kernel.fn), encoding="utf-8")
        (Path(folder) / "job").write_bytes(pickle.dumps((function, kernel.fn.__name__, job)))
        command = [sys.executable, "-c", f"import triton_lab; triton_lab._work({folder!r})"]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"the child process ended with status {child.returncode}: {child.stderr[-800:]}")
        return pickle.loads((Path(folder) / "result").read_bytes())


def _work(folder: str) -> None:
    function, name, job = pickle.loads((Path(folder) / "job").read_bytes())
    spec = importlib.util.spec_from_file_location("kernel_source", Path(folder) / "kernel_source.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = globals()[function](getattr(module, name), *job)
    (Path(folder) / "result").write_bytes(pickle.dumps(result))

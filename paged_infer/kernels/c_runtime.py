"""C made ready where there is a compiler: the CPU's kernels are built once, kept, and called without a Python binding.

A decode step on a CPU is many small passes over a few rows. Torch takes several operations for each, and attention has
to gather scattered keys before it can multiply them. ``c_kernels.c`` does each in one pass, and reads keys where they
lie. It is compiled for the machine it runs on, in about a second, the first time it is asked for; the result stays in
the user's cache folder. Threads are OpenMP's, from the pool that torch has loaded.

Without a compiler nothing is lost but speed: "auto" then takes the "sdpa" backend.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # its OpenMP runtime has to be the one in the process

SOURCES = tuple(Path(__file__).with_name(name) for name in ("c_kernels.c", "c_linear.c"))
# Sums may be taken in any order, as a vector unit does, but NaN and infinity keep their meaning.
FLAGS = (
    "-O3 -march=native -std=gnu11 -shared -fPIC -fno-math-errno -fno-trapping-math -fno-signed-zeros "
    "-fassociative-math"
).split()
DTYPES = {torch.float32: "-DFLOAT32", torch.bfloat16: "-DBFLOAT16"}  # what the tensors hold: a library each
_BUILD_TIMEOUT_S = 120

_POINTER, _INT, _FLOAT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "add_rms_norm": [_POINTER] * 5 + [_INT] * 4 + [_FLOAT, _THREADS],
    "silu_mul": [_POINTER] * 2 + [_INT] * 3 + [_THREADS],
    "qk_norm_rope": [_POINTER] * 8 + [_INT] * 5 + [_FLOAT, _THREADS],
    "argmax": [_POINTER] * 3 + [_INT] * 3 + [_THREADS],
    "store_kv": [_POINTER] * 5 + [_INT] * 4,
    "linear": [_POINTER] * 4 + [_INT] * 4 + [_THREADS],
    "paged_decode": [_POINTER] * 6 + [_INT] * 8 + [_FLOAT, _THREADS],
}


class CannotBuild(Exception):
    """There is no C compiler here, or it does not do; the message says which."""


@functools.cache
def library(dtype: torch.dtype = torch.float32) -> ctypes.CDLL:
    """The built kernels, for tensors of ``dtype``, one of ``DTYPES``.

    Raises:
        CannotBuild: no compiler, or its complaint.
    """
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise CannotBuild("no C compiler (cc, gcc, clang, or one named by CC) was found")
    flags = [*FLAGS, DTYPES[dtype]]
    try:
        target = _cache_folder() / f"kernels-{_fingerprint(compiler, flags)}.so"
        if not target.exists():
            _build(compiler, flags, target)
        loaded = ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuild(f"{compiler}: {error}") from None
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    loaded.panel_width.argtypes, loaded.panel_width.restype = [], _INT
    return loaded


@functools.cache
def why_not() -> str | None:
    """Why the kernels cannot be used here; None where they can."""
    try:
        library()
    except CannotBuild as error:
        return str(error)
    return None


def _build(compiler: str, flags: list[str], target: Path) -> None:
    """Compile to a file of its own, then rename: another process may be doing the same."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        for openmp in (["-fopenmp"], []):  # Apple's clang has no OpenMP: one thread is better than none
            command = [*compiler.split(), *flags, *openmp, *map(str, SOURCES), "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
            if done.returncode == 0:
                break
        else:
            raise CannotBuild(f"{compiler} failed: {done.stderr.strip()[:500]}")
        os.replace(built, target)


def _fingerprint(compiler: str, flags: list[str]) -> str:
    """Of all that the result depends on: a home folder may be shared by machines of different kinds."""
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, timeout=_BUILD_TIMEOUT_S)
    parts = (
        *(source.read_bytes() for source in SOURCES),
        " ".join(flags).encode(),
        version.stdout,
        _processor().encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        kept = {line for line in info.read_text().splitlines() if line.startswith(("model name", "flags"))}
        return "\n".join(sorted(kept))
    return f"{platform.machine()} {platform.processor()}"


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "paged_infer"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="paged_infer-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="paged_infer-"))

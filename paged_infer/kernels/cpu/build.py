"""The build of the C kernels for a CPU: compiled once, cached, and called through ctypes.

A decode step on a CPU is many small passes over a few rows. Torch needs several operations for each, and has to gather
scattered keys before it can multiply them. ``kernels.c`` makes one pass for each, and ``paged_decode.c`` reads keys in
place. They are compiled for the machine at their first use, in about ten seconds, and cached in the user's cache folder
(``cache.py``). Without a usable cache folder, each process compiles them again. Threads are OpenMP's, from the runtime
that torch has loaded.

Without a compiler only speed is lost: "auto" then selects the "sdpa" backend. Each slower fallback is logged as a
warning with its reason.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # loads the OpenMP runtime that the kernels share

from paged_infer.kernels.cpu.cache import CacheUnavailable, KernelCache

logger = logging.getLogger(__name__)

_NAMES = (
    "kernels.c",
    "paged_decode.c",
    "paged_prefill.c",
    "linear.c",
    "linear_bfloat16.c",
    "quant.c",
    "experts.c",
    "layers.c",
)
SOURCES = tuple(map(Path(__file__).with_name, _NAMES))
_HEADERS = tuple(map(Path(__file__).with_name, ("elements.h", "kv_codes.h", "digits.h", "amx.h")))
# Sums may be taken in any order, as a vector unit does, but NaN and infinity keep their meaning.
FLAGS = (
    "-O3 -march=native -std=gnu11 -shared -fPIC -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"
).split()
DTYPES = {torch.float32: "-DFLOAT32", torch.bfloat16: "-DBFLOAT16"}  # one library per dtype
_BUILD_TIMEOUT_S = 900  # a quiet machine takes 10 s, one with many busy processes minutes

_POINTER, _INT, _FLOAT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "add_rms_norm": [_POINTER] * 5 + [_INT] * 4 + [_FLOAT, _FLOAT, _THREADS],
    "silu_mul": [_POINTER] * 2 + [_INT] * 3 + [_THREADS],
    "qk_norm_rope": [_POINTER] * 8 + [_INT] * 5 + [_FLOAT, _FLOAT, _THREADS],
    "argmax": [_POINTER] * 3 + [_INT] * 3 + [_THREADS],
    "mask_logits": [_POINTER] * 3 + [_INT] * 3 + [_THREADS],
    "store_kv": [_POINTER] * 5 + [_INT] * 4,
    "store_kv_codes": [_POINTER] * 7 + [_INT] * 6 + [_THREADS],
    "linear": [_POINTER] * 4 + [_INT] * 4 + [_THREADS],
    "linear_bfloat16": [_POINTER] * 4 + [_INT] * 4 + [_THREADS],
    "quantised_linear": [_POINTER] * 4 + [_INT] * 3 + [_THREADS],
    "expert_segments": [_POINTER] * 4 + [_INT] * 3,
    "grouped_linear": [_POINTER] * 5 + [_INT] * 4 + [_THREADS],
    "expert_sum": [_POINTER] * 4 + [_INT] * 3 + [_THREADS],
    "store_latent_codes": [_POINTER] * 5 + [_INT] * 5,
    "latent_decode": [_POINTER] * 7 + [_INT] * 7 + [_FLOAT, _THREADS],
    "decoder_layers": [_POINTER] * 4 + [_INT, _POINTER, _INT] + [_POINTER] * 4 + [_THREADS],
    "paged_prefill": [_POINTER] * 11 + [_INT] * 9 + [_FLOAT, _FLOAT, _THREADS],
    "paged_decode": [_POINTER] * 10 + [_INT] * 9 + [_FLOAT, _FLOAT, _THREADS],
}


class BuildError(Exception):
    """There is no C compiler, or it fails; the message gives the reason."""


@functools.cache
def library(dtype: torch.dtype = torch.float32) -> ctypes.CDLL:
    """The built kernels, for tensors of ``dtype``, one of ``DTYPES``.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise BuildError("no C compiler (cc, gcc, clang, or one named by CC) was found")
    flags = [*FLAGS, DTYPES[dtype]]
    try:
        try:
            loaded = _load_or_build(compiler, [*flags, "-fopenmp"])
        except BuildError as error:  # Apple's clang has no OpenMP: one thread is better than none
            loaded = _load_or_build(compiler, flags)
            _warn_once(f"the C kernels run on one thread, without OpenMP: {error}")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler}: {error}") from None
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    for constant in (loaded.panel_width, loaded.prefill_queries):
        constant.argtypes, constant.restype = [], _INT
    return loaded


@functools.cache
def unavailable_reason(dtype: torch.dtype = torch.float32) -> str | None:
    """The reason why the kernels cannot be used on this machine, or None if they can."""
    try:
        library(dtype)
    except BuildError as error:
        return str(error)
    return None


def _load_or_build(compiler: str, flags: list[str]) -> ctypes.CDLL:
    key = _fingerprint(compiler, flags)
    try:
        with KernelCache.opened() as cache:
            loaded = cache.load(key)
            return _build(compiler, flags, key, cache) if loaded is None else loaded
    except CacheUnavailable as refused:
        _warn_not_cached(refused)
    return _build(compiler, flags, key, None)


def _build(compiler: str, flags: list[str], key: str, cache: KernelCache | None) -> ctypes.CDLL:
    """Compile in a temporary folder and store the result in the cache if possible. A loaded library needs no file."""
    with tempfile.TemporaryDirectory(prefix="paged_infer-", ignore_cleanup_errors=True) as folder:
        built = Path(folder) / "kernels.so"
        command = [*shlex.split(compiler), *flags, *map(str, SOURCES), "-o", str(built), "-lm"]
        own = {**os.environ, "TMPDIR": folder}  # a compiler that is killed leaves its files there, too
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, env=own)
        if done.returncode != 0:
            raise BuildError(f"{compiler} failed: {_error_line(done.stderr)}")
        if cache is not None:
            try:
                return cache.store(key, built.read_bytes())
            except OSError as error:
                _warn_not_cached(CacheUnavailable(f"{cache.folder}: {error}"))
        return ctypes.CDLL(str(built))


def _error_line(stderr: str) -> str:
    """One line of the compiler's output: the first that mentions an error, else the last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it gave no reason"]
    return next((line for line in lines if "error" in line.lower()), lines[-1])[:500]


def _warn_not_cached(refused: CacheUnavailable) -> None:
    _warn_once(f"the C kernels are compiled again in each process, as no cache folder can be used: {refused}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _fingerprint(compiler: str, flags: list[str]) -> str:
    """A hash of everything that the result depends on: machines of different kinds may share a home folder."""
    words = shlex.split(compiler)
    version = subprocess.run([*words, "--version"], capture_output=True, timeout=_BUILD_TIMEOUT_S)
    parts = (
        *(source.read_bytes() for source in (*SOURCES, *_HEADERS)),
        " ".join([os.path.realpath(shutil.which(words[0]) or words[0]), *words[1:], *flags]).encode(),
        version.stdout,
        _processor().encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` depends on: the CPU's model and features, under their names on x86 and Arm."""
    info = Path("/proc/cpuinfo")
    names = ("model name", "flags", "Features", "CPU ")
    lines = info.read_text().splitlines() if info.exists() else ()
    kept = {line for line in lines if line.startswith(names)}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kept)])

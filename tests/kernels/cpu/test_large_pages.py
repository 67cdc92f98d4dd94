"""Memory of the process, as Linux counts it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from paged_infer.kernels.cpu.large_pages import trim_heap

MIB = 1 << 20


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_was_freed_below_memory_in_use_is_given_back() -> None:
    pieces = [bytearray(b"x" * 60_000) for _ in range(2000)]  # 120 MB, each too small for a mapping of its own
    last, held = pieces.pop(), anonymous_bytes()
    del pieces
    trim_heap()
    assert anonymous_bytes() < held - 60 * MIB
    assert last

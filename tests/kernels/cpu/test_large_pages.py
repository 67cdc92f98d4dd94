"""Memory of the process, as Linux counts it."""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from pathlib import Path

import pytest
import torch

from paged_infer.kernels.cpu import large_pages
from paged_infer.kernels.cpu.large_pages import copy_in_large_pages, trim_heap

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


def test_small_copies_share_a_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_newest", None)
    ones, twos = (copy_in_large_pages(torch.full((1000, 7), n, dtype=torch.int8).T) for n in (1, 2))
    assert ones.is_contiguous() and ones.shape == (7, 1000)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert twos.data_ptr() - ones.data_ptr() == 7040  # 7,000 bytes in whole lines
    ones.zero_()
    assert (twos == 2).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs large pages")
@pytest.mark.parametrize("size", [1, 40])
def test_a_mapping_ends_with_its_last_copy(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, pages_of = list[weakref.ref[mmap.mmap]](), large_pages._pages

    def pages(num_bytes: int, large: bool = True) -> mmap.mmap | None:
        if (found := pages_of(num_bytes, large)) is not None:
            made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(large_pages, "_pages", pages)
    monkeypatch.setattr(large_pages, "_newest", None)
    copies = [copy_in_large_pages(torch.ones(size * MIB, dtype=torch.uint8)) for _ in range(40 // size)]
    assert len(made) == (2 if size == 1 else 1)
    assert all((one == 1).all() for one in copies)
    last = copies.pop()
    del copies
    assert made[-1]() is not None and all(one() is None for one in made[:-1])
    del last
    assert made[-1]() is None

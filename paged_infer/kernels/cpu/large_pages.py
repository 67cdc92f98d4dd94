"""Memory for weights in large pages (2 MiB on x86), where the system has them; and what loading has freed, given back.

A decode step reads every weight once, and in pages of 4 KiB the processor has to look up each: reading the matrices of
SmolLM2-135M took 7 to 10 % longer so. Most matrices are smaller than a large page, so they share a mapping.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_ALONE = 16 << 20  # bytes; a tensor of this size has a mapping of its own, which ends with it
_LINE = 64  # bytes, of a cache
_SHARED = 32 << 20  # bytes of a mapping that copies share
_lock = threading.Lock()
_newest: weakref.ref[mmap.mmap] | None = None  # such mapping, while a copy is in it
_used = 0  # bytes of it


def to_empty_in_large_pages(module: nn.Module, short_lived: Iterable[Tensor] = ()) -> None:
    """``module.to_empty(device="cpu")``. The tensors take memory as they are written.

    Args:
        short_lived: tensors of the module that are dropped before the others. Each has a mapping of its own: a shared
            one would keep their memory as long as any other tensor is there.
    """
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    apart = {*map(id, short_lived)}
    shared, used = _mapping(sum(_in_lines(x) for _, x in own if x.nbytes < _ALONE and id(x) not in apart)), 0

    def empty_like(tensor: Tensor) -> Tensor:
        nonlocal used
        if tensor.nbytes >= _ALONE:
            memory = _mapping(tensor.nbytes)
        elif id(tensor) in apart:
            memory = _mapping(tensor.nbytes, large=False)  # given back at once, which a heap cannot always
        else:
            memory, used = shared[used : used + tensor.nbytes], used + _in_lines(tensor)
        return memory.view(tensor.dtype).view(tensor.shape)

    module._apply(empty_like)


def copy_in_large_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy. Small ones share mappings, each of which ends with its last copy: they should live as long."""
    global _newest, _used
    num_bytes = tensor.nbytes
    if num_bytes >= _ALONE:
        memory = _mapping(num_bytes)
    else:
        with _lock:
            pages, first = _newest() if _newest else None, _used
            if pages is None or first + num_bytes > len(pages):
                pages, first = _pages(_SHARED), 0
            memory = _in(pages, first, num_bytes)
            if pages is not None:
                _newest, _used = weakref.ref(pages), first + _in_lines(tensor)
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _in_lines(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _LINE) * _LINE


def _mapping(num_bytes: int, large: bool = True) -> Tensor:  # uint8
    return _in(_pages(num_bytes, large), 0, num_bytes)


def _pages(num_bytes: int, large: bool = True) -> mmap.mmap | None:
    if not num_bytes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if large:
            pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # no room, which torch reports with the number of bytes; or a kernel without large pages
        return None
    return pages


def _in(pages: mmap.mmap | None, first: int, num_bytes: int) -> Tensor:
    """uint8 [num_bytes]; it keeps the mapping as long as it lives."""
    if pages is None or not num_bytes:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(pages, dtype=torch.uint8, offset=first, count=num_bytes)


def trim_heap() -> None:
    """Give memory that has been freed back to the system, where C's library is glibc.

    It keeps what lies below memory in use: 150 MB after SmolLM2-135M in float32 was packed matrix by matrix.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)

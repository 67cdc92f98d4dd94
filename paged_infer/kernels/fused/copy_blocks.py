"""Copy whole blocks inside the paged caches, in every layer at once: the copy of copy-on-write.

    sources [3], destinations [6]         two sequences share block 3, and one of them is about to write to it

    layer 0 keys     [ 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 ]       table (on the device)     address   words per block
    layer 0 values   [ 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 ]         0  layer 0 keys         0x7f..00      ...
        ...                        |           ^               1  layer 0 values       0x7f..80      ...
    layer L values               [ 3 ]  --->  [ 6 ]           2L+1 layer L values        ...         ...

The caches are separate tensors, so torch needs a read and a write for each: 112 launches for 28 layers. Here one launch
copies them all: each program looks up its cache in a small table of addresses on the device. Bytes are copied, so the
caches may differ in dtype and shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence as ReadOnlyList

import torch
from torch import Tensor

from paged_infer.kernels.checks import INDICES, layouts, on_one_device, shapes
from paged_infer.kernels.device import to_device
from paged_infer.kernels.triton_runtime import launch, tl, triton

WORDS_PER_PROGRAM = 1024  # of 4 bytes: 4 KiB


def copy_blocks(caches: ReadOnlyList[Tensor], sources: Tensor, destinations: Tensor) -> None:
    """Copy block ``sources[i]`` of every cache to its block ``destinations[i]``.

    The first call with these caches copies a table of their addresses to the device and keeps it; make that call before
    a CUDA graph is captured.

    Args:
        caches: tensors [num_blocks, ...] with the same num_blocks, contiguous, changed in place.
        sources, destinations: [P] int32 or int64. Destinations must be distinct and none of the sources: all copies
            run at the same time.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit; for CPU tensors also a block outside the caches, or a
        destination that is a source or is repeated.
    """
    _check(caches, sources, destinations)
    if not caches:
        return
    addresses = tuple(cache.data_ptr() for cache in caches)
    block_bytes = tuple(math.prod(cache.shape[1:]) * cache.element_size() for cache in caches)
    is_aligned = all(number % 16 == 0 for number in (*addresses, *block_bytes))
    word_bytes = 4 if is_aligned else 1  # 16 bytes per thread either way, if the addresses allow it
    table = _table(addresses, tuple(count // word_bytes for count in block_bytes), sources.device)
    launch(
        _copy_blocks_kernel,
        (len(sources), len(caches), triton.cdiv(max(block_bytes), word_bytes * WORDS_PER_PROGRAM)),
        *(table, sources, destinations),
        IS_ALIGNED=is_aligned,
        BLOCK=WORDS_PER_PROGRAM,
    )


def copy_blocks_reference(caches: ReadOnlyList[Tensor], sources: Tensor, destinations: Tensor) -> None:
    """``copy_blocks`` in plain torch: a read and a write for each cache."""
    sources, destinations = sources.long(), destinations.long()
    for cache in caches:
        cache.index_copy_(0, destinations, cache.index_select(0, sources))


@functools.lru_cache(maxsize=8)
def _table(addresses: tuple[int, ...], num_words: tuple[int, ...], device: torch.device) -> Tensor:
    """[caches, 2] int64: the address of each cache, and the number of words in one of its blocks."""
    return to_device(torch.tensor(list(zip(addresses, num_words, strict=True)), dtype=torch.int64), device)


@triton.jit
def _copy_blocks_kernel(
    table, sources, destinations, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # one program: BLOCK words of one block of one cache
    pair, cache = tl.program_id(0), tl.program_id(1)
    address, num_words = tl.load(table + 2 * cache), tl.load(table + 2 * cache + 1)
    if IS_ALIGNED:
        start = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
        num_words = tl.multiple_of(num_words, 4)
    else:
        start = address.to(tl.pointer_type(tl.int8))
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + pair).to(tl.int64) * num_words
    destination = tl.load(destinations + pair).to(tl.int64) * num_words
    words = tl.load(start + source + word, mask=word < num_words)
    tl.store(start + destination + word, words, mask=word < num_words)


def _check(caches: ReadOnlyList[Tensor], sources: Tensor, destinations: Tensor) -> None:
    indices = {"sources": sources, "destinations": destinations}
    tensors = indices | {f"cache {i}": cache for i, cache in enumerate(caches)}
    same_blocks = len({cache.shape[:1] for cache in caches}) <= 1
    if sources.dim() != 1 or sources.shape != destinations.shape or not same_blocks:
        raise ValueError(
            "copy_blocks expects caches [num_blocks, ...], sources [P] and destinations [P]; got " + shapes(**tensors)
        )
    integers = {x.dtype for x in indices.values()} <= {*INDICES}
    if not (integers and on_one_device(**tensors) and all(cache.is_contiguous() for cache in caches)):
        raise ValueError(
            "copy_blocks expects one device, int64 or int32 blocks, contiguous caches; got " + layouts(**tensors)
        )
    if sources.device.type == "cpu" and caches:
        num_blocks = caches[0].shape[0]
        read, written = sources.tolist(), destinations.tolist()
        outside = [block for block in (*read, *written) if not 0 <= block < num_blocks]
        if outside:
            raise ValueError(f"blocks {outside} must be within 0..{num_blocks - 1}, the caches' last")
        if len(set(written)) < len(written) or set(written) & set(read):
            raise ValueError(f"a destination in {written} is repeated, or is one of the sources {read}")

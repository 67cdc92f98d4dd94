"""Move blocks from one engine's pool to another's, through swap space that both map.

    prefill engine     pool  --swap_out-->  shared file  --swap_in-->  pool     decode engine
                       hashes of the blocks  ----- receipt ----->  equal to its own hashes of the prompt?

The receipt is the chain of the blocks' hashes, each of which stands for all tokens up to the end of its block. The
receiver computes the prompt's chain itself, and accepts a block only if its hash is the next one of that chain. Blocks
that it accepts enter its prefix cache, where the request finds them like any others. Blocks that were not sent, or that
were evicted before the request was admitted, are computed. So the tokens are the same in every case.

These functions run on the engines' threads, between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from pathlib import Path

from torch import Tensor

from paged_infer.cache.paged import PagedCache
from paged_infer.engine.engine import LLMEngine

_SPACES: dict[str, list[Tensor]] = {}  # path -> the tensors that this process has mapped


def open_exchange(engine: LLMEngine, path: str, num_blocks: int) -> list[tuple[tuple[int, ...], str]]:
    """Map the file as swap space of ``num_blocks`` blocks. Returns the shapes and types of its tensors, to compare."""
    _SPACES[path] = space = _cache(engine).shared_swap_space(Path(path), num_blocks)
    return [(tuple(one.shape), str(one.dtype)) for one in space]


def send_blocks(engine: LLMEngine, path: str, chain: ReadOnlyList[bytes]) -> list[bytes]:
    """Copy the blocks with the first hashes of ``chain`` to the first swap blocks. Returns the hashes of those sent."""
    pool = engine.manager.pool
    found = [pool.find(block_hash) for block_hash in chain[: len(_SPACES[path][0])]]
    num_sent = found.index(None) if None in found else len(found)
    pairs = [(block, i) for i, block in enumerate(found[:num_sent]) if block is not None]
    _cache(engine).swap_out(pairs, _SPACES[path])
    return list(chain[:num_sent])


def receive_blocks(engine: LLMEngine, path: str, chain: ReadOnlyList[bytes], receipt: ReadOnlyList[bytes]) -> int:
    """Take the sent blocks into the prefix cache. Returns how many blocks of ``chain`` are in it then.

    Stops at the first hash that is not the one of ``chain``, and when only the blocks of the watermark are free.
    """
    manager, pool = engine.manager, engine.manager.pool
    taken: list[tuple[int, int]] = []  # (swap block, block)
    held: list[int] = []  # until all are here, so that none evicts another
    for index, (block_hash, sent_hash) in enumerate(zip(chain, receipt, strict=False)):
        if block_hash != sent_hash:
            break
        block = pool.find(block_hash)
        if block is not None:
            pool.share(block)
        elif manager.num_spare_blocks > 0:
            block = pool.take()
            pool.publish(block, block_hash)
            taken.append((index, block))
        else:
            break
        held.append(block)
    _cache(engine).swap_in(taken, _SPACES[path])
    for block in reversed(held):  # the end of a prompt is evicted before its beginning
        pool.release(block)
    return len(held)


def _cache(engine: LLMEngine) -> PagedCache:
    return engine.in_process.runner.cache

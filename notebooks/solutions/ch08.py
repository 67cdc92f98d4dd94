"""Solutions of chapter 08, the paged KV cache."""

from __future__ import annotations


def slots_between(table, start, end, block_size):
    """Every token is looked up: the next block may lie anywhere."""
    return [table[i // block_size] * block_size + i % block_size for i in range(start, end)]


def read_back(k_cache, table, length):
    """Only the blocks that hold tokens are taken, and only the tokens of the last one."""
    block_size = k_cache.shape[1]
    used = table[: -(-length // block_size)].long()
    return k_cache[used].flatten(0, 1)[:length]  # [blocks, block_size, H_kv, D] -> [length, H_kv, D]


def empty_slots(lengths, block_size):
    """What is missing to the next multiple of block_size: 0 for a full block."""
    return sum(-length % block_size for length in lengths)


def grow_in_order(tables, free, lengths, block_size):
    """Count before taking, and let nobody overtake."""
    for row, length in enumerate(lengths):
        missing = max(0, -(-length // block_size) - len(tables[row]))
        if missing > len(free):
            return row
        tables[row] += free[:missing]
        del free[:missing]
    return len(lengths)

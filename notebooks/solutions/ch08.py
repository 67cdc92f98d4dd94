"""Solutions of chapter 08, the paged KV cache."""

from __future__ import annotations


def read_back(k_cache, table, length):
    """Only the blocks that hold tokens are taken, and only the tokens of the last one."""
    block_size = k_cache.shape[1]
    used = table[: -(-length // block_size)].long()
    return k_cache[used].flatten(0, 1)[:length]  # [blocks, block_size, H_kv, D] -> [length, H_kv, D]


def grow_in_order(tables, free, lengths, block_size):
    """Count before taking, and let no later sequence overtake."""
    for row, length in enumerate(lengths):
        missing = max(0, -(-length // block_size) - len(tables[row]))
        if missing > len(free):
            return row
        tables[row] += [free.pop() for _ in range(missing)]
    return len(lengths)


def truncate(manager, sequence, num_tokens):
    """What a partly filled block holds is still needed; the last block goes first, as in ``free``."""
    num_kept = manager.num_blocks_for(num_tokens)
    for block in reversed(sequence.block_table[num_kept:]):
        manager.free_blocks.append(block)
    del sequence.block_table[num_kept:]
    sequence.num_computed_tokens = num_tokens

"""Wrong answers to the exercises of chapter 08."""

from __future__ import annotations

from planted import wrong


@wrong("read_back", "looks up a surplus entry")
def follows_surplus_entries(k_cache, table, length):
    return k_cache[table.long()].flatten(0, 1)[:length]


@wrong("read_back", "slots past the length")
def keeps_the_empty_slots(k_cache, table, length):
    return k_cache[table[: -(-length // k_cache.shape[1])].long()].flatten(0, 1)


@wrong("read_back", "the table was not asked")
def reads_the_first_slots(k_cache, table, length):
    return k_cache.flatten(0, 1)[:length]


@wrong("grow_in_order", "must get nothing")
def takes_what_there_is(tables, free, lengths, block_size):
    for row, length in enumerate(lengths):
        while len(tables[row]) * block_size < length:
            if not free:
                return row
            tables[row].append(free.pop())
    return len(lengths)


@wrong("grow_in_order", "an earlier one may starve")
def lets_others_overtake(tables, free, lengths, block_size):
    grown = 0
    for row, length in enumerate(lengths):
        missing = max(0, -(-length // block_size) - len(tables[row]))
        if missing <= len(free):
            tables[row] += [free.pop() for _ in range(missing)]
            grown += 1
    return grown


@wrong("truncate", "partly filled")
def rounds_down(manager, sequence, num_tokens):
    num_kept = num_tokens // manager.block_size
    manager.free_blocks.extend(reversed(sequence.block_table[num_kept:]))
    del sequence.block_table[num_kept:]
    sequence.num_computed_tokens = num_tokens


@wrong("truncate", "the last block comes first")
def frees_the_first_first(manager, sequence, num_tokens):
    num_kept = manager.num_blocks_for(num_tokens)
    manager.free_blocks.extend(sequence.block_table[num_kept:])
    del sequence.block_table[num_kept:]
    sequence.num_computed_tokens = num_tokens


@wrong("truncate", "num_computed_tokens is")
def leaves_the_count(manager, sequence, num_tokens):
    num_kept = manager.num_blocks_for(num_tokens)
    manager.free_blocks.extend(reversed(sequence.block_table[num_kept:]))
    del sequence.block_table[num_kept:]


@wrong("truncate", "go to the end")
def loses_the_blocks(manager, sequence, num_tokens):
    del sequence.block_table[manager.num_blocks_for(num_tokens) :]
    sequence.num_computed_tokens = num_tokens

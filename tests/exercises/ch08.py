"""Wrong answers to the exercises of chapter 08."""

from __future__ import annotations

from planted import wrong


@wrong("slots_between", "the tokens' own positions")
def asks_no_table(table, start, end, block_size):
    return list(range(start, end))


@wrong("slots_between", "and not block")
def adds_the_block_itself(table, start, end, block_size):
    return [table[i // block_size] + i % block_size for i in range(start, end)]


@wrong("slots_between", "only the first token was looked up")
def runs_on_from_the_first(table, start, end, block_size):
    first = table[start // block_size] * block_size + start % block_size
    return list(range(first, first + end - start))


@wrong("slots_between", "token 7 is not asked for")
def takes_the_end_too(table, start, end, block_size):
    return [table[i // block_size] * block_size + i % block_size for i in range(start, end + 1)]


@wrong("read_back", "looks up a surplus entry")
def follows_surplus_entries(k_cache, table, length):
    return k_cache[table.long()].flatten(0, 1)[:length]


@wrong("read_back", "slots past the length")
def keeps_the_empty_slots(k_cache, table, length):
    return k_cache[table[: -(-length // k_cache.shape[1])].long()].flatten(0, 1)


@wrong("read_back", "the table was not asked")
def reads_the_first_slots(k_cache, table, length):
    return k_cache.flatten(0, 1)[:length]


@wrong("empty_slots", "a full last block was counted as empty")
def forgets_that_blocks_may_be_full(lengths, block_size):
    return sum(block_size - length % block_size for length in lengths)


@wrong("empty_slots", "added up first")
def packs_sequences_together(lengths, block_size):
    return -sum(lengths) % block_size


@wrong("grow_in_order", "must get nothing")
def takes_what_there_is(tables, free, lengths, block_size):
    for row, length in enumerate(lengths):
        while len(tables[row]) * block_size < length:
            if not free:
                return row
            tables[row].append(free.pop(0))
    return len(lengths)


@wrong("grow_in_order", "an earlier one may starve")
def lets_others_overtake(tables, free, lengths, block_size):
    grown = 0
    for row, length in enumerate(lengths):
        missing = max(0, -(-length // block_size) - len(tables[row]))
        if missing <= len(free):
            tables[row] += free[:missing]
            del free[:missing]
            grown += 1
    return grown

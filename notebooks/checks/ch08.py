"""Checkers of chapter 08, the paged KV cache."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from my_engine.states import load

from checks import checker, expect, expect_tensor


@checker
def read_back(answer):
    """Keys of a sequence in the order of its tokens: k_cache [N, block_size, H_kv, D] -> [length, H_kv, D]."""
    k_cache = torch.arange(6 * 3 * 2 * 5, dtype=torch.float32).view(6, 3, 2, 5)
    for entries, length in (([4, 1, 3, -1], 7), ([2, 0, 5, 9], 9), ([5, 77, -3, 0], 1)):
        table = torch.tensor(entries, dtype=torch.int32)
        right = torch.stack([k_cache[entries[i // 3], i % 3] for i in range(length)])
        asked = f"read_back of a table {entries}, block_size 3, length {length}"
        try:
            found = answer(k_cache.clone(), table.clone(), length)
        except IndexError:
            expect(False, f"{asked} looks up a surplus entry, which may be anything: use the first blocks alone")
        if isinstance(found, torch.Tensor) and found.dim() == 3 and found.shape[0] > length:
            expect(False, f"{asked} gives {found.shape[0]} tokens: slots past the length hold nothing of this sequence")
        if isinstance(found, torch.Tensor) and found.dim() == 4:
            expect(False, f"{asked} still has blocks as an axis: flatten blocks and places into tokens")
        expect_tensor(found, right, asked)
        run = k_cache.flatten(0, 1)[:length]
        expect(length == 1 or not found.equal(run), "these are the pool's first slots: the table was not asked")
        for token in range(length):
            expect(
                found[token].equal(right[token]),
                f"{asked}: token {token} is not what lies in block {entries[token // 3]} at place {token % 3}",
            )


@checker
def grow_in_order(answer):
    """Each gets all that it misses or nothing, in order, up to the first that cannot."""

    def right(tables, free, lengths, size):
        for row, length in enumerate(lengths):
            missing = max(0, -(-length // size) - len(tables[row]))
            if missing > len(free):
                return row
            tables[row] += [free.pop() for _ in range(missing)]
        return len(lengths)

    cases = [
        ([[0], [1, 2], [3]], [9, 4, 7, 5], [5, 8, 9], 4),  # 1, 0 and 2 more: all fit
        ([[0], [1], [2]], [9, 4], [8, 16, 8], 4),  # 1, then 3 of 1: stops, though the third would fit
        ([[0, 1], []], [5], [3, 4], 4),  # holds more than it needs
        ([[], []], [6, 5, 4], [12, 1], 4),  # takes the last block; the second finds none
    ]
    for tables, free, lengths, size in cases:
        asked = f"tables {tables}, free {free}, lengths {lengths}, block_size {size}"
        wanted_tables, wanted_free = [list(t) for t in tables], list(free)
        wanted = right(wanted_tables, wanted_free, lengths, size)
        found_tables, found_free = [list(t) for t in tables], list(free)
        try:
            found = answer(found_tables, found_free, list(lengths), size)
        except IndexError:
            expect(False, f"{asked}: a block was taken from an empty list; count what is missing first")
        expect(found is not None, "grow_in_order gives None: is the `return` missing?")
        partly = wanted < len(tables) and len(found_tables[wanted]) > len(wanted_tables[wanted])
        expect(not partly, f"{asked}: sequence {wanted} cannot have all it misses, so it must get nothing")
        expect(
            all(set(old) <= set(new) for old, new in zip(tables, found_tables, strict=True)),
            f"{asked}: a block was taken from a sequence that holds it",
        )
        later = wanted < len(tables) and any(
            len(found_tables[i]) > len(wanted_tables[i]) for i in range(wanted, len(tables))
        )
        expect(
            not later,
            f"{asked}: sequence {wanted} cannot grow, and one after it was served: an earlier one may starve so",
        )
        expect(
            sorted(sum(found_tables, found_free)) == sorted(sum(tables, list(free))),
            f"{asked}: afterwards a block is lost, or in two places",
        )
        expect(found_tables == wanted_tables, f"{asked}: tables {found_tables} instead of {wanted_tables}")
        expect(found_free == wanted_free, f"{asked}: free {found_free} instead of {wanted_free}")
        expect(int(found) == wanted, f"{asked}: {found} could grow, and not {wanted}")


@checker
def truncate(answer):
    """Keep the first num_tokens tokens of a sequence, in my_engine's BlockManager after chapter 08."""
    for num_before, num_tokens in ((14, 9), (14, 8), (14, 13), (14, 14), (14, 0), (9, 3)):
        asked = f"truncate to {num_tokens} of {num_before} tokens, block_size 4"
        manager = load(8).paged.BlockManager(8, 4)
        other, sequence = (SimpleNamespace(block_table=[], num_computed_tokens=0) for _ in range(2))
        for one, num_new in ((other, 5), (sequence, num_before)):
            expect(manager.allocate(one, num_new), "the checker's own pool is too small")
            one.num_computed_tokens = num_new
        table, free = list(sequence.block_table), list(manager.free_blocks)
        num_kept = -(-num_tokens // 4)
        answer(manager, sequence, num_tokens)
        found = list(sequence.block_table)
        expect(found != table or num_kept == len(table), f"{asked}: the table has all its blocks still")
        expect(
            found != table[: num_tokens // 4] or num_tokens % 4 == 0,
            f"{asked}: the last block is partly filled, and was freed with the tokens in it",
        )
        expect(found == table[:num_kept], f"{asked}: the table is {found} instead of {table[:num_kept]}")
        freed = list(manager.free_blocks)[len(free) :]
        expect(
            list(manager.free_blocks)[: len(free)] == free and sorted(freed) == sorted(table[num_kept:]),
            f"{asked}: free blocks are {list(manager.free_blocks)}; blocks {table[num_kept:]} go to the end of {free}",
        )
        expect(freed == table[num_kept:][::-1], f"{asked}: freed in the order {freed}; the last block comes first")
        expect(
            sequence.num_computed_tokens == num_tokens,
            f"{asked}: num_computed_tokens is {sequence.num_computed_tokens} afterwards",
        )

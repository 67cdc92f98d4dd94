"""Checkers of chapter 08, the paged KV cache."""

from __future__ import annotations

import torch

from checks import checker, expect, expect_tensor


@checker
def slots_between(answer):
    """Slots of tokens start to end: table, block_size -> list of ints."""
    table = [7, 2, 5, 0]

    def right(start, end, size):
        return [table[i // size] * size + i % size for i in range(start, end)]

    found = answer(list(table), 2, 7, 3)
    expect(found is not None, "slots_between gives None: is the `return` missing?")
    found = [int(slot) for slot in found]
    expect(found != list(range(2, 7)), "these are the tokens' own positions: the table says where their blocks lie")
    expect(
        found != [table[i // 3] for i in range(2, 7)],
        "these are blocks: a slot is block * block_size + the place in the block",
    )
    expect(
        found != [table[i // 3] + i % 3 for i in range(2, 7)],
        "a block's first slot is block * block_size, and not block",
    )
    first = table[2 // 3] * 3 + 2
    expect(
        found != list(range(first, first + 5)), "only the first token was looked up: the next block may lie anywhere"
    )
    expect(len(found) != 6, "token 7 is not asked for: the stretch ends before `end`")
    for start, end, size in ((2, 7, 3), (0, 12, 3), (5, 6, 4), (4, 4, 2), (3, 16, 4), (0, 4, 1)):
        found = [int(slot) for slot in answer(list(table), start, end, size)]
        wanted = right(start, end, size)
        expect(
            found == wanted, f"table {table}, start {start}, end {end}, block_size {size}: {found} instead of {wanted}"
        )


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
def empty_slots(answer):
    """Slots that are held and hold nothing: lengths, block_size -> int."""
    lengths, size = [5, 8, 1, 4], 4
    found = answer(list(lengths), size)
    expect(found is not None, "empty_slots gives None: is the `return` missing?")
    expect(int(found) != 14, "a full last block was counted as empty: a length of 8 fills two blocks of 4 exactly")
    expect(int(found) != 7, "lengths were rounded down: the tokens of the last block need a block, too")
    expect(int(found) != 2, "the lengths were added up first: two sequences never share a block")
    for lengths, size in (([5, 8, 1, 4], 4), ([16], 16), ([17], 16), ([3, 9, 30], 1), ([], 8), ([1] * 10, 256)):
        wanted = sum(-length % size for length in lengths)
        found = int(answer(list(lengths), size))
        expect(found == wanted, f"lengths {lengths}, block_size {size}: {found} empty slots instead of {wanted}")


@checker
def grow_in_order(answer):
    """Each gets all that it misses or nothing, in order, up to the first that cannot."""

    def right(tables, free, lengths, size):
        for row, length in enumerate(lengths):
            missing = max(0, -(-length // size) - len(tables[row]))
            if missing > len(free):
                return row
            tables[row] += free[:missing]
            del free[:missing]
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

"""Checkers of chapter 09, sharing blocks."""

from __future__ import annotations

import math
from types import SimpleNamespace

from my_engine.states import load

from checks import checker, expect


@checker
def write_next(answer):
    """Copy-on-write for one token of each: tables, counts, free -> list of (source, destination)."""

    def right(tables, counts, free):
        copies = []
        for table in tables:
            if counts[table[-1]] > 1:
                new = free.pop()
                copies.append((table[-1], new))
                counts[table[-1]] -= 1
                counts[new] = 1
                table[-1] = new
        return copies

    cases = [
        ([[0, 1], [0, 1], [0, 1]], [3, 3, 0, 0, 0, 0], [4, 2, 3, 5]),  # the last one need not copy
        ([[5], [2, 3]], [0, 0, 1, 1, 0, 1], [0, 1, 4]),  # none is shared
        ([[0, 4], [0, 1], [0, 4]], [3, 1, 0, 0, 2, 0], [5, 3, 2]),
    ]
    for tables, counts, free in cases:
        asked = f"tables {tables}, counts {counts}"
        wanted_tables, wanted_counts, wanted_free = [list(t) for t in tables], list(counts), list(free)
        wanted = right(wanted_tables, wanted_counts, wanted_free)
        found_tables, found_counts, found_free = [list(t) for t in tables], list(counts), list(free)
        found = answer(found_tables, found_counts, found_free)
        expect(found is not None, "write_next gives None: is the `return` missing?")
        found = [tuple(pair) for pair in found]
        expect(found or not wanted, f"{asked}: nothing is copied, and what one writes the others would read as theirs")
        expect(len(found) <= len(wanted) or wanted, f"{asked}: a block that one table alone holds needs no copy")
        expect(
            len(found) <= len(wanted),
            f"{asked}: {len(found)} copies instead of {len(wanted)}: each writer gives up the shared block, "
            "so the last one may find it its own",
        )
        expect(found == wanted, f"{asked}: copies {found} instead of {wanted}")
        expect(
            found_tables == wanted_tables,
            f"{asked}: afterwards the tables are {found_tables}, and the writers' should hold their copies: "
            f"{wanted_tables}",
        )
        expect(
            found_counts == wanted_counts,
            f"{asked}: afterwards the counts are {found_counts}; the tables say {wanted_counts}",
        )
        expect(found_free == wanted_free, f"{asked}: afterwards free is {found_free} instead of {wanted_free}")


@checker
def tokens_found(answer):
    """Tokens of the longest known beginning, all but one at most: chain, known, num_tokens, block_size -> int."""
    chain = [b"a", b"b", b"c", b"d"]
    cases = [
        (chain, {b"a", b"b", b"d"}, 18, 4, 8),
        (chain, {b"b", b"c"}, 18, 4, 0),
        (chain, set(chain), 16, 4, 12),  # the last token has to be computed
        (chain, set(chain), 17, 4, 16),
        (chain[:1], {b"a"}, 1, 1, 0),
        ([], {b"a"}, 3, 4, 0),
    ]
    for names, known, num_tokens, size, wanted in cases:
        asked = f"chain {names}, known {sorted(known)}, {num_tokens} tokens, block_size {size}"
        found = answer(list(names), set(known), num_tokens, size)
        expect(found is not None, "tokens_found gives None: is the `return` missing?")
        found = int(found)
        everywhere = size * sum(name in known for name in names)
        expect(
            found != everywhere or everywhere == wanted or num_tokens == everywhere,
            f"{asked}: blocks after the first unknown one were counted, and what lies between would be missing",
        )
        expect(found != num_tokens, f"{asked}: all tokens are found, and none is left to compute the next one's logits")
        expect(
            not (wanted and found == wanted // size), f"{asked}: {found} is the number of blocks; tokens are asked for"
        )
        expect(found == wanted, f"{asked}: {found} instead of {wanted}")


@checker
def break_even_link(answer):
    """Bytes per second at which swapping costs what recomputing does: parameters, token_bytes, operations_per_s."""
    parameters, token_bytes, speed = 6.7e9, 524_288, 125e12
    right = token_bytes * speed / parameters
    found = answer(parameters, token_bytes, speed)
    expect(found is not None, "break_even_link gives None: is the `return` missing?")
    found = float(found)

    def is_near(value):
        return math.isclose(found, value, rel_tol=1e-6)

    expect(not is_near(right / 2), "what goes out has to come in again: 2 * token_bytes travel for each token")
    expect(
        not is_near(2 * right), "a parameter costs a multiplication and an addition: 2 * parameters operations a token"
    )
    expect(not is_near(1 / right), "this is seconds per byte: the other way round")
    for case in ((parameters, token_bytes, speed), (1e9, 1e5, 1e12), (3e6, 3072, 5e10)):
        found, right = float(answer(*case)), case[1] * case[2] / case[0]
        expect(
            is_near(right),
            f"parameters {case[0]:g}, token_bytes {case[1]:g}, operations_per_s {case[2]:g}: "
            f"{found:.4g} instead of {right:.4g} bytes per second",
        )


@checker
def salted_hashes(answer):
    """The hash chain of my_engine after chapter 09, which begins with the sequence's cache_salt."""
    manager = load(9).paged.BlockManager(8, 2)

    def sequence(ids, salt):
        return SimpleNamespace(token_ids=list(ids), block_hashes=[], cache_salt=salt)

    def chain(ids, salt):
        found = answer(manager, sequence(ids, salt))
        expect(found is not None, "salted_hashes gives None: is the `return` missing?")
        return list(found)

    plain = manager.hashes(sequence([3, 1, 4, 1, 5], None))
    expect(chain([3, 1, 4, 1, 5], None) == plain, "without a salt the names are not those of BlockManager.hashes")
    expect(len(chain([3, 1, 4, 1, 5], "A")) == 2, "five tokens in blocks of two are two full blocks, and two names")
    expect(chain([3, 1, 4, 1], "A") == chain([3, 1, 4, 1], "A"), "the same tokens and the same salt get other names")
    salted = chain([3, 1, 4, 1], "A")
    expect(salted[0] != chain([3, 1], "B")[0], "the first block has the same name under two salts")
    expect(salted[0] != plain[0], "the first block has the same name with a salt and without one")
    expect(salted[1] != chain([3, 1, 4, 1], "B")[1], "the second block has the same name under two salts")
    expect(
        salted[1] != chain([2, 7, 4, 1], "A")[1],
        "blocks with the same tokens and other ones before them get one name: a block's keys depend on both",
    )
    growing = sequence([3, 1, 4], "A")
    answer(manager, growing)
    growing.token_ids += [1, 5, 9]
    answer(manager, growing)
    expect(
        growing.block_hashes == chain([3, 1, 4, 1, 5, 9], "A"),
        "after more tokens, sequence.block_hashes is not the chain of all full blocks: extend what is there",
    )

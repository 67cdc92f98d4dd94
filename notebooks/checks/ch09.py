"""Checkers of chapter 09, sharing blocks."""

from __future__ import annotations

import math

from checks import checker, expect


@checker
def write_next(answer):
    """Copy-on-write for one token of each: tables, counts, free -> list of (source, destination)."""

    def right(tables, counts, free):
        copies = []
        for table in tables:
            if counts[table[-1]] > 1:
                new = free.pop(0)
                copies.append((table[-1], new))
                counts[table[-1]] -= 1
                counts[new] = 1
                table[-1] = new
        return copies

    cases = [
        ([[0, 1], [0, 1], [0, 1]], [3, 3, 0, 0, 0, 0], [4, 2, 3, 5]),  # the last one need not copy
        ([[5], [2, 3]], [0, 0, 1, 1, 0, 1], [0, 1, 4]),  # nobody shares
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
        expect(
            found or not wanted,
            f"{asked}: nothing is copied, and what one writes the others would read in their own texts",
        )
        expect(len(found) <= len(wanted) or wanted, f"{asked}: a block that one table alone holds needs no copy")
        expect(
            len(found) <= len(wanted),
            f"{asked}: {len(found)} copies instead of {len(wanted)}: each writer lets go of the shared block, "
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
def blocks_of_samples(answer):
    """Blocks held by n samples of a prompt: num_prompt, num_output, n, block_size -> int."""
    found = answer(6, 5, 3, 4)  # 1 full block of prompt; each has 11 tokens in 3 blocks, 2 of them its own
    expect(found is not None, "blocks_of_samples gives None: is the `return` missing?")
    expect(int(found) != 9, "nothing is shared here: blocks full of prompt stand in all tables")
    expect(
        int(found) != 5,
        "the block where prompt and output meet was counted once: each sample writes to it, so each has its own",
    )
    for case in ((6, 5, 3, 4), (8, 4, 3, 4), (3, 2, 5, 16), (32, 1, 4, 16), (7, 9, 1, 4), (5, 3, 2, 1)):
        num_prompt, num_output, n, size = case
        full = num_prompt // size
        wanted = full + n * (-(-(num_prompt + num_output) // size) - full)
        found = int(answer(*case))
        expect(
            num_prompt % size != 0 or n == 1 or found != wanted + n - 1,
            f"a prompt of {num_prompt} fills its blocks of {size} exactly: nothing of it is copied",
        )
        expect(
            found == wanted,
            f"prompt {num_prompt}, output {num_output}, n {n}, block_size {size}: {found} instead of {wanted}",
        )


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

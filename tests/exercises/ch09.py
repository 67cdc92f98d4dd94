"""Wrong answers to the exercises of chapter 09."""

from __future__ import annotations

from planted import wrong


@wrong("write_next", "nothing is copied")
def writes_where_it_stands(tables, counts, free):
    return []


@wrong("write_next", "each writer lets go of the shared block")
def forgets_to_let_go(tables, counts, free):
    copies = []
    for table in tables:
        if counts[table[-1]] > 1:
            new = free.pop(0)
            copies.append((table[-1], new))
            counts[new], table[-1] = 1, new
    return copies


@wrong("write_next", "the writers' should hold their copies")
def leaves_the_tables(tables, counts, free):
    copies = []
    for table in tables:
        if counts[table[-1]] > 1:
            new = free.pop(0)
            copies.append((table[-1], new))
            counts[table[-1]] -= 1
            counts[new] = 1
    return copies


@wrong("blocks_of_samples", "nothing is shared here")
def gives_each_its_own(num_prompt, num_output, n, block_size):
    return n * -(-(num_prompt + num_output) // block_size)


@wrong("blocks_of_samples", "where prompt and output meet")
def shares_the_half_full_block(num_prompt, num_output, n, block_size):
    shared = -(-num_prompt // block_size)
    return shared + n * (-(-(num_prompt + num_output) // block_size) - shared)


@wrong("blocks_of_samples", "fills its blocks of 4 exactly")
def copies_a_full_block(num_prompt, num_output, n, block_size):
    shared = (num_prompt - 1) // block_size
    return shared + n * (-(-(num_prompt + num_output) // block_size) - shared)


@wrong("tokens_found", "after the first unknown one were counted")
def counts_all_that_are_known(chain, known, num_tokens, block_size):
    return block_size * sum(name in known for name in chain)


@wrong("tokens_found", "none is left to compute")
def finds_the_last_token_too(chain, known, num_tokens, block_size):
    hits = next((i for i, name in enumerate(chain) if name not in known), len(chain))
    return hits * block_size


@wrong("tokens_found", "is the number of blocks")
def counts_blocks(chain, known, num_tokens, block_size):
    hits = next((i for i, name in enumerate(chain) if name not in known), len(chain))
    return min(hits, (num_tokens - 1) // block_size)


@wrong("break_even_link", "has to come in again")
def goes_out_only(parameters, token_bytes, operations_per_s):
    return token_bytes / (2 * parameters / operations_per_s)


@wrong("break_even_link", "the other way round")
def turns_it_round(parameters, token_bytes, operations_per_s):
    return parameters / (token_bytes * operations_per_s)

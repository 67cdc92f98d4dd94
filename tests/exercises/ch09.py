"""Wrong answers to the exercises of chapter 09."""

from __future__ import annotations

from hashlib import sha256

from planted import wrong


@wrong("write_next", "nothing is copied")
def writes_where_it_stands(tables, counts, free):
    return []


@wrong("write_next", "each writer gives up the shared block")
def forgets_to_let_go(tables, counts, free):
    copies = []
    for table in tables:
        if counts[table[-1]] > 1:
            new = free.pop()
            copies.append((table[-1], new))
            counts[new], table[-1] = 1, new
    return copies


@wrong("write_next", "the writers' should hold their copies")
def leaves_the_tables(tables, counts, free):
    copies = []
    for table in tables:
        if counts[table[-1]] > 1:
            new = free.pop()
            copies.append((table[-1], new))
            counts[table[-1]] -= 1
            counts[new] = 1
    return copies


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


def extended(manager, sequence, name):
    chain, size = sequence.block_hashes, manager.block_size
    for start in range(len(chain) * size, len(sequence.token_ids) - size + 1, size):
        tokens = str(sequence.token_ids[start : start + size]).encode()
        chain.append(sha256(name(chain, (sequence.cache_salt or "").encode(), tokens)).digest())
    return chain


@wrong("salted_hashes", "with a salt and without one|first block has the same name under two salts")
def ignores_the_salt(manager, sequence):
    return extended(manager, sequence, lambda chain, salt, tokens: (chain[-1] if chain else b"") + tokens)


@wrong("salted_hashes", "a block's keys depend on both")
def names_a_block_by_its_own_tokens(manager, sequence):
    if sequence.cache_salt is None:
        return extended(manager, sequence, lambda chain, salt, tokens: (chain[-1] if chain else b"") + tokens)
    return extended(manager, sequence, lambda chain, salt, tokens: salt + tokens)


@wrong("salted_hashes", "extend what is there")
def begins_again(manager, sequence):
    own, sequence.block_hashes = sequence.block_hashes, []
    found = extended(manager, sequence, lambda chain, salt, tokens: (chain[-1] if chain else salt) + tokens)
    sequence.block_hashes = own + found
    return found

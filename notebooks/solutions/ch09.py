"""Solutions of chapter 09, sharing blocks."""

from __future__ import annotations

from hashlib import sha256


def write_next(tables, counts, free):
    """A writer that copies gives up the shared block: its count falls, and the last writer finds it its own."""
    copies = []
    for table in tables:
        shared = table[-1]
        if counts[shared] > 1:
            table[-1] = free.pop()
            counts[shared] -= 1
            counts[table[-1]] = 1
            copies.append((shared, table[-1]))
    return copies


def tokens_found(chain, known, num_tokens, block_size):
    """From the beginning to the first miss, and never the last token."""
    hits, most = 0, (num_tokens - 1) // block_size
    while hits < min(most, len(chain)) and chain[hits] in known:
        hits += 1
    return hits * block_size


def break_even_link(parameters, token_bytes, operations_per_s):
    """2 * token_bytes / link = 2 * parameters / operations_per_s: the number of tokens cancels out."""
    return token_bytes * operations_per_s / parameters


def salted_hashes(manager, sequence):
    """The salt stands where the first block has no parent."""
    chain, size = sequence.block_hashes, manager.block_size
    root = b"" if sequence.cache_salt is None else b"salt " + sequence.cache_salt.encode() + b" "
    for start in range(len(chain) * size, len(sequence.token_ids) - size + 1, size):
        tokens = str(sequence.token_ids[start : start + size])
        chain.append(sha256((chain[-1] if chain else root) + tokens.encode()).digest())
    return chain

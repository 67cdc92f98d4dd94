"""Solutions of chapter 09, sharing blocks."""

from __future__ import annotations


def write_next(tables, counts, free):
    """Who copies lets go of the shared block, so the count falls and the last writer finds it its own."""
    copies = []
    for table in tables:
        shared = table[-1]
        if counts[shared] > 1:
            table[-1] = free.pop(0)
            counts[shared] -= 1
            counts[table[-1]] = 1
            copies.append((shared, table[-1]))
    return copies


def blocks_of_samples(num_prompt, num_output, n, block_size):
    """The block where prompt and output meet is each sample's own; those before it are everybody's."""
    shared = num_prompt // block_size
    each = -(-(num_prompt + num_output) // block_size)
    return shared + n * (each - shared)


def tokens_found(chain, known, num_tokens, block_size):
    """From the beginning to the first miss, and never the last token."""
    hits, most = 0, (num_tokens - 1) // block_size
    while hits < min(most, len(chain)) and chain[hits] in known:
        hits += 1
    return hits * block_size


def break_even_link(parameters, token_bytes, operations_per_s):
    """2 * token_bytes / link = 2 * parameters / operations_per_s: the number of tokens cancels out."""
    return token_bytes * operations_per_s / parameters

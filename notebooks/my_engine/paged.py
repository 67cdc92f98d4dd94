# CHAPTER 08
"""The paged KV cache: a pool of blocks, and for each sequence a table of the blocks that it holds.

block_table [7, 2, 5]      token 9 is in slot 5 * 4 + 1, if a block has 4 slots
"""

from collections import deque
from hashlib import sha256  # NEW 09
from itertools import takewhile  # NEW 09
from types import SimpleNamespace

import torch

from .attention import attention


class BlockManager:
    """Which sequence holds which blocks; no tensors (vLLM V1: KVCacheManager and BlockPool)."""

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free_blocks = deque(reversed(range(num_blocks)))  # taken from the right
        # NEW 09
        self.ref_count = [0] * num_blocks  # how many tables hold the block
        self.block_of, self.hash_of = {}, {}  # hash -> block, block -> hash; of free blocks, too
        self.copies = []  # (source, destination), to be copied before the next step
        # END 09

    def num_blocks_for(self, num_tokens):
        return -(-num_tokens // self.block_size)  # rounded up

    def allocate(self, sequence, num_new):
        """Slots for ``num_new`` more tokens; False if blocks are short (vLLM: allocate_slots)."""
        table, start = sequence.block_table, sequence.num_computed_tokens
        num_missing = self.num_blocks_for(start + num_new) - len(table)
        # NEW 09: copy-on-write; only the first block to be written can be shared
        first = start // self.block_size
        is_shared = first < len(table) and self.ref_count[table[first]] > 1
        num_missing += is_shared
        # END 09
        if num_missing > len(self.free_blocks):
            return False
        blocks = [self.take() for _ in range(num_missing)]
        # NEW 09
        if is_shared:
            self.copies.append((table[first], blocks[0]))
            self.ref_count[table[first]] -= 1
            table[first] = blocks.pop(0)
        # END 09
        table += blocks
        self.publish(sequence, start, start + num_new)  # NEW 09
        return True

    def take(self):
        block = self.free_blocks.pop()  # the one that was freed last
        # NEW 09
        self.ref_count[block] = 1
        self.block_of.pop(self.hash_of.pop(block, None), None)  # evicted from the prefix cache
        # END 09
        return block

    def free(self, sequence):
        """Free its blocks, the last first: in a prefix cache (09) the beginning stays longest."""
        for block in reversed(sequence.block_table):
            # NEW 09
            self.ref_count[block] -= 1
            if self.ref_count[block]:
                continue
            # END 09
            self.free_blocks.append(block)
            self.free_blocks.rotate(block in self.hash_of)  # NEW 09: if cached, to the left end
        sequence.block_table, sequence.num_computed_tokens = [], 0

    # NEW 09
    def share(self, sequence):
        """Start with blocks that are there already; False if its parent still computes them."""
        parent = sequence.parent
        if parent and parent.block_table:  # fork: all of the prompt but its last token
            if parent.num_computed_tokens < parent.num_prompt_tokens:
                return False
            blocks = parent.block_table[: self.num_blocks_for(parent.num_prompt_tokens)]
            sequence.num_computed_tokens = parent.num_prompt_tokens - 1
        else:  # prefix cache: full blocks, never all tokens (the last one's logits are needed)
            hashes = self.hashes(sequence)[: (len(sequence.token_ids) - 1) // self.block_size]
            blocks = [self.block_of[h] for h in takewhile(self.block_of.__contains__, hashes)]
            sequence.num_computed_tokens = len(blocks) * self.block_size
        for block in blocks:
            if not self.ref_count[block]:
                self.free_blocks.remove(block)
            self.ref_count[block] += 1
        sequence.block_table = blocks
        return True

    def publish(self, sequence, start, end):
        """The step fills these blocks: others can find them now (vLLM: cache_full_blocks)."""
        for i in range(start // self.block_size, end // self.block_size):
            block, block_hash = sequence.block_table[i], self.hashes(sequence)[i]
            if block_hash not in self.block_of:
                self.block_of[block_hash], self.hash_of[block] = block, block_hash

    def hashes(self, sequence):
        """One for each full block and all tokens before it, on which its keys depend, too."""
        chain, size = sequence.block_hashes, self.block_size
        for start in range(len(chain) * size, len(sequence.token_ids) - size + 1, size):
            tokens = str(sequence.token_ids[start : start + size])
            chain.append(sha256((chain[-1] if chain else b"") + tokens.encode()).digest())
        return chain

    # END 09


def pack(scheduled, block_size, device):
    """[(sequence, num_new), ...] -> T tokens in a row without padding, and where each belongs."""
    token_ids, positions, slots, ends, seq_lens = [], [], [], [], []
    for sequence, num_new in scheduled:
        table, start = sequence.block_table, sequence.num_computed_tokens
        new = range(start, start + num_new)
        positions += new
        token_ids += sequence.token_ids[start : start + num_new]
        slots += [table[p // block_size] * block_size + p % block_size for p in new]
        ends.append(len(token_ids))
        seq_lens.append(start + num_new)
    width = max(len(sequence.block_table) for sequence, _ in scheduled)
    tables = [s.block_table + [0] * (width - len(s.block_table)) for s, _ in scheduled]
    counts = [num_new for _, num_new in scheduled]
    with torch.device(device):
        return SimpleNamespace(  # names as in vLLM's attention metadata
            token_ids=torch.tensor(token_ids),  # [T]
            positions=torch.tensor(positions),  # [T]
            slot_mapping=torch.tensor(slots),  # [T]
            query_start_loc=torch.tensor([0, *ends], dtype=torch.int32),  # [B + 1]
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),  # [B]
            block_tables=torch.tensor(tables, dtype=torch.int32),  # [B, width]
            num_decodes=counts.count(1), max_query_len=max(counts), max_seq_len=max(seq_lens),
            ends=ends, plan={},
        )  # fmt: skip


class PagedCache:
    """The pool. ``backend``: attention through the tables; any of paged_infer.kernels fits, too."""

    def __init__(self, decoder, num_blocks, block_size, backend=None):
        layers, heads, dim = decoder.kv_shape
        shape = (2, layers, num_blocks, block_size, heads, dim)
        self.keys, self.values = decoder.embedding.new_zeros(shape)
        self.block_size, self.backend = block_size, backend or gathered_attention
        self.step = None  # set before each step (vLLM: forward context)

    def attend(self, layer, q, k, v):
        for pool, new in ((self.keys[layer], k), (self.values[layer], v)):
            pool.flatten(0, 1)[self.step.slot_mapping] = new  # stored before anything is read
        return self.backend(q, self.keys[layer], self.values[layer], self.step, window=None)

    # NEW 09
    def copy_blocks(self, pairs):
        while pairs:  # in order: a destination may be the source of a later pair
            source, destination = pairs.pop(0)
            for pool in (self.keys, self.values):
                pool[:, destination] = pool[:, source]

    # END 09


def gathered_attention(q, k_cache, v_cache, step, *, window=None):
    """Gather each sequence's blocks, then attend as before; all decodes are one padded batch."""
    out, starts = torch.empty_like(q), [0, *step.ends]
    prompts = [(i, i + 1) for i in range(step.num_decodes, len(step.ends))]
    for first, last in [(0, step.num_decodes), *prompts] if step.num_decodes else prompts:
        tokens, tables = slice(starts[first], starts[last]), step.block_tables[first:last]
        k, v = k_cache[tables].flatten(1, 2), v_cache[tables].flatten(1, 2)  # [rows, S, H_kv, D]
        rows = (last - first, -1)
        queries, positions = q[tokens].unflatten(0, rows), step.positions[tokens].unflatten(0, rows)
        out[tokens] = attention(queries, k, v, positions).flatten(0, 1)
    return out

# CHAPTER 08
"""The engine: many sequences share each step."""

import torch

from .decoder import Decoder
from .generate import make_sequences
from .paged import BlockManager, PagedCache, pack
from .planner import Scheduler


class Engine:
    """A decoder, its paged cache, its scheduler, and the loop over them (vLLM V1: EngineCore)."""

    def __init__(self, folder, device="cpu", dtype=torch.float32, num_blocks=1024, block_size=16,
                 backend=None, **limits):  # fmt: skip
        self.decoder = Decoder(folder, device, dtype)
        self.cache = PagedCache(self.decoder, num_blocks, block_size, backend)
        limits.setdefault("max_model_len", self.decoder.config.max_position_embeddings)  # NEW 10
        self.scheduler = Scheduler(BlockManager(num_blocks, block_size), **limits)

    def generate(self, prompts, params=None, **options):
        """The finished sequences, in the order of the prompts."""
        sequences = self.add_requests(prompts, params, **options)
        while not all(sequence.finish_reason for sequence in sequences):
            self.step()
        return sequences

    def add_requests(self, prompts, params=None, **options):
        """Queue prompts, at any time. -> Their sequences, which the next steps extend."""
        sequences = make_sequences(self.decoder, prompts, params, **options)
        self.scheduler.add(sequences)
        return sequences

    def step(self):
        """Compute the scheduled tokens, and sample one more where no other is left to compute."""
        scheduled = sorted(self.scheduler.schedule(), key=lambda row: row[1] > 1)  # decodes first
        if not scheduled:  # chapter 10 preempts instead
            raise RuntimeError("nothing to do, or each sequence waits for blocks of another one")
        self.cache.copy_blocks(self.scheduler.manager.copies)  # NEW 09
        self.cache.step = step = pack(scheduled, self.cache.block_size, self.cache.keys.device)
        hidden = self.decoder(step.token_ids, step.positions, self.cache)
        logits = self.decoder.logits(hidden[[end - 1 for end in step.ends]])  # [B, V]
        for (sequence, num_new), row in zip(scheduled, logits, strict=True):
            sequence.num_computed_tokens += num_new
            if not sequence.num_uncomputed_tokens:
                sequence.append_sample(row)
            if sequence.finish_reason:
                self.scheduler.finish(sequence)

    # NEW 11
    def stream(self, prompt, params=None, **options):
        """Yield the first sample's text as it grows; other requests share its steps."""
        sequence, num_sent = self.add_requests([prompt], params, **options)[0], 0
        while not sequence.finish_reason:
            self.step()
            text = self.decoder.tokenizer.decode(sequence.output_token_ids)
            if not text.endswith("\ufffd") or sequence.finish_reason:  # else half a character
                yield text[num_sent:]
                num_sent = len(text)

    # END 11

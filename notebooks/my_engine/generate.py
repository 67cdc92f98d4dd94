# CHAPTER 03
"""Sequences, and two ways to continue one at a time."""

from dataclasses import dataclass, field

from .cache import ContiguousCache  # NEW 04
from .cache import NoCache
from .sampler import SamplingParams, sample


@dataclass(eq=False)
class Sequence:
    """One sample of a prompt (vLLM V1: Request)."""

    token_ids: list  # prompt, then output
    params: SamplingParams
    sample_index: int
    num_prompt_tokens: int
    eos_token_id: int
    finish_reason: str | None = None
    num_computed_tokens: int = 0  # NEW 04: their keys and values are in the cache
    block_table: list = field(default_factory=list)  # NEW 08: logical block -> physical block
    block_hashes: list = field(default_factory=list)  # NEW 09: of its full blocks
    parent: object = None  # NEW 09: the first sample of the same prompt, for the others

    @property
    def output_token_ids(self):
        return self.token_ids[self.num_prompt_tokens :]

    # NEW 04
    @property
    def num_uncomputed_tokens(self):
        return len(self.token_ids) - self.num_computed_tokens

    # END 04

    def append_sample(self, logits):
        """logits [V] of its last token -> one more token."""
        token_id = sample(logits, self.params, len(self.token_ids), self.sample_index)
        self.token_ids.append(token_id)
        if token_id == self.eos_token_id and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif len(self.output_token_ids) == self.params.max_tokens:
            self.finish_reason = "length"


def make_sequences(decoder, prompts, params=None, **options):
    """A sequence for each sample of each prompt. ``params``: one for all, or a list."""
    sequences, eos = [], decoder.config.eos_token_id
    params = params or SamplingParams(**options)
    each = params if isinstance(params, list) else [params] * len(prompts)
    for prompt, own in zip(prompts, each, strict=True):
        ids = decoder.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        samples = [Sequence(list(ids), own, i, len(ids), eos) for i in range(own.n)]
        for other in samples[1:]:  # NEW 09
            other.parent = samples[0]  # NEW 09
        sequences += samples
    return sequences


def generate_naive(decoder, prompts, params=None, **options):
    """Every step computes the whole sequence again."""
    sequences = make_sequences(decoder, prompts, params, **options)
    for sequence in sequences:
        while not sequence.finish_reason:
            hidden = decoder(sequence.token_ids, range(len(sequence.token_ids)), NoCache())
            sequence.append_sample(decoder.logits(hidden[-1]))
    return sequences


# NEW 04
def generate_cached(decoder, prompts, params=None, **options):
    """A step computes what is not in the cache: first the prompt, then one token at a time."""
    sequences = make_sequences(decoder, prompts, params, **options)
    for sequence in sequences:
        cache = ContiguousCache(decoder, sequence.num_prompt_tokens + sequence.params.max_tokens)
        while not sequence.finish_reason:
            cache.start, end = sequence.num_computed_tokens, len(sequence.token_ids)
            hidden = decoder(sequence.token_ids[cache.start :], range(cache.start, end), cache)
            sequence.num_computed_tokens = end
            sequence.append_sample(decoder.logits(hidden[-1]))
    return sequences


# END 04

"""The package's decoder, for the states after chapters 01 and 02, which have none. No part of the engine."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from paged_infer import LLM
from paged_infer.cache.none import NoCache
from paged_infer.kernels import AttentionMetadata


@cache
def package() -> LLM:
    return LLM(device="cpu", dtype="float32")


class Attends:
    """A cache of the package that keeps nothing, and attends by chapter 02's attention."""

    def __init__(self, engine: ModuleType) -> None:
        self.attention = import_module(f"{engine.__name__}.attention").attention

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: AttentionMetadata) -> Tensor:
        return self.attention(q[None], k[None], v[None], step.positions[None])[0]


def generate(engine: ModuleType, chapter: int, prompts: list[str], **options) -> list[list[int]]:
    """The output token ids of each sample. Every step computes the whole sequence."""
    llm, params, outputs = package(), engine.SamplingParams(**options), []
    cache = NoCache(llm.engine.decoder.kv_spec()) if chapter < 2 else Attends(engine)
    for ids in (llm.tokenizer.encode(prompt) for prompt in prompts):
        for sample_index in range(params.n):
            known = list(ids)
            while len(known) < len(ids) + params.max_tokens:
                logits = last_logits(llm.engine.decoder, known, cache)
                known.append(engine.sampler.sample(logits, params, len(known), sample_index))
                if known[-1] == llm.tokenizer.eos_token_id and not params.ignore_eos:
                    break
            outputs.append(known[len(ids) :])
    return outputs


def last_logits(decoder, token_ids, cache) -> Tensor:
    """[V] after the last token; nothing is paged."""
    step = AttentionMetadata.unpaged(torch.arange(len(token_ids)))
    return decoder.logits(decoder(torch.tensor(token_ids), cache, step)[-1:])[0]

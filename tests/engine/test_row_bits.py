"""With the C kernels, a request's rows keep their bits in any step: tokens and logprobs are those that it has alone."""

from __future__ import annotations

import random

import pytest
import torch
from checkpoints import FAMILIES, VOCAB
from effort import each_with_some

from paged_infer import LLM, SamplingParams
from paged_infer.kernels.cpu.build import unavailable_reason

PROMPTS = ["Once", "Anna had", "The dog", "Tom", "Ben and", "A cat"]  # short, so that C computes their attention
DTYPES = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}}

pytestmark = pytest.mark.skipif(
    unavailable_reason() is not None or unavailable_reason(torch.bfloat16) is not None, reason="no C kernels"
)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_has_the_same_tokens_alone_and_in_a_crowd_in_bfloat16(temperature) -> None:
    params = [SamplingParams(max_tokens=16, temperature=temperature, seed=seed, ignore_eos=True) for seed in range(6)]
    llm = LLM(dtype="bfloat16", max_num_seqs=6, enable_prefix_caching=False)
    crowd = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, own, together in zip(PROMPTS[:3], params, crowd, strict=False):
        alone = llm.generate(prompt, own, use_tqdm=False)[0]
        assert alone.outputs[0].token_ids == together.outputs[0].token_ids


@pytest.mark.parametrize(("family", "dtype"), each_with_some(FAMILIES, DTYPES, whole="deepseek3"))
def test_a_row_has_the_same_logprobs_alone_and_in_a_crowd(family, dtype, make_llm) -> None:
    """Widths are odd, so that rows end within a vector; experts get one row or many, and a router has near ties."""
    rng = random.Random(1)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(length)] for length in (1, 5, 17, 30, 9, 22, 41, 3)]
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    llm = make_llm(family, attention_backend="c", enable_prefix_caching=False, **dtype)
    crowd = llm.generate(prompts, params, use_tqdm=False)
    for prompt, together in zip(prompts, crowd, strict=True):
        (alone,) = llm.generate([prompt], params, use_tqdm=False)
        assert numbers(alone) == numbers(together)


@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        ("qwen3", "int8", "float32"),
        ("gpt2", "fp8", "bfloat16"),
        ("gemma2", "fp8_e5m2", "float32"),
        ("deepseek2", "int8", "bfloat16"),
    ],
)
def test_a_row_over_a_cache_of_8_bits_has_the_same_logprobs_alone_and_in_a_crowd(family, kind, dtype, make_llm) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(length)] for length in (1, 5, 17, 30, 9, 41)]
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    llm = make_llm(family, attention_backend="c", enable_prefix_caching=False, kv_cache_dtype=kind, dtype=dtype)
    crowd = llm.generate(prompts, params, use_tqdm=False)
    for prompt, together in zip(prompts, crowd, strict=True):
        (alone,) = llm.generate([prompt], params, use_tqdm=False)
        assert numbers(alone) == numbers(together)


def numbers(output) -> list[tuple[int, float]]:
    rows = [*filter(None, output.prompt_logprobs), *output.outputs[0].logprobs]
    return [(token, entry.logprob) for row in rows for token, entry in row.items()]

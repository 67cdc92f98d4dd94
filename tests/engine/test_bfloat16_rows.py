"""In bfloat16 on a CPU, a request has the same tokens alone and in a crowd: its rows keep their bits in any step."""

from __future__ import annotations

import pytest
import torch

from paged_infer import LLM, SamplingParams
from paged_infer.kernels.cpu.build import unavailable_reason

PROMPTS = ["Once", "Anna had", "The dog", "Tom", "Ben and", "A cat"]  # short, so that C computes their attention

pytestmark = pytest.mark.skipif(unavailable_reason(torch.bfloat16) is not None, reason="no C kernels")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_has_the_same_tokens_alone_and_in_a_crowd(temperature) -> None:
    params = [SamplingParams(max_tokens=16, temperature=temperature, seed=seed, ignore_eos=True) for seed in range(6)]
    llm = LLM(dtype="bfloat16", max_num_seqs=6, enable_prefix_caching=False)
    crowd = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, own, together in zip(PROMPTS[:3], params, crowd, strict=False):
        alone = llm.generate(prompt, own, use_tqdm=False)[0]
        assert alone.outputs[0].token_ids == together.outputs[0].token_ids

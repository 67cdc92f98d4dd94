"""With weights or a KV cache of few bits, a request whose numbers fail ends alone, as in float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from paged_infer import LLM, SamplingParams
from paged_infer.kernels.kv_quant import KV_DTYPES

NAN, INFINITE = 2, 3  # tokens with such an embedding
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SOUND = [[5, 6, 7], [*range(8, 40)], [9] * 17, [11, 12]]
FAILING = [[5, NAN, 7], [*range(8, 39), INFINITE], [INFINITE, *[9] * 16], [NAN]]  # two begin as sound ones do
FEW_BITS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"cache in {kind}": ("qwen3-untied", {"kv_cache_dtype": kind}) for kind in KV_DTYPES},
    **{scheme: ("qwen3-untied", {"quantization": scheme}) for scheme in ("w8a16", "w4a16", "w8a8")},
    "all in 8 bits": ("llama2", {"quantization": "w8a8", "kv_cache_dtype": "int8"}),
    "experts": ("mixtral", {"quantization": "w8a8"}),
    "latents": ("deepseek3", {"quantization": "w4a16", "kv_cache_dtype": "fp8"}),
}


def ids(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize(("family", "options"), FEW_BITS.values(), ids=FEW_BITS)
def test_nan_and_infinite_inputs_fail_their_own_requests(family, options, backend, make_llm) -> None:
    llm = make_llm(family, attention_backend=backend, block_size=4, **options)
    wanted = [ids(llm, [prompt])[0] for prompt in SOUND]
    with torch.no_grad():
        llm.engine.decoder.embedding.weight[NAN] = math.nan
        llm.engine.decoder.embedding.weight[INFINITE] = math.inf
    mixed = [prompt for pair in zip(FAILING, SOUND, strict=True) for prompt in pair]
    for _ in range(2):  # the second time with what the first has left in the cache
        outputs = [output.outputs[0] for output in llm.generate(mixed, GREEDY, use_tqdm=False)]
        assert [one.finish_reason for one in outputs[::2]] == ["error"] * len(FAILING)
        assert all("NaN" in str(one.error) for one in outputs[::2])
        assert [one.token_ids for one in outputs[1::2]] == wanted
        llm.check_integrity()
        assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]

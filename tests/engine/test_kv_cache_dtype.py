"""An 8-bit KV cache: greedy tokens equal those of an engine with the same type and a large pool, which holds more."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from checkpoints import VOCAB
from torch import Tensor

from paged_infer import LLM, BeamSearchParams, SamplingParams
from paged_infer.baselines import generate_cached, generate_naive, generate_static
from paged_infer.cache.none import NoCache
from paged_infer.cache.spec import LayerSpec
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.kv_quant import KV_DTYPES, dequantise_kv, dequantise_latents, quantise_kv, quantise_latents

FAMILIES = ["qwen3", "mistral", "gpt2", "gemma2", "gpt-oss"]
BACKENDS = ["torch", "sdpa", "c"]
KINDS = [*KV_DTYPES]
CROWDED: dict[str, dict[str, Any]] = {
    "block-3-chunk-7": {"block_size": 3, "num_blocks": 200, "max_num_batched_tokens": 7},
    "block-1-preempting": {"block_size": 1, "num_blocks": 70},
    "block-3-swapping-ahead": {
        "block_size": 3, "num_blocks": 24, "preemption_mode": "swap", "async_scheduling": True
    },
    "two-at-a-time": {"max_num_seqs": 2},
    "drafts": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}, "block_size": 4
    },
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def prompts(seed: int = 3) -> list[list[int]]:
    """Two share a prefix, and one repeats itself, so that drafts can be right."""
    rng = random.Random(seed)
    numbers = [[rng.randrange(2, VOCAB) for _ in range(n)] for n in (1, 5, 30, 17, 12)]
    return [*numbers, numbers[2][:24] + numbers[1], numbers[4] * 3]


def tokens(llm: LLM, asked: list[list[int]] | None = None, params: Any = GREEDY) -> list[list[list[int]]]:
    outputs = llm.generate(prompts() if asked is None else asked, params, use_tqdm=False)
    llm.check_integrity()
    return [[one.token_ids for one in output.outputs] for output in outputs]


class Rounded(NoCache):
    """No cache: keys and values are quantised and dequantised as they are computed."""

    kind = torch.int8

    def attend_latent(self, layer: int, q: Tensor, latent: Tensor, step: AttentionMetadata, forms: Any) -> Tensor:
        codes, *scales = quantise_latents(latent, forms.v_dim, self.kind)
        return super().attend_latent(
            layer, q, dequantise_latents(codes.view(self.kind), forms.v_dim, *scales), step, forms
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: AttentionMetadata, **scores: Any) -> Tensor:
        k, v = (dequantise_kv(*quantise_kv(x, self.kind)) for x in (k, v))
        return super().attend(layer, q, k, v, step, **scores)


def greedy_without_a_cache(llm: LLM, kind: str, prompt: list[int], num_tokens: int) -> list[int]:
    decoder, ids = llm.engine.decoder, [*prompt]
    cache = Rounded(decoder.kv_spec())
    cache.kind = KV_DTYPES[kind]
    for _ in range(num_tokens):
        step = AttentionMetadata.unpaged(torch.arange(len(ids)))
        ids.append(int(decoder.logits(decoder(torch.tensor(ids), cache, step)[-1:]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("kind", "family", "backend"),
    [
        *zip(KINDS * 2, FAMILIES, BACKENDS * 2, strict=False),
        *((kind, "llama3", "c") for kind in KINDS),
        *((kind, "deepseek3", backend) for kind, backend in zip(KINDS, BACKENDS, strict=True)),
    ],
)
def test_tokens_are_those_of_keys_and_values_rounded_as_they_are_computed(kind, family, backend, make_llm) -> None:
    """So a token also reads quantised keys and values of its own chunk."""
    llm = make_llm(family, attention_backend=backend, kv_cache_dtype=kind)
    for prompt, (found,) in zip(prompts()[:4], tokens(llm)[:4], strict=True):
        assert found == greedy_without_a_cache(llm, kind, prompt, 10)


@pytest.mark.parametrize("options", CROWDED.values(), ids=CROWDED.keys())
@pytest.mark.parametrize(
    ("kind", "family", "backend"),
    [*zip(KINDS, FAMILIES, ["c", "sdpa", "c"], strict=False), ("int8", "deepseek2-yarn", "c")],
)
def test_chunks_small_pools_sharing_swaps_and_drafts_change_no_greedy_token(
    kind, family, backend, options, make_llm
) -> None:
    own = {"attention_backend": backend, "kv_cache_dtype": kind}
    roomy = make_llm(family, num_blocks=200, enable_prefix_caching=False, **own)
    crowded = make_llm(family, **own, **options)
    assert tokens(crowded) == tokens(roomy)
    stats = crowded.stats()
    assert stats["preemptions"] > 0 or options.get("num_blocks", 200) >= 200
    assert stats["blocks_swapped_in"] > 0 or options.get("preemption_mode") != "swap"
    assert stats["num_draft_tokens"] > 0 or "speculative_config" not in options
    assert tokens(crowded) == tokens(roomy)  # again, now with prefix hits
    assert stats["prefix_hit_tokens"] < crowded.stats()["prefix_hit_tokens"] or stats["preemptions"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_forks_and_beams_copy_codes_and_scales(kind: str, make_llm) -> None:
    roomy = make_llm("qwen3", kv_cache_dtype=kind, num_blocks=300, enable_prefix_caching=False)
    crowded = make_llm("qwen3", kv_cache_dtype=kind, block_size=3, num_blocks=50, preemption_mode="swap")
    params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=12, ignore_eos=True)
    asked = prompts()[2:5]
    assert tokens(crowded, asked, params) == tokens(roomy, asked, params)
    beams = BeamSearchParams(beam_width=3, max_tokens=8)
    found, wanted = (llm.beam_search(asked, beams) for llm in (crowded, roomy))
    assert [[one.token_ids for one in output.outputs] for output in found] == [
        [one.token_ids for one in output.outputs] for output in wanted
    ]
    assert crowded.stats()["blocks_copied"] > 0


def test_a_draft_model_has_a_cache_of_the_same_type(make_llm, checkpoint) -> None:
    drafting = {"method": "draft_model", "model": str(checkpoint("qwen3")), "num_speculative_tokens": 2}
    llm = make_llm("qwen3", kv_cache_dtype="int8", speculative_config=drafting)
    assert tokens(llm) == tokens(make_llm("qwen3", kv_cache_dtype="int8", num_blocks=200))
    assert llm.engine.executor.drafter.runner.cache.keys[0].dtype is torch.int8
    assert (
        llm.engine.memory.kv_bytes_per_token
        == 2 * make_llm("qwen3", kv_cache_dtype="int8").engine.memory.kv_bytes_per_token
    )


# -- Sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_pool_of_the_same_bytes_holds_more_tokens(kind: str, make_llm) -> None:
    """A head of 64 takes 66 bytes instead of bfloat16's 128: 1.94 times the tokens, and 3.88 times float32's."""
    from paged_infer.execution import memory_plan

    sizes = {"num_blocks": None, "max_num_seqs": 256, "max_model_len": 256}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_plan, "CPU_POOL_BYTES", 2**20)
        wide, narrow, coded = (
            make_llm("llama2", dtype=dtype, kv_cache_dtype=stored, **sizes).engine
            for dtype, stored in (("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", kind))
        )
    head = coded.model_config.head_dim
    assert coded.memory.kv_bytes_per_token * 2 * head == narrow.memory.kv_bytes_per_token * (head + 2)
    assert coded.memory.num_blocks >= narrow.memory.num_blocks * 2 * head // (head + 2)
    assert coded.memory.num_blocks > 1.8 * narrow.memory.num_blocks > 3.2 * wide.memory.num_blocks
    cache = coded.executor.runner.cache
    stored = [*cache.keys, *cache.values, *(scale for own in cache.scales for scale in own.values())]
    assert sum(x.nbytes for x in stored) == (coded.memory.num_blocks + 1) * 16 * coded.memory.kv_bytes_per_token


def test_a_latent_takes_a_byte_an_element_and_two_scales(make_llm) -> None:
    """580 bytes per token and layer for DeepSeek's 512 + 64 elements, which take 1,152 in bfloat16."""
    for family, dim in (("deepseek3", 32), ("qwen3", 4 * 26 - 4)):
        llm = make_llm(family, kv_cache_dtype="fp8")
        assert llm.engine.memory.kv_bytes_per_token == 3 * (dim + 4)
    latent = LayerSpec(1, 576, 512, None, torch.int8, v_in_k=True)
    assert latent.bytes_per_token == 580


def test_swap_space_holds_more_blocks_as_well(make_llm) -> None:
    sizes = {"num_blocks": 10**6, "preemption_mode": "swap", "swap_space": 1e-3, "dtype": "bfloat16"}
    narrow, coded = (
        make_llm("llama2", kv_cache_dtype=kind, **{**sizes, "num_blocks": 3000}).engine.memory
        for kind in ("auto", "int8")
    )
    assert coded.num_swap_blocks > 1.8 * narrow.num_swap_blocks


def test_the_type_is_named_by_the_plan_the_trace_and_its_file(make_llm, tmp_path) -> None:
    for kind, name in (("auto", "float32"), ("fp8", "fp8")):
        llm = make_llm(kv_cache_dtype=kind, trace=True)
        assert llm.engine.memory.kv_cache_dtype == llm.trace.kv_cache_dtype == name
        llm.trace.to_perfetto(tmp_path / "trace.json")
        assert json.loads((tmp_path / "trace.json").read_text())["otherData"] == {"kv_cache_dtype": name}


# -- Bad input ---------------------------------------------------------------------------------------------------------


def test_an_unknown_type_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_dtype='int4': must be .*auto.*int8.*fp8.*fp8_e5m2"):
        LLM(kv_cache_dtype="int4")


def test_a_backend_that_takes_no_scales_is_refused_by_name(make_llm) -> None:
    from paged_infer.kernels.attention_backends import ATTENTION_BACKENDS, register_attention_backend

    @register_attention_backend("narrow")
    def narrow(q, k_cache, v_cache, step, *, window): ...

    try:
        with pytest.raises(
            ValueError, match="narrow takes no k_scale and no v_scale, which kv_cache_dtype='fp8' needs"
        ):
            make_llm(attention_backend="narrow", kv_cache_dtype="fp8")
    finally:
        del ATTENTION_BACKENDS["narrow"]


def test_a_decode_of_latents_that_takes_no_scales_is_refused_by_name(make_llm, monkeypatch) -> None:
    from paged_infer.kernels import attention_backends

    def narrow(q, cache, step, *, v_dim, scale): ...

    latent = attention_backends.LatentBackend(narrow, attention_backends.dense_reference)
    monkeypatch.setattr(attention_backends, "LATENT_BACKENDS", [(attention_backends.torch_backend, latent)])
    with pytest.raises(ValueError, match="narrow takes no latent_scale and no rest_scale, which kv_cache"):
        make_llm("deepseek3", attention_backend="torch", kv_cache_dtype="int8")


def test_baselines_without_blocks_refuse_it(make_llm) -> None:
    llm = make_llm(kv_cache_dtype="int8")
    for baseline in (generate_naive, generate_cached, generate_static):
        with pytest.raises(ValueError, match="kv_cache_dtype='int8': the baselines store no keys in 8 bits"):
            baseline(llm, [[5, 6]], GREEDY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_request_whose_keys_are_nan_fails_alone(backend: str, kind: str, make_llm) -> None:
    """Token 7's embedding is NaN: a request that reads it gets an error, and all others their tokens."""
    llm = make_llm("llama2", kv_cache_dtype=kind, attention_backend=backend, block_size=4)
    asked = prompts()[:4]
    wanted = tokens(llm, asked)
    with torch.no_grad():
        llm.engine.decoder.embedding.weight[7] = torch.nan
    outputs = llm.generate([*asked, [5, 7, 9]], GREEDY, use_tqdm=False)
    assert outputs[-1].outputs[0].finish_reason == "error"
    assert [[one.token_ids for one in output.outputs] for output in outputs[:-1]] == wanted

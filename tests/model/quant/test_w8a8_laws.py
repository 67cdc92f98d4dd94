"""Law 1 for W8A8: rows with the same bits have products with the same bits, in C as in the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import VOCAB
from torch import Tensor

from paged_infer import LLM, SamplingParams
from paged_infer.baselines import generate_cached, generate_naive, generate_static
from paged_infer.kernels import attention_backends
from paged_infer.kernels.cpu import paged_attention
from paged_infer.kernels.cpu.build import unavailable_reason
from paged_infer.kernels.cpu.quant import QuantisedProduct
from paged_infer.kernels.op_sets import C_OPS
from paged_infer.kernels.quant.product import no_kernel

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="no C compiler")

GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=2)
ROOMY = {"device": "cpu", "num_blocks": 512, "max_num_seqs": 16, "enable_prefix_caching": False}


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, rng.integers(1, 60)).tolist() for _ in range(count)]


def results(llm: LLM, texts: list[list[int]]) -> list[Any]:
    outputs = llm.generate(texts, GREEDY, use_tqdm=False)
    return [(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in outputs]


@pytest.fixture
def one_order(monkeypatch) -> None:
    """Attention computes each token as a decode, so that its bits do not depend on chunks."""
    monkeypatch.setattr(paged_attention, "_FEW", 10**9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral"])
def test_products_in_c_give_a_model_the_bits_of_the_reference(family, dtype, checkpoint, monkeypatch) -> None:
    """With a bias, gated and not gated, all layers in one call, and experts."""
    options = {**ROOMY, "dtype": dtype, "quantization": "w8a8", "attention_backend": "c"}
    llm = LLM(checkpoint(family), **options)
    assert any(isinstance(linear.product, QuantisedProduct) for _, linear in llm.engine.decoder.linears())
    in_c = results(llm, prompts(5))
    monkeypatch.setitem(attention_backends._OPS, "c", C_OPS._replace(pack_quantised=no_kernel))
    reference = LLM(checkpoint(family), **options)
    assert not any(isinstance(linear.product, QuantisedProduct) for _, linear in reference.engine.decoder.linears())
    assert results(reference, prompts(5)) == in_c


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt2"])
def test_if_attention_gives_a_row_the_same_bits_in_any_chunk_so_does_the_model(family, checkpoint, one_order) -> None:
    """Chunks, other requests and preemption (which recomputes a text in chunks) then change no bit."""
    texts = prompts(24)
    whole = results(LLM(checkpoint(family), quantization="w8a8", **ROOMY), texts)
    small = {"device": "cpu", "num_blocks": 24, "block_size": 4, "max_num_seqs": 5, "max_num_batched_tokens": 20}
    crowded = LLM(checkpoint(family), quantization="w8a8", **small)
    assert results(crowded, texts) == whole and crowded.stats()["preemptions"] > 0


@pytest.mark.parametrize("generate", [generate_naive, generate_cached, generate_static])
def test_each_baseline_gives_the_tokens_of_the_reference(generate, checkpoint, monkeypatch) -> None:
    """Each with its own reference: naive and cached compute attention in torch, whose last bits differ from C's."""
    greedy, options = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True), {"quantization": "w8a8"}
    in_c = generate(LLM(checkpoint("qwen3"), **options, **ROOMY), prompts(4), greedy)
    monkeypatch.setitem(attention_backends._OPS, "c", C_OPS._replace(pack_quantised=no_kernel))
    reference = generate(LLM(checkpoint("qwen3"), **options, **ROOMY), prompts(4), greedy)
    assert [out.outputs[0].token_ids for out in in_c] == [out.outputs[0].token_ids for out in reference]


def test_inputs_of_the_same_bits_have_outputs_of_the_same_bits_and_attention_is_the_first_to_differ(checkpoint) -> None:
    """A whole prompt, and the same in chunks, the last of which is so short that attention computes it as decodes."""

    def rows(budget: int) -> dict[str, tuple[Tensor, Tensor]]:
        llm = LLM(checkpoint("qwen3"), quantization="w8a8", max_num_batched_tokens=budget, **ROOMY)
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, linear in llm.engine.decoder.linears():
            seen[name] = []
            linear.register_forward_hook(lambda _, x, out, calls=seen[name]: calls.append((x[0].clone(), out.clone())))
        one = SamplingParams(max_tokens=1, temperature=0)
        llm.generate([[*range(3, 40)]], one, use_tqdm=False)
        return {name: tuple(torch.cat(part) for part in zip(*calls, strict=True)) for name, calls in seen.items()}

    whole, parts = rows(64), rows(32)
    changed = {}
    for name, (x, out) in whole.items():
        assert len(x) == 37
        same_in, same_out = ((a == b).all(1) for a, b in zip((x, out), parts[name], strict=True))
        assert same_out[same_in].all()
        changed[name] = int((~same_in).sum())
    assert changed["layers.0.attention.qkv"] == 0 < changed["layers.0.attention.output"] <= 5

"""``quantization``: a float checkpoint of any family is quantised while it is loaded."""

from __future__ import annotations

import logging
from math import gcd

import pytest
import torch
from checkpoints import FAMILIES
from decoding import IDS, logits

from paged_infer import LLM, SamplingParams, storyteller
from paged_infer.kernels.cpu import paged_attention
from paged_infer.kernels.op_sets import C_OPS, TORCH_OPS
from paged_infer.kernels.quant.weight import dequantise
from paged_infer.model.linear import DENSE
from paged_infer.model.loading.load import checkpoint_views, load_decoder
from paged_infer.model.quant.methods import QuantisedMethod
from paged_infer.model.quant.scheme import Scheme, quantise

WIDE = ("router.gate", "shared_gate", "kv_up")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_every_family_computes_with_the_rounded_matrices(scheme, family, checkpoint) -> None:
    ours = load_decoder(checkpoint(family), torch.float32, ops=TORCH_OPS, quantization=scheme)
    theirs = load_decoder(checkpoint(family), torch.float32, method_of=lambda name: DENSE)
    for (name, rounded), (_, linear) in zip(ours.linears(), theirs.linears(), strict=True):
        assert (type(rounded.method) is QuantisedMethod) is not name.endswith(WIDE)
        if not name.endswith(WIDE):
            size = gcd(32, linear.in_features)
            grid = Scheme(8) if scheme == "w8a16" else Scheme(4, strategy="group", group_size=size)
            linear.weight.data.copy_(dequantise(quantise(linear.weight, grid)))  # experts hold it, too
            held = sum(tensor.nbytes for tensor in (*rounded.parameters(), *rounded.buffers()))
            assert held < linear.weight.nbytes * (0.5 if size >= 8 else 1.2)
    torch.testing.assert_close(logits(ours, IDS), logits(theirs, IDS), atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3-moe", "deepseek2", "gpt-oss"])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w8a8"])
def test_the_tokens_of_a_request_are_the_same_in_any_company(scheme, family, checkpoint, monkeypatch) -> None:
    """They are also the same on another backend, in chunks of a prompt, and with one request at a time.

    Where activations are quantised, attention has to keep a row's bits in any chunk (``test_w8a8_laws``).
    """
    if scheme == "w8a8":
        monkeypatch.setattr(paged_attention, "_FEW", 10**9)
    llm = LLM(checkpoint(family), quantization=scheme, num_blocks=64, max_num_batched_tokens=16, max_num_seqs=5)
    prompts = [[5, 900, 17], list(range(40, 75)), [3], IDS, [1000]]
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    together = [out.outputs[0].token_ids for out in llm.generate(prompts, greedy, use_tqdm=False)]
    alone = [llm.generate([prompt], greedy, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    assert together == alone
    # Another backend's last bits could change an activation's code, and so a token.
    backend = "auto" if scheme == "w8a8" else "torch"
    other = LLM(checkpoint(family), quantization=scheme, num_blocks=16, max_num_seqs=1, attention_backend=backend)
    assert together == [out.outputs[0].token_ids for out in other.generate(prompts, greedy, use_tqdm=False)]


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w8a8"])
@pytest.mark.parametrize("ops", [TORCH_OPS, C_OPS], ids=["torch", "c"])
def test_a_rows_bits_depend_on_no_other_row(ops, scheme, checkpoint) -> None:
    decoder = load_decoder(checkpoint("qwen3"), torch.float32, ops=ops, quantization=scheme)
    for _, linear in decoder.linears():
        x = torch.randn(37, linear.in_features)
        whole = linear(x)
        for rows in (slice(0, 1), slice(5, 9), slice(30, 37)):
            assert torch.equal(linear(x[rows]), whole[rows])


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w8a8"])
def test_the_storyteller_in_bfloat16_knows_its_stories(scheme) -> None:
    """On ten stories, perplexity was 1.3131, 1.3146 and 1.3128, and 1.3128 with bfloat16 weights."""
    found = storyteller.evaluate(LLM(quantization=scheme, dtype="bfloat16", num_blocks=200), 4)
    dense = storyteller.evaluate(LLM(dtype="bfloat16", num_blocks=200), 4)
    assert found["recall"] > 0.9 and abs(found["perplexity"] / dense["perplexity"] - 1) < 0.01


def test_a_tied_head_and_a_missing_kernel_are_each_warned_about_once(checkpoint, caplog) -> None:
    from paged_infer.model.quant import methods

    methods._warn_about_reference.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            load_decoder(checkpoint("qwen3"), torch.float32, quantization="w8a16")
    texts = [record.getMessage() for record in caplog.records]
    assert sum("tied to the embedding" in text for text in texts) == 2  # once for each model
    assert sum("no kernel for weights of 8 bits" in text for text in texts) == 1


def test_a_reduced_group_size_is_warned_about_once(checkpoint, caplog) -> None:
    from paged_infer.model.quant import formats_blocks

    formats_blocks._warn_about_group.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            load_decoder(checkpoint("qwen3"), torch.float32, quantization="w4a16")
    expected = ["group_size=32: does not divide rows of 144 columns; they use group_size=16"]
    expected.append(expected[0].replace("144", "272"))
    assert [text for text in caplog.messages if "group_size" in text] == expected


def test_an_unknown_scheme_is_refused_with_the_list(checkpoint) -> None:
    with pytest.raises(ValueError, match="quantization='w5a5': must be one of w8a16, w4a16, w8a8, gguf"):
        load_decoder(checkpoint("qwen3"), torch.float32, quantization="w5a5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int4"}, "quantization='int4': must be one of w8a16, w4a16, w8a8, gguf"),
        ({"quantization": "gguf"}, "quantization='gguf': the checkpoint is not a GGUF file"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(options, message, checkpoint) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(checkpoint("qwen3"), **options)


def test_codes_are_held_once(checkpoint) -> None:
    """Once packed, the loaded codes are freed. The tied embedding's memory stays, twice, and is never touched."""
    decoder = load_decoder(checkpoint("qwen3"), torch.float32, ops=C_OPS, quantization="w8a16")
    left = [*decoder.parameters(), *decoder.buffers()]
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in left}
    assert sum(memory.values()) <= sum(x.nbytes + 64 for x in left) + 2 * (decoder.embedding.weight.nbytes + 64)


def test_random_weights_are_rounded_too(checkpoint) -> None:
    llm = LLM(checkpoint("qwen3-moe"), quantization="w4a16", load_format="dummy", num_blocks=16)
    greedy = SamplingParams(max_tokens=4, ignore_eos=True)
    assert len(llm.generate([[1, 2, 3]], greedy, use_tqdm=False)[0].outputs[0].token_ids) == 4


def test_a_quantised_model_has_no_tensors_for_another_engine(checkpoint) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.qkv is quantised: only a float model"):
        checkpoint_views(load_decoder(checkpoint("qwen3"), torch.float32, quantization="w8a16"))

"""Blocks of GGUF files and of gpt-oss' experts are kept as stored, and decoded as other libraries decode them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from decoding import IDS, logits
from gguf_files import encoded, random_model, save_gguf
from quantised_folders import mxfp4_folders
from safetensors.torch import load_file, save_file

from paged_infer import LLM, SamplingParams
from paged_infer.kernels.quant.weight import dequantise
from paged_infer.model.linear import Piece
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.quant import methods
from paged_infer.model.quant.formats_blocks import GGUF_TYPES, Gguf
from paged_infer.model.quant.methods import QuantisedMethod


@pytest.mark.parametrize(
    "types", [(kind,) for kind in GGUF_TYPES] + [("Q4_K", "Q6_K"), ("Q4_0", "Q4_1"), ("Q8_0", "Q4_1")]
)
def test_blocks_are_decoded_as_by_the_gguf_library(types) -> None:
    """A matrix of one type, or several types held in one form."""
    data = np.random.default_rng(0).normal(size=(12, 512)).astype(np.float32)
    data[3, :256] = 0  # blocks of scale 0
    data[4, :256] = 0.25
    form = Gguf({kind: kind for kind in types})
    for kind in types:
        raw = encoded(data, kind)
        held = form.decode("values", Piece(kind, data.shape), torch.from_numpy(raw))
        assert {name: (t.shape, t.dtype) for name, t in held.items()} == form.held(*data.shape)
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
        actual = dequantise(form.weight(held, data.shape, None))
        torch.testing.assert_close(actual, torch.from_numpy(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_file_kept_in_blocks_has_the_logits_of_the_dequantised_one(model, kind, tmp_path) -> None:
    """llama's q and k are stored in another order of rows, and gpt2's matrices transposed."""
    path = tmp_path / "model.gguf"
    save_gguf(path, random_model(model), kind)
    kept, floats = (load_decoder(path, torch.float32, quantization=how) for how in ("gguf", None))
    assert all(type(linear.method) is QuantisedMethod for _, linear in kept.linears())
    torch.testing.assert_close(logits(kept, IDS), logits(floats, IDS), atol=2e-3, rtol=2e-3)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("kind", "place"), [("Q8_0", 0), ("Q4_1", 0), ("Q4_1", 2), ("Q4_K", 2), ("Q6_K", 208)])
@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_a_block_whose_scale_or_minimum_is_not_finite_is_refused(kind, place, wrong, tmp_path, monkeypatch) -> None:
    def spoiled(data: np.ndarray, tensor_type: str) -> np.ndarray:
        raw = encoded(data, tensor_type)
        if tensor_type == kind:
            raw[3, place : place + 2] = np.array([wrong], np.float16).view(np.uint8)
        return raw

    monkeypatch.setattr("gguf_files.encoded", spoiled)
    save_gguf(tmp_path / "model.gguf", random_model("llama"), kind)
    with pytest.raises(ValueError, match=r"(scale|zero) -?(inf|nan) of row \d+: must be finite"):
        load_decoder(tmp_path / "model.gguf", torch.float32, quantization="gguf")


def test_matrices_of_other_types_become_floats_with_a_warning(tmp_path, caplog) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(path, random_model("qwen3"), "Q5_0")
    kept = load_decoder(path, torch.float32, quantization="gguf")
    assert torch.equal(logits(kept, IDS), logits(load_decoder(path, torch.float32), IDS))
    assert "matrices of type Q5_0 become floats" in caplog.text


def test_a_file_may_be_rounded_again(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(path, random_model("qwen3"), "F16")
    rounded = load_decoder(path, torch.float32, quantization="w8a16")
    error = logits(rounded, IDS) - logits(load_decoder(path, torch.float32), IDS)
    assert 0 < error.abs().max() < 3


def test_experts_in_mxfp4_stay_in_4_bits_and_give_the_logits_of_the_dense_ones(tmp_path, caplog) -> None:
    methods._warn_about_reference.cache_clear()
    ours, theirs = (load_decoder(folder, torch.float32) for folder in mxfp4_folders(tmp_path))
    torch.testing.assert_close(logits(ours, IDS), logits(theirs, IDS), atol=2e-4, rtol=1e-3)
    assert sum("no kernel for weights of MXFP4 on this cpu" in text for text in caplog.messages) == 1
    up = ours.layers[0].mlp.experts.up
    assert type(up.method) is QuantisedMethod and type(ours.layers[0].attention.qkv.method) is not QuantisedMethod
    assert sum(t.nbytes for t in up.parameters() if t is not up.bias) == up.in_features * up.out_features * 17 // 32


def test_mxfp4_scales_that_are_nan_are_refused(tmp_path) -> None:
    packed, _ = mxfp4_folders(tmp_path)
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"][0, 0, 0] = 255
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj_scales: exponent 255, which is NaN"):
        load_decoder(packed, torch.float32)


def test_a_kept_file_generates(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(path, random_model("llama-wide-heads"), "Q4_1")
    kept, floats = (LLM(path, quantization=how, num_blocks=16) for how in ("gguf", None))
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    texts = [llm.generate([IDS], greedy, use_tqdm=False)[0].outputs[0].token_ids for llm in (kept, floats)]
    assert texts[0] == texts[1]

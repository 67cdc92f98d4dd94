"""Quantised weights on several ranks: the logits of one rank, or an error that names what they do not divide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_random_checkpoint
from decoding import IDS, logits
from gguf_files import random_model, save_gguf
from quantised_folders import AWQ, awq, compressed_plain, compressed_words, fp8_blocks, gptq, mxfp4_folders, write_pair
from ranks import on_ranks

from paged_infer.kernels.op_sets import C_OPS, TORCH_OPS
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.parallel import Collective
from paged_infer.model.quant.methods import QuantisedMethod

PROJ = r"_proj"
FORMATS = {
    "awq": (AWQ, awq),
    "gptq-4": gptq(4, 1, "plain"),
    "gptq-8": gptq(8, 2, "plain"),
    "packed-4": compressed_words(4, symmetric=True),
    "packed-3-asymmetric": compressed_words(3, symmetric=False),
    "int8": compressed_plain("channel", torch.int8),
    "int8-tensor": compressed_plain("tensor", torch.int8),
    "float8": compressed_plain("channel", torch.float8_e4m3fn),
    "fp8-small": fp8_blocks(16, 16),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The family with 8 heads, 4 KV heads, and widths that groups of 16 divide on 2 ranks."""
    made = dict[str, Path]()

    def make(family: str) -> Path:
        if family not in made:
            sizes: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 8, "head_dim": 16}
            sizes |= {"num_key_value_heads": 4, "intermediate_size": 256}
            folder = tmp_path_factory.mktemp("wide")
            made[family] = save_random_checkpoint(family, folder, **sizes)
        return made[family]

    return make


def check_ranks(path: Path, size: int = 2, atol: float = 1e-4, **options: Any) -> None:
    """All ranks get the same bits, which are near the logits of a single rank, and hold a part of the weights."""
    whole = load_decoder(path, torch.float32, **options)
    few = {name for name, linear in whole.linears() if isinstance(linear.method, QuantisedMethod)}
    assert few

    def work(parallel: Collective) -> tuple[torch.Tensor, set[str]]:
        decoder = load_decoder(path, torch.float32, parallel=parallel, **options)
        names = {name for name, linear in decoder.linears() if isinstance(linear.method, QuantisedMethod)}
        return logits(decoder, IDS), names

    expected = logits(whole, IDS)
    ranks = on_ranks(size, work)
    for found, names in ranks:
        assert names == few
        assert torch.equal(found, ranks[0][0])
        torch.testing.assert_close(found, expected, atol=atol, rtol=atol / 10)


def refused(path: Path, message: str, size: int = 2, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        on_ranks(size, lambda parallel: load_decoder(path, torch.float32, parallel=parallel, **options))


@pytest.mark.parametrize("form", FORMATS)
def test_a_quantised_folder_is_cut_along_its_groups(form, wide, tmp_path) -> None:
    config, pack = FORMATS[form]
    packed, _ = write_pair(wide("llama-biased"), tmp_path, config, pack, PROJ)
    check_ranks(packed)


@pytest.mark.parametrize("form", ["awq", "gptq-4", "packed-4", "fp8-small"])
def test_rows_of_stacked_matrices_in_another_order_are_cut_too(form, wide, tmp_path) -> None:
    """phi3 stores q, k and v as one matrix, some of whose rows are reordered."""
    config, pack = FORMATS[form]
    packed, _ = write_pair(wide("phi3"), tmp_path, config, pack, PROJ)
    check_ranks(packed)


def test_experts_in_mxfp4_are_cut_along_their_blocks(tmp_path) -> None:
    packed, _ = mxfp4_folders(tmp_path)
    check_ranks(packed)


def test_blocks_of_mxfp4_that_ranks_do_not_divide_are_refused(tmp_path) -> None:
    packed, _ = mxfp4_folders(tmp_path, intermediate_size=96)
    refused(packed, r"_blocks, stored by groups of 32 columns; of its 96 columns, 1, 3 ranks would")


@pytest.mark.parametrize("ops", [TORCH_OPS, C_OPS], ids=["torch", "c"])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
@pytest.mark.parametrize("family", ["gpt2-untied", "qwen3-moe", "gpt-oss", "deepseek2"])
def test_a_dense_checkpoint_is_rounded_as_on_one_rank(family, scheme, ops, checkpoint) -> None:
    """Widths of 75 and 70 give other group sizes, or none, on two ranks; the scales are those of whole rows."""
    check_ranks(checkpoint(family), quantization=scheme, ops=ops)


@pytest.mark.parametrize("family", ["llama3", "qwen3-moe"])
def test_activations_are_rounded_by_each_rank_and_no_worse_for_it(family, checkpoint) -> None:
    """The scale of a rank's own columns is at most that of all columns, so codes differ, and the error is no larger."""
    folder = checkpoint(family)
    floats, whole = (logits(load_decoder(folder, torch.float32, quantization=q), IDS) for q in (None, "w8a8"))

    def work(parallel: Collective) -> torch.Tensor:
        return logits(load_decoder(folder, torch.float32, quantization="w8a8", parallel=parallel), IDS)

    first, second = on_ranks(2, work)
    assert torch.equal(first, second)
    assert (first - floats).norm() < 1.1 * (whole - floats).norm()
    assert (first - whole).norm() < (whole - floats).norm()


@pytest.mark.parametrize("how", [None, "gguf"])
@pytest.mark.parametrize(
    ("model", "kind"), [("llama", "Q8_0"), ("llama", "Q4_1"), ("gpt2", "Q4_0"), ("gemma3", "Q8_0")]
)
def test_a_gguf_file_is_cut_along_its_blocks(model, kind, how, tmp_path) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(path, random_model(model), kind)
    if how is None:
        whole = logits(load_decoder(path, torch.float32), IDS)
        for found in on_ranks(2, lambda parallel: logits(load_decoder(path, torch.float32, parallel=parallel), IDS)):
            torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-5)
    else:
        check_ranks(path, quantization=how)


def test_a_block_that_ranks_would_have_to_share_is_dequantised_or_refused(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(path, random_model("llama"), "Q6_K")
    whole = logits(load_decoder(path, torch.float32), IDS)
    for found in on_ranks(2, lambda parallel: logits(load_decoder(path, torch.float32, parallel=parallel), IDS)):
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-5)
    message = r"tensor_parallel_size=2: does not divide .*o_proj\.weight, stored by groups of 256 columns; of its 256"
    refused(path, message + " columns, 1 ranks would", quantization="gguf")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (fp8_blocks(128, 128), r"does not divide .*weight_scale_inv, stored by groups of 128 (rows|columns)"),
        (gptq(4, 1, "shared"), r"the columns of .*\.weight are in groups in arbitrary order \(desc_act, actorder\)"),
        (compressed_words(4, symmetric=True, ordered=True), r"the columns of .* are in groups in arbitrary order"),
    ],
)
def test_groups_that_ranks_do_not_divide_are_refused_by_name(form, message, wide, tmp_path) -> None:
    packed, _ = write_pair(wide("llama-biased"), tmp_path, *form, PROJ)
    refused(packed, f"tensor_parallel_size=2: {message}")

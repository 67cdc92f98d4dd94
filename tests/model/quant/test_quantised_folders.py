"""A quantised checkpoint gives the logits of the same checkpoint dequantised by hand."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from decoding import IDS, logits
from quantised_folders import AWQ, Packer, awq, compressed_plain, compressed_words, fp8_blocks, gptq, write_pair
from safetensors.torch import load_file, save_file

from paged_infer.model.loading.load import load_decoder
from paged_infer.model.quant.methods import QuantisedMethod
from paged_infer.model.quant.words import unpack_words

PROJ = r"_proj|\.w[123]"
FORMATS: dict[str, tuple[dict[str, Any], Packer]] = {
    "awq": (AWQ, awq),
    **{
        f"gptq-{bits}-v{version}-{order}": gptq(bits, version, order)
        for bits, version, order in [
            (4, 1, "plain"),
            (4, 2, "plain"),
            (8, 1, "shared"),
            (2, 2, "shared"),
            (4, 1, "shared"),
            (4, 2, "own"),
        ]
    },
    "packed-4": compressed_words(4, symmetric=True),
    "packed-4-asymmetric": compressed_words(4, symmetric=False),
    "packed-8": compressed_words(8, symmetric=True),
    "packed-4-order": compressed_words(4, symmetric=True, ordered=True),
    "packed-2": compressed_words(2, symmetric=True),
    "packed-3-asymmetric": compressed_words(3, symmetric=False),
    "packed-5": compressed_words(5, symmetric=True),
    "packed-6-asymmetric": compressed_words(6, symmetric=False),
    "packed-7-order": compressed_words(7, symmetric=True, ordered=True),
    "int8": compressed_plain("channel", torch.int8),
    "int8-tensor": compressed_plain("tensor", torch.int8),
    "float8": compressed_plain("channel", torch.float8_e4m3fn),
    "fp8": fp8_blocks(128, 128),
    "fp8-small": fp8_blocks(32, 16),
}


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_packed_as_compressed_tensors_packs_them(bits) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 77), dtype=torch.int8)
    assert torch.equal(unpack_words(pack_to_int32(codes, bits), bits)[:, :77], codes.int() + 2 ** (bits - 1))


def check_pair(packed, dense) -> Any:
    ours, theirs = load_decoder(packed, torch.float32), load_decoder(dense, torch.float32)
    torch.testing.assert_close(logits(ours, IDS), logits(theirs, IDS), atol=2e-4, rtol=1e-3)
    return ours


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_has_the_logits_of_its_dequantised_model(form, checkpoint, tmp_path) -> None:
    config, pack = FORMATS[form]
    decoder = check_pair(*write_pair(checkpoint("llama-biased"), tmp_path, config, pack, PROJ))
    assert all(type(linear.method) is QuantisedMethod for _, linear in decoder.linears())


@pytest.mark.parametrize(
    ("family", "form"),
    [(family, form) for family in ("phi3", "gemma3") for form in ("awq", "gptq-4-v2-own", "packed-4", "fp8-small")]
    + [(family, form) for family in ("deepseek2-yarn", "qwen3-moe") for form in ("int8", "fp8-small")],
)
def test_rows_in_another_order_latents_and_experts(family, form, checkpoint, tmp_path) -> None:
    """phi3 stores q, k and v as one matrix, some of whose rows are reordered; DeepSeek's kv_b is dequantised."""
    config, pack = FORMATS[form]
    check_pair(*write_pair(checkpoint(family), tmp_path, config, pack, PROJ))


def changed(folder, change, **section: Any) -> None:
    """Replace some tensors of a folder, or remove them where ``change`` gives None, and keys of quantization_config."""
    tensors = {name: change(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= section
    (folder / "config.json").write_text(json.dumps(raw))


def test_a_folder_of_compressed_tensors_may_be_called_frozen(checkpoint, tmp_path) -> None:
    packed, dense = write_pair(checkpoint("qwen3"), tmp_path, *FORMATS["int8"], PROJ)
    changed(packed, lambda name, tensor: tensor, quantization_status="frozen")
    check_pair(packed, dense)
    floats = load_file(dense / "model.safetensors")
    changed(packed, lambda name, tensor: floats.get(name, tensor))
    with pytest.raises(ValueError, match=r"_proj\.weight: must have int8 codes within -128 \.\. 127"):
        load_decoder(packed, torch.float32)


def test_ignored_layers_stay_floats_and_a_later_group_has_the_others(checkpoint, tmp_path) -> None:
    config, pack = compressed_words(4, symmetric=True)
    config["ignore"] = ["lm_head", "re:.*down_proj$", "model.layers.1.self_attn.o_proj"]
    pattern = r"(q|k|v|gate|up)_proj|layers\.[02].*o_proj"
    decoder = check_pair(*write_pair(checkpoint("qwen3"), tmp_path, config, pack, pattern))
    few = {name for name, linear in decoder.linears() if type(linear.method) is QuantisedMethod}
    assert few == {f"layers.{i}.{n}" for i in range(3) for n in ("attention.qkv", "attention.output", "mlp.up")} - {
        "layers.1.attention.output"
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_proj.scales": lambda t: t * 0}, r"q_proj\.scales: scale 0\.0 of row 0: must be finite and > 0"),
        ({"up_proj.scales": lambda t: t * torch.inf}, r"up_proj\.scales: scale inf of row 0: must be finite"),
        ({"down_proj.scales": lambda t: t * torch.nan}, r"down_proj\.scales: scale nan of row 0"),
        ({"k_proj.scales": None}, r"missing tensor model\.layers\.0\.self_attn\.k_proj\.scales \[12, 160\]"),
        ({"o_proj.g_idx": None}, r"missing tensor .*o_proj\.g_idx"),
        ({"o_proj.g_idx": lambda t: t * 0}, r"o_proj\.g_idx: must name each group 16 times"),
        ({"o_proj.g_idx": lambda t: t - 1}, r"o_proj\.g_idx: must name each group 16 times"),
        ({"o_proj.g_idx": lambda t: t + 2**30}, r"o_proj\.g_idx: must name each group 16 times"),
        ({"v_proj.qzeros": lambda t: t | -1}, r"v_proj\.weight: zero point 16: must be 0 to 15"),
        ({"q_proj.qweight": lambda t: t.float()}, r"q_proj\.weight: packed codes are stored as torch\.float32, not"),
        (
            {"q_proj.qweight": lambda t: t.to(torch.int8)},
            r"q_proj\.weight: packed codes are stored as torch\.int8, not",
        ),
        ({"v_proj.qzeros": lambda t: t.to(torch.int16)}, r"v_proj\.weight: packed codes are stored as torch\.int16"),
        ({"o_proj.g_idx": lambda t: t.float()}, r"o_proj\.weight: g_idx is stored as torch\.float32, not torch\.int32"),
        ({"o_proj.g_idx": lambda t: t.long() + 2**32}, r"o_proj\.g_idx: must name each group 16 times"),
        ({"q_proj.scales": lambda t: t[:6]}, r"q_proj\.scales is \[6, \d+\], not \[12, \d+\]"),
    ],
)
def test_a_tensor_that_cannot_be_used_is_one_clear_error(change, message, checkpoint, tmp_path) -> None:
    config, pack = FORMATS["gptq-4-v1-shared"]
    packed, _ = write_pair(checkpoint("llama-biased"), tmp_path, config, pack, PROJ)
    ((ending, new),) = change.items()
    first = next(name for name in load_file(packed / "model.safetensors") if name.endswith(ending))
    changed(packed, lambda name, tensor: tensor if name != first else None if new is None else new(tensor))
    with pytest.raises(ValueError, match=message):
        load_decoder(packed, torch.float32)


@pytest.mark.parametrize(
    ("form", "ending", "change", "message"),
    [
        ("awq", "qweight", lambda t: t.double(), "packed codes are stored as torch.float64, not torch.int32"),
        ("awq", "qzeros", lambda t: t.to(torch.int16), "packed codes are stored as torch.int16, not torch.int32"),
        ("packed-4", "weight_packed", lambda t: t.to(torch.uint8), "packed codes are stored as torch.uint8"),
        ("packed-4-asymmetric", "weight_zero_point", lambda t: t.float(), "packed codes are stored as torch.float32"),
        ("packed-4", "weight_shape", lambda t: t.flip(0), "weight_shape is"),
        ("packed-4", "weight_scale", lambda t: -t, "must be finite and > 0"),
        ("packed-4-order", "weight_g_idx", lambda t: t * 0 - 1, "must name each group 16 times"),
        ("float8", "weight", lambda t: t.float(), "codes are stored as torch.float32, not torch.float8_e4m3fn"),
        ("float8", "weight_scale", lambda t: t * torch.nan, "scale nan of row 0: must be finite and > 0"),
        ("fp8-small", "weight_scale_inv", lambda t: t * 0, "scale 0.0 of row 0: must be finite and > 0"),
    ],
)
def test_a_tensor_of_another_kind_than_its_format_has_is_one_clear_error(
    form, ending, change, message, checkpoint, tmp_path
) -> None:
    """Narrower words would be read as other codes, and floats hold no packed codes at all."""
    packed, _ = write_pair(checkpoint("llama-biased"), tmp_path, *FORMATS[form], PROJ)
    first = next(name for name in load_file(packed / "model.safetensors") if name.endswith(f"v_proj.{ending}"))
    changed(packed, lambda name, tensor: change(tensor) if name == first else tensor)
    with pytest.raises(ValueError, match=message):
        load_decoder(packed, torch.float32)


def test_a_block_larger_than_the_matrix_takes_no_memory_of_its_size(checkpoint, tmp_path) -> None:
    config, pack = fp8_blocks(10**9, 10**9)
    packed, dense = write_pair(checkpoint("qwen3"), tmp_path, config, pack, PROJ)
    check_pair(packed, dense)


@pytest.mark.parametrize(("form", "ending"), [("gptq-4-v1-plain", "qweight"), ("awq", "qweight")])
def test_a_quantised_head_is_refused(form, ending, checkpoint, tmp_path) -> None:
    """A folder with tensors of a quantised head, which its config does not mention."""
    packed, _ = write_pair(checkpoint("llama-biased"), tmp_path, *FORMATS[form], PROJ)
    tensors = load_file(packed / "model.safetensors")
    tensors[f"lm_head.{ending}"] = tensors.pop("lm_head.weight").int()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing tensor lm_head\.weight(.|\n)*unexpected tensor lm_head\.{ending}"):
        load_decoder(packed, torch.float32)


@pytest.mark.parametrize("order", ["plain", "shared"])
def test_gptq_without_any_g_idx_is_refused(order, checkpoint, tmp_path) -> None:
    """With desc_act the order of the columns would be lost. Without it, too: all current writers store g_idx."""
    packed, _ = write_pair(checkpoint("llama-biased"), tmp_path, *gptq(4, 1, order), PROJ)
    changed(packed, lambda name, tensor: None if name.endswith("g_idx") else tensor)
    with pytest.raises(ValueError, match=r"missing tensor model\.layers\.0\.self_attn\.q_proj\.g_idx \[192\]"):
        load_decoder(packed, torch.float32)


@pytest.mark.parametrize(
    ("form", "named", "message"),
    [
        ("gptq-4-v1-plain", "awq", r"k_proj\.qweight is \[24, 160\], not \[192, 20\]"),
        ("awq", "gptq-4-v1-plain", r"missing tensor model\.layers\.0\.self_attn\.q_proj\.g_idx"),
        ("packed-5", "packed-4", r"k_proj\.weight_packed is \[160, 30\], not \[160, 24\]"),
    ],
)
def test_a_folder_whose_config_names_another_format_is_refused(form, named, message, checkpoint, tmp_path) -> None:
    packed, _ = write_pair(checkpoint("llama-biased"), tmp_path, FORMATS[named][0], FORMATS[form][1], PROJ)
    with pytest.raises(ValueError, match=message):
        load_decoder(packed, torch.float32)


def test_a_group_size_that_does_not_divide_names_the_matrix(checkpoint, tmp_path) -> None:
    packed, _ = write_pair(checkpoint("qwen3"), tmp_path, AWQ, awq, PROJ)
    raw = json.loads((packed / "config.json").read_text())
    raw["quantization_config"]["group_size"] = 128
    (packed / "config.json").write_text(json.dumps(raw))
    expected = "group_size=128: does not divide the 192 columns of model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_decoder(packed, torch.float32)


def test_matrices_of_one_product_must_be_stored_alike(checkpoint, tmp_path) -> None:
    config, pack = compressed_words(4, symmetric=True)
    config["ignore"].append("re:.*k_proj")
    packed, _ = write_pair(checkpoint("qwen3"), tmp_path, config, pack, PROJ)
    with pytest.raises(ValueError, match=r"self_attn\.k_proj is not stored as model\.layers\.0\.self_attn\.q_proj is"):
        load_decoder(packed, torch.float32)


@pytest.mark.parametrize("kind", ["int", "float"])
def test_activations_are_rounded_row_by_row(kind, checkpoint, tmp_path) -> None:
    config, pack = compressed_plain("channel", torch.int8 if kind == "int" else torch.float8_e4m3fn)
    rounding = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    config["config_groups"]["group_0"]["input_activations"] = rounding
    packed, dense = write_pair(checkpoint("qwen3"), tmp_path, config, pack, PROJ)
    ours, theirs = load_decoder(packed, torch.float32), load_decoder(dense, torch.float32)
    x = torch.randn(5, 192)
    if kind == "int":
        scale = x.abs().amax(1, keepdim=True) / 127.5
        rounded = (x / scale).round().clamp(-128, 127)
    else:
        scale = x.abs().amax(1, keepdim=True) / 448
        rounded = (x / scale).to(torch.float8_e4m3fn).float()
    expected = theirs.layers[0].attention.qkv(rounded * scale)
    assert not torch.allclose(expected, theirs.layers[0].attention.qkv(x), atol=1e-5, rtol=1e-4)
    qkv = ours.layers[0].attention.qkv
    torch.testing.assert_close(qkv(x), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(qkv(x)[2:3], qkv(x[2:3]))

"""Quantised checkpoints, packed by plain loops from the formats' descriptions, and the same checkpoints dequantised."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import save_random_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from paged_infer.model.quant.formats_blocks import FLOAT4

GROUP = 16
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of nibble i, counted from the lowest
Packed = tuple[dict[str, Tensor], Tensor]  # the tensors by their endings, and W [N, K] dequantised
Packer = Callable[[str, np.ndarray], Packed]


def write_pair(source: Path, tmp: Path, config: dict[str, Any], pack: Packer, pattern: str) -> tuple[Path, Path]:
    """Write ``source`` with the matrices that match ``pattern`` packed, and a dense copy with them dequantised."""
    packed, dense = dict[str, Tensor](), dict[str, Tensor]()
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            packed[name] = dense[name] = tensor
            if re.search(r"(proj|proj_with_mqa|w[123])\.weight$", name) and re.search(pattern, name):
                del packed[name]
                module = name.removesuffix(".weight")
                tensors, dense[name] = pack(module, tensor.numpy().astype(np.float64))
                packed |= {f"{module}.{ending}": one.contiguous() for ending, one in tensors.items()}
    raw = json.loads((source / "config.json").read_text())
    folders = tmp / "packed", tmp / "dense"
    for folder, tensors, extra in zip(folders, (packed, dense), ({"quantization_config": config}, {}), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**raw, **extra}))
        save_file(
            {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    return folders


def rounded(w: np.ndarray, bits: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """Codes 0 .. 2^b - 1 [N, K], zeros [N, G], scales [N, G] float16, and W; ``groups``: the group of each column."""
    count = groups.max() + 1
    low = np.stack([w[:, groups == g].min(1) for g in range(count)], 1)
    high = np.stack([w[:, groups == g].max(1) for g in range(count)], 1)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16)
    zeros = np.clip(np.round(-low / scales), 1, 2**bits - 1)
    codes = np.clip(np.round(w / scales[:, groups]) + zeros[:, groups], 0, 2**bits - 1).astype(np.int64)
    dense = (codes - zeros[:, groups]) * scales[:, groups].astype(np.float64)
    return codes, zeros.astype(np.int64), scales, torch.from_numpy(dense).float()


def words(codes: np.ndarray, bits: int, columns: tuple[int, ...] | None = None) -> Tensor:
    """[R, C] -> int32 [R, C / per], per = 32 / bits: column ``columns[i]`` of a word's per is at bit ``bits * i``."""
    per = 32 // bits
    out = np.zeros((codes.shape[0], codes.shape[1] // per), np.uint32)
    for i in range(per):
        out |= (codes[:, (columns or range(per))[i] :: per] << (bits * i)).astype(np.uint32)
    return torch.from_numpy(out.view(np.int32).copy())


def dense_words(codes: np.ndarray, bits: int) -> Tensor:
    """[R, C] -> int32 [R, C * bits / 32], one string of bits per row, the lowest bit of each code first."""
    row = (codes[..., None] >> np.arange(bits) & 1).reshape(len(codes), -1)
    row = np.pad(row, ((0, 0), (0, -row.shape[1] % 32)))
    return torch.from_numpy(np.packbits(row, axis=1, bitorder="little").view("<i4").copy())


def awq(module: str, w: np.ndarray) -> Packed:
    codes, zeros, scales, dense = rounded(w, 4, np.arange(w.shape[1]) // GROUP)
    return {
        "qweight": words(codes.T, 4, AWQ_COLUMNS),
        "qzeros": words(zeros.T, 4, AWQ_COLUMNS),
        "scales": torch.from_numpy(scales.T.copy()),
    }, dense


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def gptq(bits: int, version: int, order: str) -> tuple[dict[str, Any], Packer]:
    """``order`` of the columns: "plain"; "shared" by q, k and v, which have one input, as in GPTQ; or "own"."""

    def pack(module: str, w: np.ndarray) -> Packed:
        groups = np.arange(w.shape[1]) // GROUP
        if order != "plain":
            seed = w.shape[1] if order == "shared" else sum(module.encode())
            groups = np.random.default_rng(seed).permutation(groups)
        codes, zeros, scales, dense = rounded(w, bits, groups)
        return {
            "qweight": words(codes, bits).t(),
            "qzeros": words(zeros.T - (version == 1), bits),
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }, dense

    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": order != "plain", "sym": False}
    return {**config, "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "damp_percent": 0.1}, pack


def compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def compressed_words(bits: int, symmetric: bool, ordered: bool = False) -> tuple[dict[str, Any], Packer]:
    """``ordered``: GPTQ's act-order, with the group of each column in ``weight_g_idx``."""

    def pack(module: str, w: np.ndarray) -> Packed:
        groups = np.arange(w.shape[1]) // GROUP
        if ordered:
            groups = np.random.default_rng(w.shape[1]).permutation(groups)
        codes, zeros, scales, dense = rounded(w, bits, groups)
        if symmetric:
            zeros[:] = 2 ** (bits - 1)
            dense = torch.from_numpy((codes - 2 ** (bits - 1)) * scales[:, groups].astype(np.float64)).float()
        tensors = {
            "weight_packed": dense_words(codes, bits),
            "weight_scale": torch.from_numpy(scales),
            "weight_shape": torch.tensor(w.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = dense_words(zeros.T, bits).t()
        if ordered:
            tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return tensors, dense

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    weights |= {"actorder": "group"} if ordered else {}
    return compressed("pack-quantized", {**weights, "dynamic": False, "observer": "minmax"}), pack


def compressed_plain(strategy: str, dtype: torch.dtype) -> tuple[dict[str, Any], Packer]:
    is_float = dtype != torch.int8

    def pack(module: str, w: np.ndarray) -> Packed:
        most = np.abs(w).max(1, keepdims=True) if strategy == "channel" else np.abs(w).max().reshape(1)
        scales = torch.from_numpy(most / (448 if is_float else 127.5)).float()
        codes = torch.from_numpy(w).float() / scales
        codes = (codes if is_float else codes.round().clamp(-128, 127)).to(dtype)
        return {"weight": codes, "weight_scale": scales}, codes.float() * scales

    weights = {"num_bits": 8, "type": "float" if is_float else "int", "symmetric": True, "strategy": strategy}
    return compressed("float-quantized" if is_float else "int-quantized", {**weights, "dynamic": False}), pack


def fp8_blocks(rows: int, columns: int) -> tuple[dict[str, Any], Packer]:
    def pack(module: str, w: np.ndarray) -> Packed:
        scales = np.zeros((-(-w.shape[0] // rows), -(-w.shape[1] // columns)))
        codes, dense = torch.zeros(w.shape, dtype=torch.float8_e4m3fn), torch.zeros(w.shape)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                scales[i, j] = np.abs(w[block]).max() / 448
                codes[block] = torch.from_numpy(w[block] / scales[i, j]).to(torch.float8_e4m3fn)
                dense[block] = codes[block].float() * np.float32(scales[i, j])
        return {"weight": codes, "weight_scale_inv": torch.from_numpy(scales).float()}, dense

    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [rows, columns],
    }, pack


def to_mxfp4(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[E, in, out] -> blocks [E, out, in / 32, 16], scales [E, out, in / 32], and the dequantised experts."""
    rows = tensor.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(rows.abs().amax(-1))) - 2
    values = torch.tensor(FLOAT4) / 2
    codes = (rows / 2 ** exponents[..., None]).unsqueeze(-1).sub(values).abs().argmin(-1)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    dense = (values[codes] * 2 ** exponents[..., None]).flatten(2).transpose(1, 2)
    return blocks, (exponents + 127).to(torch.uint8), dense.contiguous()


def mxfp4_folders(tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    """gpt-oss with experts in MXFP4, and with the same experts dequantised."""
    source = save_random_checkpoint("gpt-oss", tmp_path, **{"intermediate_size": 64, **changes})
    tensors = dict[str, Tensor]()
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    packed, dense = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            del packed[name]
            packed[f"{name}_blocks"], packed[f"{name}_scales"], dense[name] = to_mxfp4(tensor)
    raw = json.loads((source / "config.json").read_text())
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ignored}
    folders = tmp_path / "packed", tmp_path / "dense"
    for folder, held, extra in zip(folders, (packed, dense), ({"quantization_config": config}, {}), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**raw, **extra}))
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folders

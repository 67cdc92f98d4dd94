"""GGUF files, written with the gguf library as llama.cpp's converter writes them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 1003
WIDE: dict[str, Any] = {  # rows of a K-quant are multiples of 256
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "llama-wide-heads": ("llama", {**WIDE, "head_dim": 96, "tie_word_embeddings": True}),
    "llama-biased": ("llama", {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {**WIDE, "rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 131072}),
    "llama-linear": ("llama", {**WIDE, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2": ("qwen2", {**WIDE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**WIDE, "head_dim": 32}),
    "gpt2": ("gpt2", {"n_embd": 256, "n_head": 4, "n_layer": 2, "n_positions": 512}),
    "gemma3": ("gemma3_text", {**WIDE, "head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7}),
}
# Of a block: the byte offsets of its float16 scale and, if it has one, its float16 minimum, each with a factor.
_SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q2_K": ((80, 0.02), (82, 0.03)),
    "Q3_K": ((108, 0.003),),
    "Q4_K": ((0, 6e-4), (2, 5e-3)),
    "Q5_K": ((0, 3e-4), (2, 5e-3)),
    "Q6_K": ((208, 1e-4),),
}
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def random_model(name: str) -> Any:
    """A random model in transformers, with weights so large that no two logits are close."""
    model_type, settings = MODELS[name]
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, initializer_range=0.15, **special, **settings)
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def encoded(data: np.ndarray, tensor_type: str) -> np.ndarray:
    """``data`` quantised to ``tensor_type``; for a K-quant, which the library cannot write, random blocks."""
    if tensor_type not in _SCALES:
        return gguf.quantize(data, gguf.GGMLQuantizationType[tensor_type])
    elements, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor_type]]
    rng = np.random.default_rng(data.size)
    rows, blocks = len(data), data.shape[1] // elements
    out = rng.integers(0, 256, (rows, blocks, num_bytes), np.uint8)
    for start, scale in _SCALES[tensor_type]:
        values = (scale * rng.uniform(0.5, 1.5, (rows, blocks, 1))).astype(np.float16)
        out[..., start : start + 2] = values.view(np.uint8)
    return out.reshape(rows, -1)


def neighbours(heads: int, rows: int) -> np.ndarray:
    """For each row of q or k in llama.cpp's order (rotary pairs adjacent), its index in transformers' order."""
    half = rows // heads // 2
    return np.array(
        [head * 2 * half + pair + half * second for head in range(heads) for pair in range(half) for second in (0, 1)]
    )


def save_gguf(path: Path, model: Any, tensor_type: str = "F32", **metadata: Any) -> Any:
    """Write ``model`` to ``path``, its matrices as ``tensor_type``; returns it with the weights that are stored there.

    Args:
        metadata: further keys, "." spelt "__"; a value of None drops a key.
    """
    config = model.config
    arch = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, arch)
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    stored, changed = deepcopy(model), {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        data, order = tensor.numpy(), None
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            data = data[neighbours(heads, len(data))]
            order = np.argsort(neighbours(heads, len(data)))
        is_transposed = arch == "gpt2" and name.endswith(_CONV1D)
        data = np.ascontiguousarray(data.T) if is_transposed else data
        shift = np.float32(arch == "gemma3" and name.endswith("norm.weight"))
        this_type = tensor_type if data.ndim == 2 else "F32"
        raw = encoded(data + shift, this_type)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", raw, raw_dtype=gguf.GGMLQuantizationType[this_type])
        back = gguf.dequantize(raw, gguf.GGMLQuantizationType[this_type]) - shift
        back = back.T if is_transposed else back if order is None else back[order]
        changed[name] = torch.from_numpy(np.ascontiguousarray(back)).float()
    stored.load_state_dict(changed, strict=False)
    stored.tie_weights()
    _write_settings(writer, arch, config, {key.replace("__", "."): value for key, value in metadata.items()})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _write_settings(writer: Any, arch: str, config: Any, changes: dict[str, Any]) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if arch == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope["rope_theta"])
        if arch != "qwen2":
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        if arch == "llama":
            writer.add_vocab_size(config.vocab_size)
            writer.add_rope_dimension_count(head_dim)
        if arch == "gemma3":
            writer.add_sliding_window(config.sliding_window)
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "llama3":
            writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, head_dim))
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    for key, value in changes.items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            writer.add_key_value(key, *_typed(value))


def _typed(value: Any) -> tuple[Any, ...]:
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        return value, kinds.ARRAY, kinds.get_type(value[0])
    return value, kinds.UINT32 if type(value) is int and value >= 0 else kinds.get_type(value)


def _llama3_factors(rope: dict[str, Any], dim: int) -> np.ndarray:
    """The factors by which transformers divides each frequency."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model("llama", rope_parameters=rope, head_dim=dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return (plain / scaled).numpy()

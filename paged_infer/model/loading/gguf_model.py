"""The model in a GGUF file as a transformers checkpoint would hold it: ``config.json`` as a dict, and tensors by name.

llama.cpp's converter renames tensors and changes some. Here that is undone, so config, layout and loader are the same
for both formats.

              in the file                                          here
    llama     rows of q and k with each rotary pair adjacent       put back into two halves
    llama     "rope_freqs", a factor for each frequency            the rope_scaling of Llama 3 that gives these factors
    gemma3    norms hold 1 + w                                     1 is subtracted
    gpt2      matrices are [out, in]                               transposed, as Conv1D has them
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paged_infer.model.config_reader import ConfigReader
from paged_infer.model.loading.gguf_file import GgufFile, GgufTensor

MODEL_TYPES = {"gemma3": "gemma3_text", "gpt2": "gpt2", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``general.architecture`` -> transformers' ``model_type``."""

_SIZES = {  # after the architecture's name -> config.json's key
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_GPT2_SIZES = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
}
_WITHOUT_EFFECT = ("tensor_data_layout", "rope.scaling.finetuned")
_GEMMA3_27B_LAYERS = 62  # by which llama.cpp recognises the size that scales queries by hidden size / heads

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_BLOCK = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_MATRICES = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def config_dict(file: GgufFile) -> dict[str, Any]:
    """What ``config.json`` would be: ``ModelConfig.from_hf`` reads it.

    Raises:
        ValueError: an architecture or a setting that is not supported, or a key that is missing.
    """
    arch = _architecture(file)
    prefix = f"{arch}."
    keys = ConfigReader(
        {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}, arch
    )
    config: dict[str, Any] = {"model_type": MODEL_TYPES[arch], "dtype": _dtype(file)}
    config |= {theirs: keys.size(key) for key, theirs in (_GPT2_SIZES if arch == "gpt2" else _SIZES).items()}
    embedding = file.tensors.get("token_embd.weight")
    config["vocab_size"] = keys.size("vocab_size", embedding.shape[0] if embedding is not None else 0)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > config["vocab_size"]:
        raise ValueError(f"tokenizer.ggml.tokens has {len(tokens)} tokens, the model {config['vocab_size']}")
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config |= _special_ids(file)
    if arch == "gpt2":
        config["layer_norm_epsilon"] = keys.number("attention.layer_norm_epsilon")
        keys.only(**{"attention.head_count_kv": config["n_head"]})
    else:
        config["num_key_value_heads"] = keys.size("attention.head_count_kv", config["num_attention_heads"])
        config["rms_norm_eps"] = keys.number("attention.layer_norm_rms_epsilon")
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors and arch != "qwen2"  # Qwen2 always has biases
        if arch == "llama":
            config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
        config |= _head_and_rope(file, keys, arch, config)
    if arch == "gemma3":
        config |= _gemma3(keys, config)
    keys.only(**{"attention.causal": True})
    left = [key for key in keys.unread() if keys.value(key) and key not in _WITHOUT_EFFECT]
    if left:
        raise ValueError(f"{prefix}{left[0]}={keys.value(left[0])!r} is not supported")
    return config


def list_tensors(file: GgufFile) -> list[GgufTensor]:
    """All tensors, with the names and shapes of a transformers checkpoint; an unknown name is left as it is."""
    arch = _architecture(file)
    outer, block = {"gpt2": (_GPT2_OUTER, _GPT2_BLOCK), "gemma3": (_OUTER, _GEMMA3_BLOCK)}.get(arch, (_OUTER, _BLOCK))
    layers = "transformer.h" if arch == "gpt2" else "model.layers"
    tensors = []
    for name, tensor in file.tensors.items():
        if name == "rope_freqs.weight" and arch == "llama":
            continue  # part of the config
        stem, _, kind = name.rpartition(".")
        where, _, part = stem.removeprefix("blk.").partition(".")
        if stem in outer:
            tensor = replace(tensor, name=f"{outer[stem]}.{kind}")
        elif stem.startswith("blk.") and part in block:
            tensor = replace(tensor, name=f"{layers}.{where}.{block[part]}.{kind}")
        if arch == "llama" and part in ("attn_q", "attn_k"):
            heads: Any = file.metadata.get("llama.attention.head_count")
            if part == "attn_k":
                heads = file.metadata.get("llama.attention.head_count_kv", heads)
            tensor = replace(tensor, change=partial(_in_halves, heads=heads, rows=tensor.shape[0]))
        elif arch == "gemma3" and name.endswith("norm.weight"):
            tensor = replace(tensor, change=partial(torch.sub, other=1.0))
        elif arch == "gpt2" and part in _GPT2_MATRICES and kind == "weight":
            tensor = replace(tensor, shape=tensor.shape[::-1], change=Tensor.t)
        tensors.append(tensor)
    return tensors


def _architecture(file: GgufFile) -> str:
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in MODEL_TYPES:
        raise ValueError(f"general.architecture={arch!r}: must be one of {', '.join(MODEL_TYPES)}")
    if (kind := file.metadata.get("general.type", "model")) != "model":
        raise ValueError(f"general.type={kind!r} is not supported; only 'model' is")
    if (parts := file.metadata.get("split.count", 1)) not in (0, 1):
        raise ValueError(f"split.count={parts!r}: a model in several files is not supported; merge them (gguf-split)")
    return arch


def _dtype(file: GgufFile) -> str:
    """float16 or bfloat16 if all matrices are stored in it, else float32, to which quantised ones are dequantised."""
    types = {tensor.tensor_type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return {"F16": "float16", "BF16": "bfloat16"}.get("".join(types), "float32")


def _special_ids(file: GgufFile) -> dict[str, Any]:
    """As in llama.cpp, the tokens for the end of a turn (EOT) and of a message (EOM) end an answer, like EOS."""
    bos, *ends = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom"))
    ends = [end for i, end in enumerate(ends) if end is not None and end not in ends[:i]]
    return {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def _head_and_rope(file: GgufFile, keys: ConfigReader, arch: str, config: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = keys.size_or_none("attention.key_length")
    if head_dim is None and hidden % heads:
        raise ValueError(f"{arch} lacks attention.key_length, and {hidden} is not a multiple of {heads} heads")
    head_dim = head_dim or hidden // heads
    keys.only(**{"attention.value_length": head_dim})
    found: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10_000.0)}
    if arch != "qwen2":  # whose config has no such key
        found["head_dim"] = head_dim
    elif head_dim * heads != hidden:
        raise ValueError(f"qwen2 attention.key_length={head_dim}: must be {hidden} / {heads}")
    if (rotated := keys.size("rope.dimension_count", head_dim, most=head_dim)) != head_dim:
        found["partial_rotary_factor"] = rotated / head_dim
    # Without a type, a factor is linear, as in llama.cpp; scale_linear is the factor's old name.
    kind, old_factor = keys.value("rope.scaling.type", "linear"), keys.number("rope.scale_linear", 1.0)
    factor = keys.number("rope.scaling.factor", old_factor)
    if kind == "linear" and factor != 1:
        found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        length = keys.value("rope.scaling.original_context_length")
        found["rope_scaling"] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        for key, theirs in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (value := keys.value(f"rope.scaling.{key}")) is not None:
                found["rope_scaling"][theirs] = value
    elif kind not in ("none", "linear"):
        raise ValueError(f"{arch}.rope.scaling.type={kind!r}: must be one of none, linear, yarn")
    if arch == "llama" and "rope_freqs.weight" in file.tensors:
        llama3 = _llama3_scaling(file.tensors["rope_freqs.weight"], found["rope_theta"], head_dim)
        if llama3 and "rope_scaling" in found:
            raise ValueError(
                f"rope_freqs.weight (Llama 3's scaling) together with {found['rope_scaling']} is not supported"
            )
        found |= {"rope_scaling": llama3} if llama3 else {}
    return found


def _gemma3(keys: ConfigReader, config: dict[str, Any]) -> dict[str, Any]:
    heads, hidden, layers = config["num_attention_heads"], config["hidden_size"], config["num_hidden_layers"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if layers == _GEMMA3_27B_LAYERS else config["head_dim"],
        "sliding_window": keys.size("attention.sliding_window"),
        "sliding_window_pattern": keys.size("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": keys.value("final_logit_softcapping"),
        "attn_logit_softcapping": keys.value("attn_logit_softcapping"),
    }


def _llama3_scaling(stored: GgufTensor, theta: float, dim: int) -> dict[str, Any] | None:
    """The ``rope_scaling`` of Llama 3.1 and later that gives the stored factors; None if all of them are 1.

    The file holds only a divisor for each frequency. These models differ in ``factor`` alone, which is the largest
    divisor; the other parameters are constants.

    Raises:
        ValueError: the factors are not those of Llama 3's scaling.
    """
    if stored.shape != (dim // 2,):
        raise ValueError(f"{stored.name} is {list(stored.shape)}, not [{dim // 2}]")
    factors = stored.read().double()
    low, high, length, factor = 1.0, 4.0, 8192, round(factors.max().item(), 3)
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    share = ((length / wavelengths - low) / (high - low)).clamp(0, 1)  # 1: a short wave, which stays as it is
    if not factor > 0 or not torch.allclose(factors, 1 / ((1 - share) / factor + share), rtol=1e-3):
        raise ValueError(f"{stored.name} {factors.tolist()}: not the factors of Llama 3's scaling by {factor}")
    if factor == 1:
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def _in_halves(tensor: Tensor, heads: int, rows: int) -> Tensor:
    """Reorder the rows of each head: transformers rotates row i with i + D/2, llama.cpp 2i with 2i + 1.

    Args:
        tensor: the rows of all heads or, for a rank's part, of some.
        heads: of the whole matrix.
        rows: of the whole matrix.
    """
    return tensor.reshape(-1, rows // heads // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

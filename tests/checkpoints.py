"""Tiny random checkpoints, saved by transformers, of every family: odd widths on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 1003
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_ROPE_FAMILY: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 272,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
}
GEMMA = {"query_pre_attn_scalar": 37, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0}
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
# transformers multiplies experts only if their rows are a multiple of 16 bytes.
_EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 44}
_MLA_FAMILY: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 272,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 12,
    "v_head_dim": 14,
    "max_position_embeddings": 512,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
}
DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "mscale": 0.9,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 64,
}
# name -> (model_type, settings, save_pretrained options)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 192, "n_head": 6, "n_layer": 3, "n_positions": 512}, {}),
    "gpt2-untied": (
        "gpt2",
        {"n_embd": 96, "n_head": 4, "n_layer": 2, "n_positions": 512, "n_inner": 150, "tie_word_embeddings": False},
        {},
    ),
    "llama2": ("llama", {**_ROPE_FAMILY, "num_key_value_heads": 6}, {"max_shard_size": "400KB"}),
    "llama3": ("llama", {**_ROPE_FAMILY, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}, {}),
    "llama-biased": ("llama", {**_ROPE_FAMILY, "attention_bias": True, "mlp_bias": True, "head_dim": 80}, {}),
    "mistral": ("mistral", {**_ROPE_FAMILY, "sliding_window": 13, "head_dim": 80}, {}),
    "qwen2": ("qwen2", {**_ROPE_FAMILY, "tie_word_embeddings": True}, {"max_shard_size": "400KB"}),
    "qwen2-window": (
        "qwen2",
        {**_ROPE_FAMILY, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
        {},
    ),
    "qwen3": ("qwen3", {**_ROPE_FAMILY, "tie_word_embeddings": True}, {}),
    "olmo2": ("olmo2", {**_ROPE_FAMILY, "tie_word_embeddings": True}, {"max_shard_size": "400KB"}),
    "olmo3": ("olmo3", {**_ROPE_FAMILY, "sliding_window": 13, "layer_types": MIXED_LAYERS}, {}),
    "smollm3": (
        "smollm3",
        {**_ROPE_FAMILY, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 13},
        {},
    ),
    "granite": (
        "granite",
        {
            **_ROPE_FAMILY,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.31,
            "residual_multiplier": 0.7,
            "logits_scaling": 5.0,
            "attention_bias": True,
        },
        {},
    ),
    "gemma": ("gemma", {**_ROPE_FAMILY, "hidden_act": "gelu"}, {}),
    "gemma2": ("gemma2", {**_ROPE_FAMILY, "sliding_window": 11, **GEMMA}, {"max_shard_size": "400KB"}),
    "gemma3": (
        "gemma3_text",
        {**_ROPE_FAMILY, "sliding_window": 13, "layer_types": MIXED_LAYERS, **GEMMA, "attn_logit_softcapping": None},
        {},
    ),
    "phi3": ("phi3", {**_ROPE_FAMILY, "sliding_window": 15, "partial_rotary_factor": 0.75}, {}),
    "gpt-oss": (
        "gpt_oss",
        {
            **_ROPE_FAMILY,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "swiglu_limit": 0.9,
            "sliding_window": 13,
            "layer_types": MIXED_LAYERS,
        },
        {"max_shard_size": "400KB"},
    ),
    "mixtral": (
        "mixtral",
        {**_ROPE_FAMILY, "intermediate_size": 52, "num_local_experts": 5, "sliding_window": 13},
        {"max_shard_size": "400KB"},
    ),
    "qwen2-moe": (
        "qwen2_moe",
        {
            **_ROPE_FAMILY,
            **_EXPERTS,
            "shared_expert_intermediate_size": 70,
            "use_sliding_window": True,
            "sliding_window": 11,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
        {},
    ),
    "qwen3-moe": ("qwen3_moe", {**_ROPE_FAMILY, **_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]}, {}),
    "deepseek2": ("deepseek_v2", {**_MLA_FAMILY}, {"max_shard_size": "400KB"}),
    "deepseek2-yarn": (
        "deepseek_v2",
        {**_MLA_FAMILY, "q_lora_rank": 34, "rope_parameters": DEEPSEEK_YARN, "attention_bias": True, "v_head_dim": 26}
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        {},
    ),
    "deepseek3": (
        "deepseek_v3",
        {**_MLA_FAMILY, "q_lora_rank": 34, "rope_parameters": DEEPSEEK_YARN, "n_group": 4, "topk_group": 2},
        {"max_shard_size": "400KB"},
    ),
    "deepseek3-plain": (
        "deepseek_v3",
        {**_MLA_FAMILY, "rope_interleave": False, "n_group": 1, "topk_group": 1, "tie_word_embeddings": True},
        {},
    ),
    "qwen3-untied": ("qwen3", {**_ROPE_FAMILY, "head_dim": 80, "attention_bias": True}, {"max_shard_size": "400KB"}),
}


def save_random_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A checkpoint of family ``name`` under ``folder``, with some settings changed.

    Wide weights (std 0.15): argmax has no near ties.
    """
    model_type, settings, save_options = FAMILIES[name]
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    settings = {"vocab_size": VOCAB, "initializer_range": 0.15, **special, **settings, **changes}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():  # biases and norms too: a weight that is ignored must change the tokens
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    for buffer_name, buffer in model.named_buffers():  # a weight of DeepSeek-V3, zero at first
        if buffer_name.endswith("correction_bias"):
            buffer += 0.2 * torch.randn_like(buffer)
    path = folder / name
    model.save_pretrained(path, **save_options)
    return path


def save_tokenizer(path: Path) -> None:
    """A byte-level BPE of at most VOCAB tokens beside the weights in ``path``; ids 0 and 1 are special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|turn|>"],
        show_progress=False,
    )
    letters = "abcdefghijklmnopqrstuvwxyz"
    backend.train_from_iterator([f"{a}{b} {b}{a}" for a in letters for b in letters], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m.role }} {{ m.content }}{% endfor %}<|turn|>"
    tokenizer.save_pretrained(path)


def save_llama_tokenizer(path: Path) -> dict[str, int]:
    """A tokenizer of Llama 2's kind in ``path``: a space is put before a text and stripped from what is decoded.

    Returns its vocabulary: <unk>, <s>, </s>, 256 bytes, a space, ASCII, and three longer pieces.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*map(chr, range(0x21, 0x7F)), "▁t", "he", "▁the"]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[("▁", "t"), ("h", "e"), ("▁t", "he")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(path)
    return tokenizer.get_vocab()

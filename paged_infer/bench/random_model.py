"""A checkpoint of random weights, for measurements that need a shape and no sense."""

from __future__ import annotations

from pathlib import Path


def save_random_decoder(folder: Path, max_position_embeddings: int, seed: int = 0) -> Path:
    """A Qwen3 of the storyteller's shape (3M parameters, no tokenizer) that takes longer texts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder

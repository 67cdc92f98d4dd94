"""Absurd sizes in a config or in a GGUF's metadata are refused at once, with their name and limit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import random_model, save_gguf

from paged_infer.kernels.cpu import large_pages
from paged_infer.model.config import ModelConfig
from paged_infer.model.loading import load, quantised
from paged_infer.model.loading.checkpoint import check_size
from paged_infer.model.loading.gguf_file import GgufFile, read_gguf
from paged_infer.model.loading.gguf_model import config_dict, list_tensors
from paged_infer.model.loading.load import load_decoder

SIZES = {
    "qwen3-moe": (
        *("num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "intermediate_size", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "hidden_size", "num_hidden_layers"),
    ),
    "deepseek3": (
        *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts"),
        *("n_shared_experts", "n_group", "topk_group", "num_experts_per_tok", "moe_intermediate_size"),
    ),
    "gpt-oss": ("num_local_experts", "intermediate_size", "head_dim", "num_attention_heads"),
    "gpt2": ("n_embd", "n_head", "n_layer"),
}


@pytest.fixture(autouse=True)
def nothing_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a layout (with an entry for each expert) is built or memory is allocated: sizes are refused before."""

    def refuse(*args: Any) -> Any:
        pytest.fail("a layout was made")

    for module in (load, quantised):
        monkeypatch.setattr(module, "checkpoint_layout", refuse)
    monkeypatch.setattr(large_pages, "to_empty_in_large_pages", refuse)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as error:
        load_decoder(path, torch.float32, **options)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.fixture
def with_config(checkpoint, tmp_path):
    """A checkpoint of the family with one key of its config changed."""

    def change(family: str, key: str, value: Any) -> Path:
        folder = tmp_path / family
        if not folder.exists():
            shutil.copytree(checkpoint(family), folder)
        raw = json.loads((checkpoint(family) / "config.json").read_text())
        assert key in raw
        (folder / "config.json").write_text(json.dumps({**raw, key: value}))
        return folder

    return change


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, keys in SIZES.items() for key in keys])
def test_a_count_of_a_billion_zero_below_zero_or_not_whole_is_refused_by_name(family, key, with_config) -> None:
    for value in (10**9, 10**30, -1, 1.5, "8", True, *([0] if key != "num_local_experts" else [])):
        message = refusal(with_config(family, key, value))
        assert key in message and repr(value) in message, value
        assert any(limit in message for limit in ("must be", "not a multiple of", "only"))


@pytest.mark.parametrize(
    ("family", "key", "value"), [("qwen3-moe", "num_local_experts", 60_000), ("gpt2", "n_head", 192)]
)
def test_sizes_within_the_limits_are_held_to_the_number_of_stored_elements(family, key, value, with_config) -> None:
    folder = with_config(family, key, value)
    if family == "gpt2":  # the same number of parameters in smaller heads: the layout is built
        with pytest.raises(pytest.fail.Exception, match="a layout was made"):
            load_decoder(folder, torch.float32)
    else:
        assert "the config's sizes amount to" in refusal(folder)
        assert "the config's sizes amount to" in refusal(folder, quantization="w8a16")


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory) -> GgufFile:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    save_gguf(path, random_model("llama"))
    return read_gguf(path)


@pytest.mark.parametrize(
    "key",
    [
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
        *("attention.head_count_kv", "attention.key_length", "rope.dimension_count"),
    ],
)
def test_a_gguf_with_such_a_count_is_refused_by_name(key, llama_gguf) -> None:
    for value in (2**32 - 1, 10**9, 0, -1, 1.5, "8", True):
        if key == "context_length" and value == 10**9:
            continue  # a limit on the tokens of a text, not a size of the weights
        file = replace(llama_gguf, metadata={**llama_gguf.metadata, f"llama.{key}": value})
        with pytest.raises(ValueError, match=r"must be|multiple of|only") as error:
            check_size(ModelConfig.from_hf(config_dict(file)), [*list_tensors(file)], "file")
        assert repr(value) in str(error.value)

"""A model by its shape alone: as many weights as its card says, and the bytes that the engine's own cache takes."""

from __future__ import annotations

import pytest
from checkpoints import save_random_checkpoint

from paged_infer import LLM
from paged_infer.bench.floor import ModelCost
from paged_infer.cache.spec import kv_bytes_per_token
from paged_infer.simulation.shapes import SHAPES, ModelShape

MILLIONS = {
    "qwen3-0.6b": 596,
    "qwen3-8b": 8191,
    "qwen3-32b": 32762,
    "qwen2-7b": 7616,
    "llama-3.1-8b": 8030,
    "llama-3.1-70b": 70554,
    "qwen3-30m": 29,
    "qwen3-3m": 3,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_its_model(name):
    """Counts as their model cards give them: 0.6 (596 million), 8.2, 32.8, 7.6, 8.03 and 70.6 billion."""
    shape = ModelShape.named(name)
    assert round(shape.config.num_parameters / 1e6) == MILLIONS[name]
    parts = shape.layer_weights + shape.head_weights + shape.embedding_weights
    assert parts == shape.config.num_parameters


@pytest.mark.parametrize("kind", ["auto", "int8"])
@pytest.mark.parametrize("name", ["storyteller", "storyteller-moe", "storyteller-steps", "deepseek2"])
def test_a_shape_counts_what_the_engine_counts(name, kind, tmp_path):
    model = save_random_checkpoint(name, tmp_path) if name == "deepseek2" else name  # latents, and experts in one layer
    llm = LLM(model, num_blocks=8, kv_cache_dtype=kind)
    shape, decoder = ModelShape.named(str(llm.folder)), llm.engine.decoder
    element_bytes = shape.kv_element_bytes(kind, 4)
    engine_bytes = kv_bytes_per_token(decoder.kv_spec(kind))
    assert shape.kv_elements * shape.config.num_layers * element_bytes == pytest.approx(engine_bytes)
    cost = ModelCost.of(decoder)
    assert cost.weight_bytes == 4 * (shape.layer_weights + shape.head_weights)
    assert cost.head_flops == 2 * shape.head_weights
    assert [one.flops for one in cost.layers] == [shape.attention_flops] * shape.config.num_layers


def test_a_batch_reads_more_experts_than_a_token():
    shape = ModelShape.named(str(LLM("storyteller-moe", num_blocks=8).folder))
    experts = shape.layer_weights + shape.config.moe.idle_parameters(shape.config.hidden_size)
    assert shape.layer_weights_read(1) == pytest.approx(shape.layer_weights)
    assert shape.layer_weights < shape.layer_weights_read(4) < shape.layer_weights_read(1000) <= experts


def test_an_unknown_shape_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"model 'llama-9': .*qwen3-0\.6b, .*llama-3\.1-8b"):
        ModelShape.named("llama-9")
    with pytest.raises(ValueError, match="kv_cache_dtype='int3': must be one of auto"):
        ModelShape.named("qwen3-8b").kv_element_bytes("int3", 2)

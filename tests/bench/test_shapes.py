"""Shapes without weights: the sizes that their names say, random weights that transformers shares, and no file read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save_random_checkpoint

from paged_infer import LLM
from paged_infer.bench.peers.transformers_peers import transformers_model, transformers_peers
from paged_infer.bench.shapes import folder_of
from paged_infer.bench.speed.baselines import our_baselines
from paged_infer.bench.workloads import random_lengths
from paged_infer.model.config import ModelConfig


def test_a_shape_is_written_for_the_time_it_is_used():
    with folder_of("qwen3-30m", "dummy") as folder:
        assert ModelConfig.from_pretrained(Path(folder)).hidden_size == 512
    with pytest.raises(ValueError, match=r"no config\.json"):
        ModelConfig.from_pretrained(Path(folder))


@pytest.fixture(scope="module")
def dummy(tmp_path_factory):
    """A random engine over a config.json alone, of the family with the most kinds of tensors."""
    folder = save_random_checkpoint("qwen3-untied", tmp_path_factory.mktemp("dummy"))
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    return LLM(folder, load_format="dummy", num_blocks=64, device="cpu")


def test_dummy_weights_come_from_the_seed_and_need_no_file(dummy):
    again, other = (LLM(dummy.folder, load_format="dummy", num_blocks=64, device="cpu", seed=seed) for seed in (0, 1))
    pairs = zip(dummy.engine.decoder.parameters(), again.engine.decoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(other.engine.decoder.embedding.weight, dummy.engine.decoder.embedding.weight)
    matrix = dummy.engine.decoder.layers[0].mlp.up.weight
    assert matrix.std().item() == pytest.approx(0.02, rel=0.05)


def test_transformers_computes_on_the_very_tensors_of_the_engine(dummy):
    model = transformers_model(dummy)
    ours, theirs = dummy.engine.decoder.embedding.weight, model.get_input_embeddings().weight
    assert theirs.data_ptr() == ours.data_ptr()


def test_every_rung_and_peer_agrees_on_random_weights(dummy):
    workload = random_lengths(dummy, num_requests=3, shortest=3, longest=9, seed=0)
    contenders = {**our_baselines(dummy), **transformers_peers(dummy)}
    said = {name: contender(workload).token_ids for name, contender in contenders.items()}
    assert len(said) == 7
    assert all(token_ids == said["transformers"] for token_ids in said.values())


def test_generate_batch_says_when_each_token_came(dummy):
    workload = random_lengths(dummy, num_requests=2, shortest=3, longest=6, seed=0)
    run = transformers_peers(dummy)["transformers generate_batch"](workload)
    assert [len(one.token_s) for one in run.times] == [one.max_tokens for one in workload.params]
    assert all(0 < one.ttft_s <= one.latency_s <= run.seconds for one in run.times)


def test_a_request_that_generate_batch_loses_is_an_error_and_no_number(dummy, monkeypatch):
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    get_result = ContinuousBatchingManager.get_result

    def failing(self, *arguments, **options):
        result = get_result(self, *arguments, **options)
        if result is not None:
            result.error = "out of pages"
        return result

    monkeypatch.setattr(ContinuousBatchingManager, "get_result", failing)
    workload = random_lengths(dummy, num_requests=2, shortest=3, longest=4, seed=0)
    with pytest.raises(ValueError, match=r"2 of 2 requests failed.*out of pages"):
        transformers_peers(dummy)["transformers generate_batch"](workload)

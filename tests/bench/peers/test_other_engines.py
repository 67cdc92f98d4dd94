"""Other engines live in processes of their own; stand-ins with their public interfaces take their places here."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import save_random_checkpoint
from safetensors.torch import load_file

from paged_infer import LLM
from paged_infer.bench.peers.other_engines import PeerOptions, engine_peers
from paged_infer.bench.peers.saved_weights import save_for_peers
from paged_infer.bench.workloads import one_request
from paged_infer.model.loading.load import checkpoint_views

STAND_IN = """
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos{extra}):
        self.temperature, self.max_tokens, self.ignore_eos = temperature, max_tokens, ignore_eos
"""
NANO = (
    STAND_IN.format(extra="")
    + """
class LLM:
    def __init__(self, folder, max_model_len, max_num_seqs, gpu_memory_utilization):
        if folder == "broken":
            raise RuntimeError("no such weights")
    def generate(self, prompts, params, use_tqdm):
        assert all(one.temperature > 1e-10 for one in params), "greedy sampling is not permitted"
        return [{"text": "", "token_ids": prompt[:1] * one.max_tokens} for prompt, one in zip(prompts, params)]
"""
)
VLLM = (
    STAND_IN.format(extra=", detokenize")
    + """
from types import SimpleNamespace as Some
class LLM:
    def __init__(self, folder, **options):
        self.options = options
    def generate(self, prompts, params, use_tqdm):
        stats = Some(first_token_latency=0.25, first_token_ts=100.0, last_token_ts=101.5)
        return [
            Some(prompt_token_ids=prompt["prompt_token_ids"], metrics=stats,
                 outputs=[Some(token_ids=tuple(prompt["prompt_token_ids"][:1] * one.max_tokens))])
            for prompt, one in zip(prompts, params)
        ]
"""
)


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    for name, source in (("nanovllm", NANO), ("vllm", VLLM)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))  # a spawned process takes this process's path over


def options(folder: str = "somewhere") -> PeerOptions:
    return PeerOptions(folder, "bfloat16", 64, 8, 0.4)


def test_peers_answer_from_their_own_processes_again_and_again(stand_ins):
    workload = one_request(1003, 5, 4, seed=0)
    with engine_peers(["nano-vllm", "vllm"], options()) as peers:
        for _ in range(2):
            runs = {name: peer(workload) for name, peer in peers.items()}
    expected = [workload.prompts[0][:1] * 4]
    assert {name: run.token_ids for name, run in runs.items()} == {"nano-vllm": expected, "vllm": expected}
    (timed,) = runs["vllm"].times
    assert (timed.ttft_s, timed.latency_s, timed.tpot_s, timed.num_prompt) == (0.25, 1.75, 0.5, 5)
    (silent,) = runs["nano-vllm"].times
    assert (silent.token_s, silent.num_tokens) == ([], 4)


def test_a_peer_that_does_not_start_is_one_line_with_its_own_words(stand_ins):
    with (
        pytest.raises(ValueError, match=r"^peer nano-vllm failed: RuntimeError: no such weights$"),
        engine_peers(["nano-vllm"], options("broken")),
    ):
        pass


def test_a_peer_that_is_not_installed_is_named_with_its_module():
    with pytest.raises(ValueError, match=r"mini-sglang.*'minisgl'"), engine_peers(["mini-sglang"], options()):
        pass


def test_random_weights_are_saved_as_the_checkpoint_that_peers_load(tmp_path):
    folder = save_random_checkpoint("qwen3", tmp_path)
    llm = LLM(folder, load_format="dummy", num_blocks=8, device="cpu")
    saved = save_for_peers(llm, tmp_path / "peers")
    stored = load_file(f"{saved}/model.safetensors")
    views = checkpoint_views(llm.engine.decoder)
    assert stored.keys() == views.keys()
    assert all(torch.equal(stored[name], views[name]) for name in views)
    loaded = LLM(saved, num_blocks=8, device="cpu")
    assert torch.equal(loaded.engine.decoder.embedding.weight, llm.engine.decoder.embedding.weight)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"


def test_a_checkpoint_with_weights_is_given_to_peers_as_it_is(llm, tmp_path):
    assert save_for_peers(llm, tmp_path) == str(llm.folder)

"""Claims about the storyteller with experts: an ordinary checkpoint, as good as the dense one, all experts in use."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from paged_infer import LLM, SamplingParams
from paged_infer.baselines import generate_cached, generate_naive, generate_static
from paged_infer.cli import app
from paged_infer.quantize import quantize
from paged_infer.storyteller import DRAFT_PATH, MOE_PATH, PATH, evaluate, tell
from paged_infer.storyteller.evaluation import document
from paged_infer.storyteller.stories.grammar import FIRST_EVALUATION_SEED

NUM_EXPERTS, TOP_K = 8, 2
PROMPTS = [
    "Once upon a time",
    "A story about Mia and a kite.\n",
    "<|endoftext|>",
    "One morning Tom found a red key. He",
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SMALL = {"device": "cpu", "max_num_seqs": 8, "num_blocks": 128}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("storyteller-moe", device="cpu", trace=True)


def tokens(outputs: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    """The greedy tokens of each prompt, in an engine that has nothing else to do."""
    return [tokens(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in PROMPTS]


def test_the_folder_is_under_twelve_megabytes_and_has_the_dense_model_s_tokenizer() -> None:
    assert sum(file.stat().st_size for file in MOE_PATH.iterdir()) < 12_000_000
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (MOE_PATH / name).read_text() == (PATH / name).read_text()


def test_transformers_loads_it_as_any_qwen3_moe_and_says_the_same(llm: LLM, alone: list[list[int]]) -> None:
    config = json.loads((MOE_PATH / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe" and config["dtype"] == "float32"
    model, report = AutoModelForCausalLM.from_pretrained(MOE_PATH, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for prompt, ours in zip(PROMPTS[:3], alone, strict=False):
        ids = torch.tensor([llm.tokenizer.encode(prompt)])
        options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
        # min_new_tokens forbids the end token to transformers, so compare up to where ours has it.
        theirs = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
        end = ours.index(0) if 0 in ours else len(ours)
        assert ours[:end] == theirs[:end] and end > 8


@pytest.mark.parametrize("baseline", [generate_naive, generate_cached, generate_static])
def test_every_baseline_says_what_the_engine_says(baseline: Any, llm: LLM, alone: list[list[int]]) -> None:
    assert tokens(baseline(llm, PROMPTS, GREEDY)) == alone


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_backend": "torch", "block_size": 3, "max_num_batched_tokens": 7},
        {"block_size": 4, "num_blocks": 24},
        {"speculative_config": {"method": "draft_model", "model": str(DRAFT_PATH), "num_speculative_tokens": 3}},
    ],
    ids=["default", "chunks of 7", "preempted", "drafts of the dense model's draft model"],
)
def test_a_crowd_changes_no_token(options: dict[str, Any], alone: list[list[int]]) -> None:
    crowd = [story.text[:200] for story in map(tell, range(4))]
    outputs = LLM("storyteller-moe", **{**SMALL, **options}).generate([*crowd, *PROMPTS], GREEDY, use_tqdm=False)
    assert tokens(outputs[len(crowd) :]) == alone


def test_each_expert_of_each_layer_gets_its_share_of_the_tokens_of_stories() -> None:
    llm = LLM("storyteller-moe", device="cpu", trace=True)
    stories = [document(tell(FIRST_EVALUATION_SEED + index)) for index in range(16)]
    llm.generate(stories, SamplingParams(max_tokens=1), use_tqdm=False)
    load = torch.tensor(llm.trace.expert_load, dtype=torch.float64)  # [layers, E]
    of_even = load * NUM_EXPERTS / load.sum(dim=1, keepdim=True)
    assert load.shape == (6, NUM_EXPERTS)
    assert of_even.min() > 0.6 and of_even.max() < 1.4


def test_experts_have_become_different() -> None:
    up = LLM("storyteller-moe", **SMALL).engine.decoder.layers[2].mlp.experts.up.stacked()[0]
    likeness = torch.corrcoef(up.flatten(1))
    assert likeness.fill_diagonal_(0).abs().max() < 0.5


def test_it_remembers_what_the_dense_storyteller_does(llm: LLM) -> None:
    result = evaluate(llm, num_stories=20)
    assert result["recall"] >= 0.95
    assert result["perplexity"] <= 1.06 * result["grammar_perplexity"]


def test_its_name_is_a_model_s_name_wherever_one_is_asked_for(llm: LLM) -> None:
    assert llm.name == "storyteller-moe" and llm.is_storyteller
    same = LLM(MOE_PATH, **SMALL)
    assert same.name == "storyteller-moe" and LLM("storyteller", **SMALL).name == "storyteller"
    arguments = ["info", "storyteller-moe", "--stories", "1", "--device", "cpu", "--num-blocks", "64"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "storyteller-moe (qwen3_moe)" in shown.output and "recall" in shown.output


def test_in_8_bits_its_experts_tell_the_story_that_they_told(tmp_path) -> None:
    quantize("storyteller-moe", tmp_path / "out", scheme="w8a16")
    texts = [
        LLM(model, **SMALL).generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0].text
        for model in (MOE_PATH, tmp_path / "out")
    ]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="awq"):
        quantize("storyteller-moe", tmp_path / "refused", method="awq")

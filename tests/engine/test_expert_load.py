"""A trace counts the tokens of each expert, with and without CUDA graphs, and nothing is counted without a trace."""

from __future__ import annotations

import pytest
from captured import call_again, with_graphs

from paged_infer import SamplingParams
from paged_infer.control.trace import Trace
from paged_infer.viz.expert_load import expert_load_figure

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
NUM_EXPERTS, TOP_K = 6, 3  # of the family; its second layer of three has none


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_each_step_has_the_choices_of_its_tokens_and_padding_has_none(graphs, ahead, make_llm) -> None:
    llm = make_llm("qwen3-moe", trace=True, async_scheduling=ahead, attention_backend="torch")
    if graphs:  # three decodes run in the graph of four rows
        llm = with_graphs(llm, call_again)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert not graphs or llm.engine.executor.runner.graphs.num_replays
    for step in llm.trace.steps:
        assert [len(layer) for layer in step.expert_load] == [NUM_EXPERTS] * 2
        assert [sum(layer) for layer in step.expert_load] == [TOP_K * step.num_tokens] * 2
    total = llm.trace.expert_load
    assert [sum(layer) for layer in total] == [TOP_K * sum(step.num_tokens for step in llm.trace.steps)] * 2
    assert total[0] != total[1]


def test_nothing_is_counted_without_a_trace_or_without_experts(make_llm) -> None:
    assert make_llm("qwen3-moe").engine.decoder.expert_load is None
    llm = make_llm("qwen3", trace=True)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert llm.engine.decoder.expert_load is None and llm.trace.expert_load == []


def test_the_figure_shows_each_expert_s_load_in_each_layer(make_llm) -> None:
    llm = make_llm("qwen3-moe", trace=True)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    picture = expert_load_figure(llm.trace)
    (image,) = picture.axes[0].images
    shown, load = image.get_array(), llm.trace.expert_load
    assert shown.shape == (2, NUM_EXPERTS)
    assert shown[1].tolist() == pytest.approx([count * NUM_EXPERTS / sum(load[1]) for count in load[1]])
    assert image.norm(1) == 0.5  # an even load is white
    assert picture.png()
    with pytest.raises(ValueError, match="no tokens of experts"):
        expert_load_figure(Trace(8))

"""Claims about the rows that teach steps: whole documents, no held-out sum, and no empty thought where steps belong."""

import re
from functools import partial

import pytest
import torch
from transformers import AutoTokenizer

from paged_infer.storyteller import PATH
from paged_infer.storyteller.stories import lexicon
from paged_infer.storyteller.stories.sums import END_THINK, THINK, is_held_out
from paged_infer.storyteller.training import steps, train
from paged_infer.storyteller.training.export import export
from paged_infer.storyteller.training.steps import StepRows, SumMix

VALUES = {word: value for value, word in enumerate(lexicon.NUMBERS)}
NUMBER = "|".join(lexicon.NUMBERS)


@pytest.fixture(scope="module")
def tokenizer():
    return steps.beginning(0)[1]


def texts(tokenizer, mix, count=60, seed=0):
    """(text, tokens, weights) of rows."""
    rows = StepRows(tokenizer, seed)
    for _ in range(count):
        row, weights = rows.row(mix)
        assert len(weights) == len(row) - 1 and row[-1] == rows.end
        yield tokenizer.decode(row, skip_special_tokens=False), row, weights


def test_it_begins_as_the_storyteller_with_two_tokens_more():
    model, tokenizer = steps.beginning(3)
    first = train.Qwen3ForCausalLM.from_pretrained(PATH)
    assert [tokenizer.token_to_id(token) for token in (THINK, END_THINK)] == [1755, 1756]
    ids = torch.tensor([tokenizer.encode("Mia had three plums. Tom gave her four").ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :1755], first(ids).logits)
    assert tokenizer.decode(tokenizer.encode("<think>\nSo.\n</think>").ids) == "<think>\nSo.\n</think>"


def test_rows_in_parts_are_tokenized_like_the_whole(tokenizer):
    for text, row, _ in texts(tokenizer, SumMix(drills=0.2, sums=0.5, chat_stories=0.3)):
        assert tokenizer.encode(text).ids == row


def test_no_held_out_sum_is_trained_on(tokenizer):
    seen = 0
    for text, *_ in texts(tokenizer, SumMix(drills=0.0, sums=1.0), count=150):
        for story in re.findall(r"^(?:<\|endoftext\|>)?(\w+ had .*)$", text, flags=re.MULTILINE):
            first, *changes = story.split(". ")
            if "Q:" in story or ": " in story or not changes:
                continue  # a thought
            counts = [VALUES[re.search(rf" ({NUMBER}) ", first)[1]]]
            for change in changes:
                by = VALUES[re.search(rf" ({NUMBER}) ", change)[1]]
                counts.append(counts[-1] + (by if " more" in change else -by))
            assert not is_held_out(tuple(counts))
            seen += 1
    assert seen > 150


def test_the_sums_of_a_text_have_one_form_and_those_of_a_chat_think_last(tokenizer):
    kinds = dict.fromkeys(("alone", "in steps", "chat", "chat without thought"), 0)
    for text, *_ in texts(tokenizer, SumMix(drills=0.0, sums=1.0), count=100):
        answers = re.findall(r"^A:(.*)$", text, flags=re.MULTILINE)
        if THINK in text:
            assert answers[-1] == "" and not any(" is " in answer for answer in answers)
            kinds["chat" if " is " in text.split(THINK)[1] else "chat without thought"] += 1
        else:
            assert len({" is " in answer for answer in answers}) == 1
            kinds["in steps" if " is " in answers[0] else "alone"] += 1
    assert min(kinds.values()) > 12


def test_an_empty_thought_is_not_learned_for_a_sum_and_is_for_a_story(tokenizer):
    think = tokenizer.token_to_id(THINK)
    for mix, learned in ((SumMix(drills=0.0, sums=1.0), False), (SumMix(drills=0.0, sums=0.0, chat_stories=1.0), True)):
        empty = 0
        for text, row, weights in texts(tokenizer, mix):
            if f"{THINK}\n\n{END_THINK}" in text:
                empty += 1
                assert (weights[row.index(think) - 1] > 0) is learned
        assert empty > 10


def test_a_short_run_learns_and_leaves_a_model_that_shows_its_thoughts(tokenizer, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = train.new_model(tokenizer.get_vocab_size(), 0, shape | {"intermediate_size": 64})
    save = partial(export, chat_template=steps.CHAT_TEMPLATE)
    phases = [(20, SumMix(drills=0.0, sums=1.0, num_steps=(1,), most_sums=1))]
    log = train.fit(model, tokenizer, phases, tmp_path / "m", 0, 200, 10, 10, save=save, rows_of=StepRows)
    assert log[-1]["loss"] < log[0]["loss"]
    saved = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert saved.decode(saved.encode("<think>\nSo.\n</think>"), skip_special_tokens=True) == "<think>\nSo.\n</think>"
    assert saved.chat_template == steps.CHAT_TEMPLATE.read_text(encoding="utf-8")

"""The end of the reasoning is found however its marker is spelled, and what may come until then and behind it."""

from __future__ import annotations

import random

import pytest

from paged_infer.control.guided.grammar import GrammarError, NativeGrammar, mask_after, num_allowed
from paged_infer.control.guided.vocabulary import Vocabulary, allowed_ids
from paged_infer.control.reasoning import Part, ReasoningMatcher, ReasoningParser

EOS = 0
TEXTS = [
    None,
    b"<think>",
    b"</think>",
    b"<",
    b"/",
    b"th",
    b"ink",
    b">",
    b"</",
    b">y",
    b"ink>no",
    b"think>",
    b"a",
    b"yes",
]
TEXTS += [b"no", b" ", b"<th", b"o", b"n"]
WORDS = Vocabulary(TEXTS, [EOS], 40)
SPELLED = Vocabulary([None if text in (b"<think>", b"</think>") else text for text in TEXTS], [EOS], 40)  # in pieces
ID = {text: token_id for token_id, text in enumerate(TEXTS)}
YES_NO = NativeGrammar("choice", '["yes", "no", "<o"]', WORDS)


def parser(name: str = "deepseek_r1", vocabulary: Vocabulary = WORDS) -> ReasoningParser:
    return ReasoningParser(name, vocabulary, {})


def ids(text: str, vocabulary: Vocabulary = WORDS) -> list[int]:
    return vocabulary.split(text.encode())


def found(first: Part, token_ids: list[int]) -> tuple[Part, int]:
    """Part, and tokens before the content, from the text alone."""
    texts = [TEXTS[i] or b"" for i in token_ids]
    begin = 0
    if first is Part.OPENING:
        begin = next((n for n in range(len(texts) + 1) if b"".join(texts[:n]).startswith(b"<think>")), -1)
        if begin < 0:
            whole = b"".join(texts)
            is_open = b"<think>".startswith(whole) and b"" not in texts
            return (Part.OPENING if is_open else Part.CONTENT), 0
        texts = [b"".join(texts[:begin])[7:], *texts[begin:]]
        begin -= 1
    if first is Part.CONTENT:
        return Part.CONTENT, 0
    ends = (n for n in range(len(texts) + 1) if b"</think>" in b"".join(texts[:n]))
    end = next(ends, None)
    return (Part.REASONING, 0) if end is None else (Part.CONTENT, begin + end)


@pytest.mark.parametrize("first", Part)
def test_the_end_is_where_the_text_has_it_and_every_token_can_be_rolled_back(first: Part) -> None:
    rng, seen = random.Random(3), set()
    for _ in range(400):
        matcher = ReasoningMatcher(parser(), first, None, None)
        token_ids: list[int] = []
        for _ in range(12):
            if token_ids and rng.random() < 0.2:
                num = rng.randint(1, len(token_ids))
                matcher.rollback(num)
                del token_ids[len(token_ids) - num :]
            token_ids.append(rng.choices(range(len(TEXTS)), [9 if 0 < i < 9 else 1 for i in range(len(TEXTS))])[0])
            assert matcher.mask() is None and not matcher.constrains(1000)
            assert matcher.accept(token_ids[-1])
            state = matcher._states[-1]
            assert (state.part, state.num_before) == found(first, token_ids)
            seen.add((state.part, matcher.has_ended))
    assert (first is Part.CONTENT) == (len(seen) == 1)


@pytest.mark.parametrize(
    ("prompt", "qwen3", "deepseek_r1"),
    [
        ("a", Part.OPENING, Part.REASONING),
        ("a<think> ", Part.REASONING, Part.REASONING),
        ("a<think> </think> ", Part.CONTENT, Part.CONTENT),
        ("<think>a</think>no<think>a", Part.REASONING, Part.REASONING),
        ("<think>a</think>no|a", Part.OPENING, Part.REASONING),  # the markers are an earlier turn's
        ("<think>a|a</think>yes", Part.CONTENT, Part.CONTENT),
    ],
)
def test_the_last_turn_of_the_prompt_decides_how_an_answer_begins(prompt: str, qwen3: Part, deepseek_r1: Part) -> None:
    for vocabulary in (WORDS, SPELLED):
        token_ids = [i for turn in prompt.split("|") for i in [EOS, *ids(turn, vocabulary)]][1:]
        assert parser("qwen3", vocabulary).first_part(token_ids) is qwen3
        assert parser("deepseek_r1", vocabulary).first_part(token_ids) is deepseek_r1


def test_a_grammar_begins_after_the_reasoning_on_a_token_of_its_own() -> None:
    matcher = ReasoningMatcher(parser(), Part.REASONING, YES_NO.matcher, None)
    everything = set(range(len(TEXTS)))
    assert everything - set(allowed_ids(matcher.mask() or b"")) == {EOS}  # which would leave the answer out
    assert not matcher.accept(EOS)
    for token_id in ids("a</", SPELLED) + ids("th", SPELLED):
        assert matcher.accept(token_id)
    forbidden = {EOS, ID[b"ink>no"]}
    assert everything - set(allowed_ids(matcher.mask() or b"")) == forbidden  # it would begin the answer
    assert not matcher.accept(ID[b"ink>no"]) and matcher.accept(ID[b"ink"])
    assert everything - set(allowed_ids(matcher.mask() or b"")) == {EOS, ID[b">y"]}
    assert matcher.accept(ID[b">"]) and matcher.has_ended and matcher.num_reasoning_tokens == 5
    assert set(allowed_ids(matcher.mask() or b"")) == {ID[b"yes"], ID[b"no"], ID[b"n"], ID[b"<"]}
    assert not matcher.accept(ID[b"a"]) and not matcher.is_finished
    assert matcher.accept(ID[b"yes"]) and matcher.is_finished and matcher.has_content
    matcher.rollback(2)
    assert not matcher.has_ended and matcher.accept(ID[b">"]) and matcher.accept(ID[b"no"]) and matcher.is_finished


def test_drafts_that_end_the_reasoning_are_cut_where_the_grammar_forbids_them() -> None:
    matcher = ReasoningMatcher(parser(), Part.REASONING, YES_NO.matcher, None)
    drafts = [*ids("aa</think>"), ID[b"n"], ID[b"a"]]
    assert num_allowed(matcher, drafts) == 4
    assert allowed_ids(mask_after(matcher, drafts[:4]) or b"") == [ID[b"o"]]
    assert matcher.num_reasoning_tokens == 0 and matcher.constrains(0)


def test_an_opening_may_become_an_answer_without_reasoning() -> None:
    for spelled, start in ((WORDS, [ID[b"<think>"]]), (SPELLED, [ID[b"<"], ID[b"think>"]])):
        matcher = ReasoningMatcher(parser("qwen3", spelled), Part.OPENING, YES_NO.matcher, None)
        allowed = set(allowed_ids(matcher.mask() or b""))
        openers = {ID[b"<think>"], ID[b"<"], ID[b"<th"]} if spelled is WORDS else {ID[b"<"], ID[b"<th"]}
        assert allowed == {ID[b"yes"], ID[b"no"], ID[b"n"], *openers}
        for token_id in start:
            assert matcher.accept(token_id)
        assert matcher.accept(ID[b"a"]) and not matcher.has_content
        matcher.rollback(1 + len(start))
        assert not matcher.accept(ID[b"a"])
        assert matcher.accept(ID[b"<"])  # of "<think>" or of "<o"
        assert {ID[b"o"], ID[b"th"]} <= set(allowed_ids(matcher.mask() or b""))
        assert matcher.accept(ID[b"o"]) and matcher.is_finished and not matcher.has_ended
        matcher.rollback(2)
        assert matcher.accept(ID[b"<th"]) and allowed_ids(matcher.mask() or b"") == [ID[b"ink"]]


def test_a_spent_budget_forces_the_end_from_where_it_was_begun() -> None:
    for budget in range(4):
        for name, vocabulary in (("one token", WORDS), ("pieces", SPELLED)):
            matcher = ReasoningMatcher(parser(vocabulary=vocabulary), Part.REASONING, YES_NO.matcher, budget)
            for _ in range(budget):
                assert matcher.forced() == [] and matcher.accept(ID[b"a"])
            end = ids("</think>", vocabulary)
            assert matcher.forced() == end and (len(end) == 1) == (name == "one token")
            for token_id in end:
                assert not matcher.accept(ID[b"a"])
                assert allowed_ids(matcher.mask() or b"") == [token_id] and matcher.accept(token_id)
            assert matcher.num_reasoning_tokens == budget + len(end) and matcher.accept(ID[b"yes"])
    begun = ReasoningMatcher(parser(vocabulary=SPELLED), Part.REASONING, None, 2)
    assert begun.accept(ID[b"<"]) and begun.accept(ID[b"/"]) and begun.forced() == ids("think>", SPELLED)


def test_masks_are_only_computed_near_the_end_of_a_budget() -> None:
    matcher = ReasoningMatcher(parser("qwen3"), Part.REASONING, None, 5)
    assert [matcher.constrains(ahead) for ahead in (4, 5)] == [False, True]
    for token_id in [ID[b"a"], ID[b"a"]]:
        matcher.accept(token_id)
    assert [matcher.constrains(ahead) for ahead in (2, 3)] == [False, True]
    matcher.accept(ID[b"</think>"])
    assert not matcher.constrains(1000)


def test_a_marker_may_be_a_special_token() -> None:
    special = {"<think>": 1, "</think>": 2}
    one = ReasoningParser("qwen3", SPELLED, special)
    assert one.first_part([ID[b"a"], 1]) is Part.REASONING and one.rest_of_end(0) == [2]
    matcher = ReasoningMatcher(one, Part.OPENING, None, 0)
    assert matcher.accept(1) and allowed_ids(matcher.mask() or b"") == [2]


def test_a_vocabulary_that_cannot_spell_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="reasoning_parser='qwen3': no tokens of this tokenizer spell </think>"):
        ReasoningParser("qwen3", Vocabulary([b"a", b"<", b"/", b">"], [0], 4), {})


def test_no_marker_is_begun_that_no_tokens_can_finish() -> None:
    few = Vocabulary([None, b"<", b"</think>", b"yes", b"th"], [EOS], 8)
    matcher = ReasoningMatcher(
        parser("qwen3", few), Part.OPENING, NativeGrammar("choice", '["yes"]', few).matcher, None
    )
    assert allowed_ids(matcher.mask() or b"") == [3]
    other = NativeGrammar("choice", '["no"]', few)
    matcher = ReasoningMatcher(parser("qwen3", few), Part.OPENING, other.matcher, None)
    with pytest.raises(GrammarError, match="allows none of the vocabulary's tokens"):
        matcher.mask()

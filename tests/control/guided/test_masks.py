"""A mask holds exactly the tokens that may come next, also where a token is half a character or two strings."""

from __future__ import annotations

import json
import random
import re

import pytest

from paged_infer import storyteller
from paged_infer.control.guided.grammar import GrammarError, NativeGrammar, NativeMatcher, mask_after, num_allowed
from paged_infer.control.guided.vocabulary import Vocabulary, allowed_ids
from paged_infer.text.tokenizer import Tokenizer

SMALL = Vocabulary([None, b"a", b"b", b"ab", b"ba", b"\xc3", b"\xa9", b"\xc3\xa9a", b"a", None, b""], [0, 9], 40)
SCHEMA = {
    "properties": {
        "name": {"type": "string"},
        "mood": {"type": "string", "maxLength": 7},
        "age": {"type": "integer", "minimum": 7, "maximum": 110},
        "kind": {"enum": ["cat", "dog"]},
        "more": {},
    },
    "required": ["name", "age"],
}
GRAMMARS = [
    ("json", json.dumps(SCHEMA)),
    ("regex", r"(cat|dog)s? [0-9]{1,3}é*"),
    ("choice", '["yes", "yesterday", "né"]'),
]


@pytest.fixture(scope="module")
def told() -> Vocabulary:
    """The storyteller's."""
    tokenizer = Tokenizer.from_pretrained(storyteller.PATH)
    assert tokenizer is not None
    tokens = [None if tokenizer.is_silent(i) else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return Vocabulary(tokens, [0], len(tokens))


def one_by_one(matcher: NativeMatcher, vocabulary: Vocabulary) -> list[int]:
    return [i for i in range(len(vocabulary.tokens)) if num_allowed(matcher, [i])]


@pytest.mark.parametrize("pattern", ["a*b", "(ab)*é?", "é+a", "ba|b|é", "[^a]b?"])
def test_a_mask_is_what_brute_force_finds(pattern: str) -> None:
    grammar = NativeGrammar("regex", pattern, SMALL)
    for seed in range(20):
        matcher, rng, text = grammar.matcher(), random.Random(seed), b""
        while not matcher.is_finished and len(text) < 12:
            allowed = allowed_ids(matcher.mask())
            assert allowed == one_by_one(matcher, SMALL)
            is_match = bool(re.fullmatch(pattern, text.decode(errors="ignore")))
            assert (0 in allowed) == (9 in allowed) == (is_match and not text.endswith(b"\xc3"))
            token_id = rng.choice(allowed)
            matcher.accept(token_id)
            text += SMALL.tokens[token_id] or b""


@pytest.mark.parametrize(("kind", "text"), GRAMMARS, ids=["json", "regex", "choice"])
def test_a_mask_of_the_storyteller_is_what_brute_force_finds(told: Vocabulary, kind: str, text: str) -> None:
    grammar, rng = NativeGrammar(kind, text, told), random.Random(0)
    for _ in range(3):
        matcher = grammar.matcher()
        for _ in range(8):
            if matcher.is_finished:
                break
            allowed = allowed_ids(matcher.mask())
            assert allowed == one_by_one(matcher, told)
            matcher.accept(rng.choice(allowed))


def test_special_tokens_and_ids_beyond_the_tokenizer_are_never_allowed() -> None:
    matcher = NativeGrammar("regex", "(.|\n)*", SMALL).matcher()
    assert allowed_ids(matcher.mask()) == [0, 1, 2, 3, 4, 5, 7, 8, 9]  # not a9 alone, "" or 10 to 39
    assert len(matcher.mask()) == 8


def test_the_text_may_end_only_where_the_grammar_does() -> None:
    matcher = NativeGrammar("regex", "ab?", SMALL).matcher()
    assert not matcher.accept(0)
    assert matcher.accept(1) and not matcher.is_finished
    assert matcher.accept(9) and matcher.is_finished and not matcher.accept(2)
    matcher.rollback(1)
    assert matcher.accept(2) and matcher.is_finished  # nothing can follow b


def test_a_rollback_leads_to_the_same_masks() -> None:
    grammar = NativeGrammar("regex", "(a|ba)*é", SMALL)
    matcher, masks = grammar.matcher(), []
    for token_id in (1, 4, 1, 5):
        masks.append(matcher.mask())
        assert matcher.accept(token_id)
    for mask in reversed(masks):
        matcher.rollback(1)
        assert matcher.mask() == mask
    assert mask_after(matcher, [1, 4]) == masks[2] and matcher.mask() == masks[0]
    assert num_allowed(matcher, [1, 4, 6, 1]) == 2 and matcher.mask() == masks[0]
    with pytest.raises(ValueError, match="num_tokens=1: only 0 were accepted"):
        matcher.rollback(1)


def test_matchers_of_one_grammar_do_not_disturb_each_other() -> None:
    grammar = NativeGrammar("regex", "ab*", SMALL)
    one, other = grammar.matcher(), grammar.matcher()
    one.accept(1)
    assert allowed_ids(other.mask()) == [1, 3, 8] and 0 in allowed_ids(one.mask())


def test_forced_tokens_spell_the_only_continuation_and_change_nothing(told: Vocabulary) -> None:
    tokenizer = Tokenizer.from_pretrained(storyteller.PATH)
    assert tokenizer is not None
    matcher = NativeGrammar("json", json.dumps(SCHEMA), told).matcher()
    forced = matcher.forced()
    text = tokenizer.decode(forced)
    assert text == '{"name":' and tokenizer.decode(tokenizer.encode(text)) == text
    assert matcher.forced() == forced and num_allowed(matcher, forced) == len(forced)
    for token_id in forced:
        matcher.accept(token_id)
    assert matcher.forced() == []  # a space or none
    assert NativeGrammar("choice", '["yes", "yesterday"]', told).matcher().forced() == told.split(b"yes")


def test_a_vocabulary_without_the_needed_bytes_is_an_error_of_its_request() -> None:
    matcher = NativeGrammar("regex", "ax", SMALL).matcher()
    matcher.accept(1)
    with pytest.raises(GrammarError, match="allows none of the vocabulary's tokens"):
        matcher.mask()


def test_forgotten_states_change_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from paged_infer.control.guided import machine

    def masks() -> list[bytes]:
        matcher, found = NativeGrammar("regex", "(ab|b[^a]a){3,9}", SMALL).matcher(), []
        for token_id in (3, 2, 2, 1, 3, 3):
            found.append(matcher.mask())
            assert matcher.accept(token_id)
        return found

    expected = masks()
    monkeypatch.setattr(machine, "MAX_KEPT_STATES", 2)
    assert masks() == expected


def test_a_placeholder_is_not_the_last_token_of_the_vocabulary() -> None:
    """A draft that is not known yet is -1, and is never allowed."""
    vocabulary = Vocabulary([None, b"a"], [0], 2)
    matcher = NativeGrammar("regex", "a", vocabulary).matcher()
    assert not matcher.accept(-1) and matcher.accept(1)

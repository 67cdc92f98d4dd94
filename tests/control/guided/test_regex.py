"""A DFA accepts what Python's re matches, and nothing else; what is not supported is refused by name."""

from __future__ import annotations

import itertools
import re

import pytest

from paged_infer.control.guided.automaton import Automaton, limited
from paged_infer.control.guided.characters import ANY, Ranges, complement, in_json, intersection, ranges_of, utf8
from paged_infer.control.guided.network import Network
from paged_infer.control.guided.regex import regex_dfa


def accepts(dfa: Automaton, text: str) -> bool:
    state = 0
    for character in map(ord, text):
        after = [target for ranges, target in dfa.edges[state] if any(a <= character <= b for a, b in ranges)]
        if not after:
            return False
        (state,) = after  # a DFA: at most one
    return state in dfa.accepting


PATTERNS = [
    "", "a", "ab|a|b*", "(a|b)*a", "a{2}", "a{0}b", "a{1,}", "a{0,2}b{2,3}", "(ab?){2}", "a+?b*?", "(?:a|b)?a",
    "(?P<x>a)b", "^ab$", "[ab]", "[^a]", "[a-b-]+", r"\x61\u0062", r"a\.", r"[\]\-b]", "(a|)b", "((a)|b)+", "(a*)*",
    "(a*b*){2}", r"\.*", ".{2}",
]  # fmt: skip
TEXTS = ["".join(text) for size in range(6) for text in itertools.product("ab.]-"[: 5 if size < 4 else 2], repeat=size)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_accepts_what_re_matches(pattern: str) -> None:
    whole, searched = regex_dfa(pattern), regex_dfa(pattern, is_searched=True)
    for text in TEXTS:
        assert accepts(whole, text) == bool(re.fullmatch(pattern, text)), text
        assert accepts(searched, text) == bool(re.search(pattern, text)), text


def test_classes_hold_what_python_and_ecmascript_agree_on() -> None:
    def members(pattern: str, text: str) -> str:
        return "".join(character for character in text if accepts(regex_dfa(pattern), character))

    text = "a0_ é٣\u2003\n\u2028-"
    assert members(r"\d", text) == "0" and members(r"\D", text) == "a_ \n-"
    assert members(r"\w", text) == "a0_" and members(r"\W", text) == members(r"[^\w]", text) == " \n-"
    assert members(r"\s", text) == " \n" and members(r"\S", text) == members(r"[^\s]", text) == "a0_é٣-"
    assert members(".", text) == "a0_ é٣\u2003-"
    assert members(r"[^a\d]", text) == "_ \n-"  # \D beside a class escape is ASCII


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(a)\1", r"\1 is a backreference"),
        ("a(?=b)", "lookahead (?= is not supported"),
        ("a(?!b)", "negative lookahead"),
        ("(?<=b)a", "lookbehind"),
        ("(?<!b)a", "negative lookbehind"),
        ("(?i)a", "(?i is not supported"),
        (r"\bword", r"\b is an escape"),
        (r"\p{L}", r"\p is an escape"),
        ("a$b", "$ at 1"),
        ("(^a)", "^ at 1"),
        ("^a|b", "^ or $ next to |"),
        ("a++", "possessive"),
        ("a{2}{3}", "two quantifiers"),
        ("a{3,2}", "its maximum is below its minimum"),
        ("a{x}", "broken quantifier"),
        ("a{٣}", "broken quantifier"),
        ("*a", "nothing to repeat at 0"),
        ("(a", "missing )"),
        ("a)", "unbalanced )"),
        ("[a", "missing ]"),
        ("[]", "is empty"),
        ("[b-a]", "broken range"),
        ("a\\", "ends with a backslash"),
        ("\\xg0", "broken escape"),
        ("a{5000}", "more than 4096 states"),
        ("((a{20}){20}){20}", "more than 4096 states"),
        ("(a|b)*a(a|b){20}", "more than 4096 states"),
        ("(" * 200 + "a" + ")" * 200, "more than 100 nested groups"),
        ("a" * 40_000, "more than 32768 characters"),
    ],
)
def test_what_is_broken_unsupported_or_explodes_is_refused_with_the_pattern(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        regex_dfa(pattern)
    assert repr(pattern)[:100] in str(caught.value)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 2), (2, 3), (3, None)])
def test_a_limited_automaton_counts_characters(low: int, high: int | None) -> None:
    found = limited(regex_dfa("(ab|b)*"), low, high)
    for text in TEXTS:
        is_within = low <= len(text) and (high is None or len(text) <= high)
        assert accepts(found, text) == (is_within and bool(re.fullmatch("(ab|b)*", text))), text


EDGES = [
    0,
    0x22,
    0x7F,
    0x80,
    0xBF,
    0x7FF,
    0x800,
    0xFFF,
    0x1000,
    0xD7FF,
    0xE000,
    0xFFFF,
    0x10000,
    0x3FFFF,
    0x40000,
    0x10FFFF,
]
SETS = [((a, b),) for a, b in itertools.combinations_with_replacement(EDGES, 2)]


def spelled(ranges: Ranges, text: bytes, encoding=utf8) -> int:
    """How many of the sequences of byte ranges hold ``text``."""
    return sum(
        len(parts) == len(text) and all(a <= byte <= b for (a, b), byte in zip(parts, text, strict=True))
        for parts in encoding(ranges)
    )


def test_the_bytes_of_a_set_are_the_utf8_of_its_characters_once_each() -> None:
    near = {c + d for c in EDGES for d in (-1, 0, 1) if 0 <= c + d <= 0x10FFFF and not 0xD800 <= c + d <= 0xDFFF}
    for ranges in map(ranges_of, SETS):
        for character in near:
            is_in = any(a <= character <= b for a, b in ranges)
            assert spelled(ranges, chr(character).encode()) == is_in, (ranges, hex(character))
    for parts in utf8(ANY):  # and whatever they hold is UTF-8
        bytes(a for a, _ in parts).decode()
        bytes(b for _, b in parts).decode()


def test_in_json_each_character_has_the_spelling_of_json_dumps() -> None:
    import json

    for character in ['"', "\\", "/", "\n", "\x00", "\x1f", "\x7f", "a", "é", "\U0001f600"]:
        text = json.dumps(character, ensure_ascii=False)[1:-1].encode()
        assert spelled(ANY, text, in_json) == spelled(ranges_of([(ord(character), ord(character))]), text, in_json) == 1
        assert spelled(complement(ranges_of([(ord(character), ord(character))])), text, in_json) == 0
    assert spelled(ANY, b'"', in_json) == spelled(ANY, b"\n", in_json) == 0


def test_sets_of_characters_have_unions_intersections_and_complements() -> None:
    vowels, letters = (
        ranges_of((ord(c), ord(c)) for c in "aeiou"),
        ranges_of([(ord("a"), ord("f")), (ord("d"), ord("z"))]),
    )
    assert letters == ((97, 122),) and intersection(vowels, letters) == vowels
    assert complement(complement(vowels)) == vowels and intersection(vowels, complement(vowels)) == ()
    assert ranges_of([(0xD000, 0xE001)]) == ((0xD000, 0xD7FF), (0xE000, 0xE001))


def test_a_network_without_an_end_or_with_left_recursion_is_refused() -> None:
    network = Network()
    with pytest.raises(ValueError, match="nothing satisfies it"):
        network.close(network.new_state())
    network = Network()
    with pytest.raises(ValueError, match="leads back to itself"):
        network.close(network.call(network.rules[0][0], 0))

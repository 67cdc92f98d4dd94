"""Stop strings in growing text: the first one, wherever the text is cut, at a cost linear in the text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paged_infer.text.stop_strings import StopFinder, StopTree

STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=5, unique=True)


def searched(text: str, stops: list[str], num_settled: int) -> tuple[int, str] | None:
    """By the definition: the first, and of those that begin together the shortest."""
    found = [(text.find(stop, max(0, num_settled - len(stop) + 1)), stop) for stop in stops]
    return min((one for one in found if one[0] >= 0), default=None)


def overlap(text: str, stop: str) -> int:
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@given(stops=STOPS, pieces=st.lists(st.text("abc", max_size=4), max_size=12))
def test_the_first_stop_string_is_found_as_soon_as_it_is_whole(stops: list[str], pieces: list[str]) -> None:
    finder, text = StopFinder(tuple(stops)), ""
    for piece in pieces:
        num_settled = len(text)
        text += piece
        found = finder.find(text, num_settled)
        assert found == searched(text, stops, num_settled)
        assert finder.num_open == max(overlap(text, stop) for stop in stops)
        if found is not None:
            return


@given(stops=STOPS, text=st.text("abc", max_size=30), num_settled=st.integers(0, 30))
def test_a_stop_string_that_ends_in_settled_text_is_none(stops, text: str, num_settled: int) -> None:
    """``min_tokens`` has let it pass; what begins there and ends later counts."""
    num_settled = min(num_settled, len(text))
    assert StopFinder(tuple(stops)).find(text, num_settled) == searched(text, stops, num_settled)


def test_the_cost_is_linear_in_the_text_however_many_stop_strings_there_are() -> None:
    """The worst texts for a search: each character fits all stop strings but their last."""
    stops = tuple("a" * length + "b" for length in range(1, 256, 15))
    finder = StopFinder(stops)

    class Counted(dict):  # type: ignore[type-arg]
        num_looked_up = 0

        def get(self, *key):  # type: ignore[no-untyped-def]
            Counted.num_looked_up += 1
            return super().get(*key)

        def __contains__(self, key: object) -> bool:
            Counted.num_looked_up += 1
            return super().__contains__(key)

    tree = finder._tree = StopTree(stops)  # not the one that others share
    tree.children = [Counted(one) for one in tree.children]
    text = ("a" * 300 + "c") * 10
    for end in range(1, len(text) + 1):
        assert finder.find(text[:end], end - 1) is None
    assert Counted.num_looked_up <= 4 * len(text)


def test_one_tree_has_no_more_nodes_than_the_stop_strings_have_characters() -> None:
    assert len(StopTree(["abc", "abd", "b"]).children) == 1 + 3 + 1 + 1

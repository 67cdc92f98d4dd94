"""The queue of long texts: the shortest first, none starves, and its size is bounded."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from paged_infer.engine.text_queue import AGING_FACTOR, QueueFullError, TextQueue


class Line:
    """A queue whose worker is blocked until released, and the texts in the order of processing."""

    def __init__(self, **options: int) -> None:
        self.queue = TextQueue(**options)
        self.order: list[str] = []
        began, self._released = threading.Event(), threading.Event()
        self.queue.submit(lambda _: (began.set(), self._released.wait()), "", 0)
        began.wait()

    def put(self, text: str, num_characters: int) -> Future[None]:
        return self.queue.submit(self.order.append, text, num_characters)

    def let_go(self, *futures: Future[None]) -> list[str]:
        self._released.set()
        for future in futures:
            future.result(60)
        self.queue.close()
        return self.order


def test_short_texts_come_first_and_equals_in_order() -> None:
    line = Line()
    futures = [line.put(*pair) for pair in (("long", 1000), ("a", 50), ("short", 10), ("b", 50))]
    assert line.let_go(*futures) == ["short", "a", "b", "long"]


def test_a_long_text_is_overtaken_only_by_so_much() -> None:
    line = Line()
    long = line.put("long", 100)
    line.queue._num_done += AGING_FACTOR * 100  # as much has been worked on since
    late = line.put("late", 1)
    assert line.let_go(long, late) == ["long", "late"]


def test_what_waits_is_bounded_and_a_cancelled_text_makes_room() -> None:
    line = Line(max_num_characters=100)
    first = line.put("first", 60)
    with pytest.raises(QueueFullError, match=r"60 characters are waiting .* 41 more .* limit of 100"):
        line.put("second", 41)
    third = line.put("third", 40)
    first.cancel()
    fourth = line.put("fourth", 60)
    assert line.let_go(third, fourth) == ["third", "fourth"]


def test_a_text_over_the_limit_is_taken_when_none_waits() -> None:
    queue = TextQueue(max_num_characters=10)
    assert queue.submit(len, "x" * 50, 50).result(60) == 50
    assert queue.submit(len, "x" * 50, 50).result(60) == 50


def test_an_error_is_that_of_its_own_text() -> None:
    queue = TextQueue()
    wrong, right = queue.submit(int, "x", 1), queue.submit(int, "5", 1)
    with pytest.raises(ValueError):
        wrong.result(60)
    assert right.result(60) == 5

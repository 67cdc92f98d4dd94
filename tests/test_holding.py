"""A test that hangs is ended, whatever it waits for."""

from __future__ import annotations

import threading

import pytest
from holding import Hangs, ended_after
from hypothesis import given
from hypothesis import strategies as st


def wait_for_a_lock() -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire()


def loop() -> None:
    while True:
        pass


@given(st.booleans())
def try_examples(_: bool) -> None:
    loop()


@pytest.mark.parametrize("hang", [wait_for_a_lock, loop, try_examples])
def test_a_hang_is_ended(hang) -> None:
    with pytest.raises(Hangs, match=r"not ended after 0\.1 s"), ended_after(0.1):
        hang()


def test_what_ends_by_itself_is_left_alone() -> None:
    with ended_after(1000):
        done = True
    assert done

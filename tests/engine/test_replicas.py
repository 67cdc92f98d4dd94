"""Replicas of which one ends: it is replaced, at most so many times in a row, and the others go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from paged_infer.control.admission import add_sequences
from paged_infer.control.request import Request
from paged_infer.engine.engine_client import QueueFullError
from paged_infer.engine.replicas import MAX_RESTARTS, Replicas
from paged_infer.engine.request_states import StepReport
from paged_infer.engine.routing import Load
from paged_infer.execution.errors import EngineDeadError
from paged_infer.params import SamplingParams


class FakeProcess:
    """An ``EngineProcess`` without a process."""

    def __init__(self, on_end: Callable[[Any], None], fails: bool = False) -> None:
        self.observers: list[Callable[[StepReport], None]] = []
        self.gone, self.is_ready, self.load = threading.Event(), True, Load(0, 0)
        self.error: EngineDeadError | None = None
        self.added: list[str] = []
        self.fails, self.is_stopped, self._on_end = fails, False, on_end

    def wait_until_ready(self) -> Any:
        if self.fails:
            raise ValueError("no such model")
        return SimpleNamespace(memory=SimpleNamespace(max_model_len=64, num_blocks=8, block_size=4), stats={"steps": 0})

    def add(self, request: Request, channel: object, streamed: bool) -> None:
        if self.error is not None:
            raise self.error
        self.added.append(request.request_id)
        self.load = Load(self.load.waiting + len(request.sequences), 0)

    def stats(self) -> dict[str, int]:
        return {"steps": 7}

    def stop(self, finish: bool = False) -> None:
        self.is_stopped = True

    def end(self) -> None:
        self.error, self.is_ready = EngineDeadError("it has ended: killed by SIGKILL"), False
        self.gone.set()
        self._on_end(self)


class House:
    def __init__(self, num: int = 2, routing: str = "round_robin", max_num_waiting: int = 100) -> None:
        self.started: list[tuple[int, FakeProcess]] = []
        self.replicas = Replicas(self.start, num, routing, max_num_waiting)  # type: ignore[arg-type]
        self.num_requests = 0

    def start(self, index: int, on_end: Callable[[Any], None]) -> FakeProcess:
        self.started.append((index, FakeProcess(on_end)))
        return self.started[-1][1]

    def newest(self, index: int) -> FakeProcess:
        return [process for i, process in self.started if i == index][-1]

    def add(self, n: int = 1) -> None:
        request = Request(f"r{self.num_requests}", None, [1, 2, 3, 4, 5], SamplingParams(n=n), 0.0)
        add_sequences(request, self.num_requests, 0, 64, [])
        self.num_requests += 1
        self.replicas.add(request, None, False)  # type: ignore[arg-type]


def test_requests_go_to_the_replicas_in_turn() -> None:
    house = House()
    for _ in range(4):
        house.add()
    assert [process.added for _, process in house.started] == [["r0", "r2"], ["r1", "r3"]]


def test_one_that_ends_is_replaced_and_meanwhile_the_other_gets_everything() -> None:
    house = House()
    house.newest(1).end()
    house.newest(1).is_ready = False  # it loads
    assert [one["status"] for one in house.replicas.health()] == ["ready", "starting"]
    assert house.replicas.replica_stats() == [{"steps": 7}, {"steps": 0}]
    for _ in range(3):
        house.add()
    assert house.newest(0).added == ["r0", "r1", "r2"]
    house.newest(1).is_ready = True
    house.add()
    assert house.newest(1).added == ["r3"]
    assert house.replicas.health()[1] == {"replica": 1, "status": "ready", "restarts": 1}


def test_one_that_ended_a_moment_ago_is_skipped() -> None:
    house = House()

    def add(*_: object) -> None:  # its end has not been noticed yet
        house.newest(0).is_ready = False
        raise EngineDeadError("it has ended")

    house.newest(0).add = add  # type: ignore[method-assign]
    house.add()
    assert house.newest(1).added == ["r0"]


def test_one_that_never_serves_is_given_up_and_the_engine_ends_when_all_are() -> None:
    house = House()
    for _ in range(MAX_RESTARTS + 1):
        house.newest(0).end()
    assert [one["status"] for one in house.replicas.health()] == ["dead", "ready"]
    assert len(house.started) == 2 + MAX_RESTARTS
    house.add()
    for _ in range(MAX_RESTARTS + 1):
        house.newest(1).end()
    with pytest.raises(EngineDeadError, match=r"all replicas have been given up.*SIGKILL"):
        house.add()


def test_one_that_served_in_between_is_replaced_again() -> None:
    house = House()
    for _ in range(3 * MAX_RESTARTS):
        house.newest(0).end()
        house.newest(0).observers[0](StepReport(grown=[SimpleNamespace()]))  # type: ignore[list-item]
    assert house.replicas.health()[0] == {"replica": 0, "status": "ready", "restarts": 3 * MAX_RESTARTS}


def test_while_all_load_a_request_may_come_again_later() -> None:
    house = House()
    for index in (0, 1):
        house.newest(index).end()
        house.newest(index).is_ready = False
    with pytest.raises(QueueFullError, match="every replica is being restarted"):
        house.add()


def test_the_queues_of_all_together_are_bounded() -> None:
    house = House(max_num_waiting=3)
    house.add(n=2)
    house.add(n=2)
    with pytest.raises(QueueFullError, match="4 sequences are already waiting: max_num_waiting=3"):
        house.add()


def test_one_that_cannot_be_started_again_is_tried_as_often_and_given_up() -> None:
    house = House()

    def start(*_: object) -> None:
        house.started.append((0, FakeProcess(lambda _: None)))
        raise ValueError("no node has room")

    house.replicas._start = start  # type: ignore[assignment]
    house.newest(0).end()
    assert len(house.started) == 2 + MAX_RESTARTS
    assert [one["status"] for one in house.replicas.health()] == ["dead", "ready"]


def test_a_request_does_not_wait_while_a_replica_is_started() -> None:
    house, start = House(), House.start

    def slow(index: int, on_end: Callable[[Any], None]) -> FakeProcess:
        adding = threading.Thread(target=house.add)
        adding.start()
        adding.join()  # for ever, if the lock were held
        return start(house, index, on_end)

    house.replicas._start = slow  # type: ignore[assignment]
    house.newest(1).end()
    assert house.newest(0).added == ["r0"]


def test_reports_carry_the_number_of_their_replica() -> None:
    house, seen = House(), list[int]()
    house.replicas.observers.append(lambda report: seen.append(report.replica))
    for index in (1, 0):
        house.newest(index).observers[0](StepReport())
    assert seen == [1, 0]


def test_a_replica_that_cannot_be_built_is_an_error_and_ends_the_others() -> None:
    started: list[FakeProcess] = []

    def start(index: int, on_end: Callable[[Any], None]) -> FakeProcess:
        started.append(FakeProcess(on_end, fails=index == 1))
        return started[-1]

    with pytest.raises(ValueError, match="no such model"):
        Replicas(start, 2, "round_robin", 10)  # type: ignore[arg-type]
    for process in started:
        process.end()
    assert all(process.is_stopped for process in started) and len(started) == 2, "none is restarted"

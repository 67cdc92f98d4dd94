"""The messages between an engine's process and its client: plain data, pickled. See ``engine.engine_process``."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from paged_infer.config import EngineConfig
from paged_infer.control.request import Request
from paged_infer.engine.kv_usage import Stats
from paged_infer.engine.output_delta import OutputDelta
from paged_infer.execution.memory_plan import MemoryPlan
from paged_infer.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine's process is started with.

    Args:
        step_timeout_s: see ``EngineThread``.
        num_threads: torch's number of threads.
        visible_devices: its CUDA_VISIBLE_DEVICES. None: those of the process that starts it.
    """

    folder: Path
    config: EngineConfig
    step_timeout_s: float | None
    num_threads: int
    visible_devices: str | None = None


class EngineInfo(NamedTuple):
    """What the client needs to check requests."""

    model_config: ModelConfig
    memory: MemoryPlan
    stats: Stats


# -- to the engine ----------------------------------------------------------------------------------------------------


class Add(NamedTuple):
    request: Request
    streamed: bool


class Abort(NamedTuple):
    request_id: str


class Call(NamedTuple):
    number: int
    function: bytes  # pickled separately: one that cannot be unpickled fails alone


class Stop(NamedTuple):
    finish: bool


Command = Add | Abort | Call | Stop

# -- from the engine --------------------------------------------------------------------------------------------------


class Ready(NamedTuple):
    """The engine has loaded. ``clock_s``: its ``time.perf_counter``; on another machine that is another clock."""

    info: EngineInfo
    clock_s: float


class Refused(NamedTuple):
    """The engine could not be built from this model or these options."""

    reason: str


class Stepped(NamedTuple):
    """Sent after a step or an abort. ``grown``: (request id, sample index), once for each token.

    ``num_submitted``: how many requests the engine has been given so far; the client knows from it how many are on the
    way.
    """

    deltas: list[OutputDelta]
    grown: list[tuple[str, int]]
    now: float
    stats: Stats
    num_submitted: int


class Failed(NamedTuple):
    """A request has failed: it was refused when it was queued, or the engine has failed."""

    request_id: str
    error: Exception
    num_submitted: int


class Answer(NamedTuple):
    number: int
    value: Any
    error: Exception | None


class Ended(NamedTuple):
    """The last message. ``error``: why the engine has failed or was abandoned; None after ``Stop``."""

    error: str | None


Message = Ready | Refused | Stepped | Failed | Answer | Ended


def send(connection: Connection, item: Any) -> None:
    connection.send_bytes(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))


def portable(error: BaseException) -> Exception:
    """The exception, or a RuntimeError with its message if it cannot be pickled and read again."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # pickle and constructors raise anything
        copy = None
    return error if isinstance(copy, Exception) else RuntimeError(f"{type(error).__name__}: {error}")  # type: ignore[return-value]


def receive(connection: Connection) -> Any:
    """Raises EOFError or OSError when the other process has ended."""
    return pickle.loads(connection.recv_bytes())

"""The process of an engine: one that is interrupted while it is started is not left behind."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from paged_infer.config import EngineConfig
from paged_infer.engine.process_messages import EngineSpec
from paged_infer.engine.spawned_process import spawn


def test_ctrl_c_while_it_is_started_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = SpawnProcess.start, list[SpawnProcess]()

    def start_and_press(process: SpawnProcess) -> None:
        start(process)
        started.append(process)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SpawnProcess, "start", start_and_press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            spawn(EngineSpec(Path(), EngineConfig(), None, 1), "the engine")
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].exitcode == -signal.SIGKILL
    assert started[0] not in multiprocessing.active_children()

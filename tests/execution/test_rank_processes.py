"""Ranks' processes: what they import, and how their end or stop is noticed while they start.

Where it is not noticed, a test waits for ``rank_processes.START_S``, and then the message is another one.
"""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from holding import until
from rank_pids import is_running

from paged_infer import storyteller
from paged_infer.config import EngineConfig
from paged_infer.execution import rank_processes
from paged_infer.execution.errors import EngineDeadError
from paged_infer.execution.rank_processes import RankProcesses, is_stopped
from paged_infer.execution.worker import Setup

KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
HELD = "subprocess.Popen(['cat'], stdin=int(sys.argv[2]), close_fds=False)"  # its sockets, until we close ours


def test_ranks_import_no_file_of_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A script ``queue.py`` of the reader's own would be taken for the library's."""
    (tmp_path / "queue.py").write_text("raise RuntimeError('imported')")
    monkeypatch.chdir(tmp_path)
    ranks = RankProcesses(1, 300, {})
    setup = Setup(storyteller.PATH, EngineConfig(), 0, 1, ranks.store)
    try:
        (answer,) = ranks.call("prepare", [(setup,)])
        assert answer["block_size"] == "16"
    finally:
        ranks.close()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., RankProcesses]:
    """Ranks that run ``source`` where others import torch."""

    def start(source: str, timeout_s: float = 300, size: int = 1) -> RankProcesses:
        (tmp_path / "rank_program.py").write_text(f"import os, signal, subprocess, sys\n{source}\n")
        monkeypatch.setattr(rank_processes, "MODULE", "rank_program")
        monkeypatch.syspath_prepend(tmp_path)
        return RankProcesses(size, timeout_s, {})

    return start


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (KILLED, r"rank 0 \(process \d+\) was ended by SIGKILL while it loaded: was memory short\?"),
        ("sys.exit(3)", r"rank 0 \(process \d+\) has ended: exit status 3"),
        (f"{HELD}; {KILLED}", r"rank 0 \(process \d+\) was ended by SIGKILL while it loaded: was memory short\?"),
    ],
    ids=["killed", "exits", "killed, and a process that it started still runs"],
)
def test_a_rank_that_ends_before_its_first_heartbeat_is_noticed_at_once(source: str, message: str, start) -> None:
    ranks = start(source)
    with pytest.raises(EngineDeadError, match=message):
        ranks.call("load", [()])
    with pytest.raises(EngineDeadError, match=message):
        ranks.check_alive()


def test_a_rank_that_is_stopped_before_its_first_heartbeat_has_the_time_of_a_silent_one(start) -> None:
    ranks = start("os.kill(os.getpid(), signal.SIGSTOP)", 0.5)
    message = rf"rank 0 \(process {ranks.pids[0]}\) has sent no heartbeat for distributed_timeout=0.5 s"
    with pytest.raises(EngineDeadError, match=message):
        ranks.call("load", [()])
    assert not is_running(ranks.pids[0])


ONE_STOPS_AND_THE_OTHER_EXITS = """
try:
    with open("PLACE", "x") as file:
        file.write(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
except FileExistsError:
    while not (pid := open("PLACE").read()) or " T " not in open(f"/proc/{pid}/stat").read():
        pass
    sys.exit(3)
"""


def test_the_error_names_a_rank_that_is_stopped_where_another_fails(start, tmp_path: Path) -> None:
    """As when the other waits for it in a collective, for as long as the engine waits for a heartbeat."""
    ranks = start(ONE_STOPS_AND_THE_OTHER_EXITS.replace("PLACE", str(tmp_path / "pid")), size=2)
    ended = r"rank \d \(process \d+\) has ended: exit status 3"
    with pytest.raises(EngineDeadError, match=rf"rank \d \(process \d+\) is stopped by a signal; {ended}"):
        ranks.call("load", [(), ()])


def test_a_process_is_stopped_from_one_signal_to_the_other() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    try:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        until(lambda: is_stopped(process.pid))
        assert is_stopped(process.pid) and process.poll() is None
        process.send_signal(signal.SIGCONT)
        until(lambda: not is_stopped(process.pid))
    finally:
        process.kill()
        process.wait()
    assert not is_stopped(process.pid)


def test_the_port_of_the_store_is_closed_with_the_ranks(start) -> None:
    ranks = start("sys.stdin.read(); os.read(int(sys.argv[1]), 1)")
    socket.create_connection(ranks.store).close()
    ranks.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(ranks.store)

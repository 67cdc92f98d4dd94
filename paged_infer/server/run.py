"""Run the application in uvicorn, and shut it down: running requests may finish within a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any

import uvicorn

try:
    import resource
except ModuleNotFoundError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

from paged_infer.async_llm import AsyncLLM
from paged_infer.server.app import create_app
from paged_infer.server.service import Service, Settings

logger = logging.getLogger("uvicorn.error")
POLL_S = 0.05
LAST_STEP_S = 5.0  # for the running step to return after the shutdown timeout
FORCED_STEP_S = 1.0  # the same, after a second signal
SWITCH_S = 0.0005
RESERVED_FILES = 32  # file descriptors that are not used for connections
FULL_EVERY_S = 60.0  # refused connections are logged at most this often
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    b'{"error": {"message": "too many connections are open", "type": "server_error", "param": null, '
    b'"code": "too_many_connections"}}'
)
TICKS_A_SECOND = 10  # of uvicorn


class Server(uvicorn.Server):
    """Shuts down in three phases. The first signal starts the first phase; a second signal skips it:

    1. new requests get a 503; running ones continue, for ``shutdown_timeout_s`` at most;
    2. unfinished requests are aborted and get an error; the running step has ``LAST_STEP_S`` seconds to return;
    3. the connections are closed.

    A connection without a complete head or body is closed after ``receive_timeout_s``. A failed engine also ends the
    server, so that a supervisor can restart it.
    """

    def __init__(self, engine: AsyncLLM, config: uvicorn.Config, shutdown_timeout_s: float) -> None:
        super().__init__(config)
        self._engine = engine
        self.service: Service = config.app.state.service  # type: ignore[union-attr]
        self._shutdown_timeout_s = shutdown_timeout_s
        self._forced_since_s: float | None = None  # when the second signal came; time.monotonic()
        self._idle: dict[Any, tuple[Any, float]] = {}  # idle connection -> its last request, since when

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Log where the server listens, and what it serves: uvicorn logs no address for sockets that it is given."""
        await super().startup(sockets)
        for line in opening_lines(self._engine, self.service, sockets or []):
            logger.info(line)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called between two instructions of the main thread, so it only sets flags."""
        if self.service.is_closing:
            self._forced_since_s = self._forced_since_s or time.monotonic()
        self.service.is_closing = True

    @property
    def is_forced(self) -> bool:
        """Whether a second signal has come."""
        return self._forced_since_s is not None

    def stop(self) -> None:
        """Act like the first signal. May be called from any thread."""
        self.handle_exit(signal.SIGTERM, None)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this ten times a second; True ends the server."""
        if self.service.is_closing or self._engine.error is not None:
            await self._drain()
            return True
        if counter % TICKS_A_SECOND == 0:
            self._close_idle_connections(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    def _close_idle_connections(self, now_s: float) -> None:
        """Close connections that have been idle too long. uvicorn does so only before a request's first byte."""
        idle = {}
        for connection in self.server_state.connections:
            cycle = getattr(connection, "cycle", None)  # uvicorn's name for a request and its answer
            if cycle is None or cycle.response_complete:
                last, since_s = self._idle.get(connection, (cycle, now_s))
                idle[connection] = (cycle, since_s if last is cycle else now_s)
        self._idle = idle
        for connection, (_, since_s) in idle.items():
            if now_s - since_s > self.service.settings.receive_timeout_s:
                connection.transport.close()

    async def _drain(self) -> None:
        self.service.stop_receiving()
        num_open = len(self.server_state.tasks)
        logger.info("Shutting down: %d request(s) running", num_open)
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._shutdown_timeout_s
        while self.server_state.tasks and clock() < deadline and not self._engine.error:
            if self.is_forced:
                break
            await asyncio.sleep(POLL_S)
        # Abort the remaining requests: each gets an error.
        ending = asyncio.create_task(self._engine.shutdown(finish=False, last_step_s=LAST_STEP_S))
        while not ending.done():
            await asyncio.wait({ending}, timeout=POLL_S)
            if self._forced_since_s is not None and time.monotonic() > self._forced_since_s + FORCED_STEP_S:
                self._engine.abandon()
        ending.result()


def most_files() -> float:
    """The most file descriptors that may be open when a connection is accepted."""
    if resource is None or (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) == resource.RLIM_INFINITY:
        return math.inf
    return limit - min(RESERVED_FILES, limit // 4)


class Listener(socket.socket):
    """Answers connections with 503 when few file descriptors are left.

    If none were left, ``accept`` would fail, and asyncio would retry and log two thousand times a second.
    """

    _full_s = -math.inf  # time.monotonic() of the last log line

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        limit = most_files()
        if connection.fileno() < limit:  # the lowest free number, so this many are open
            return connection, address
        if time.monotonic() - self._full_s > FULL_EVERY_S:
            self._full_s = time.monotonic()
            logger.warning("Connections are refused (503): %d file descriptors are open; see ulimit -n", limit)
        connection.setblocking(False)
        with connection, contextlib.suppress(OSError):
            connection.send(FULL)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1 << 16)  # unread data would make close() reset the connection
        raise BlockingIOError  # for asyncio: no connection for now


def listen(host: str, port: int) -> Listener:
    """Bind the socket before the model loads, so early connections queue.

    Raises:
        ValueError: the address is not available, for example because it is in use.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = str(error.strerror).split(" (")[0]
        raise ValueError(f"cannot listen on {host}:{port}: {reason}") from None
    # Accepted connections inherit TCP_NODELAY. asyncio sets it only on sockets made with proto=IPPROTO_TCP, which this
    # one is not. Without it the first event of a stream waits 40 ms for the client to acknowledge the headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Listener(listener.family, listener.type, listener.proto, fileno=listener.detach())


def opening_lines(engine: AsyncLLM, service: Service, sockets: Iterable[socket.socket]) -> list[str]:
    """What to know before the first request: where the server listens, its page, its model, and its pool."""
    lines = []
    for host, port in (one.getsockname()[:2] for one in sockets if one.family in (socket.AF_INET, socket.AF_INET6)):
        is_every = host in ("0.0.0.0", "::")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        lines += [f"API:   {url}/v1" + (", and every other address of this machine" if is_every else "")]
        lines += [f"Page:  {url}/"]
    sizes, num_engines = engine.cache_config, len(engine.replica_stats())
    pool = f"{int(sizes['num_gpu_blocks']):,} blocks of {sizes['block_size']} tokens"
    lines += [f"Model: {' or '.join(service.model_names)}, up to {engine.max_model_len:,} tokens"]
    lines += [f"Pool:  {pool}" + (f", in each of {num_engines} replicas" if num_engines > 1 else "")]
    return lines


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one: each connection needs a descriptor."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS: "unlimited" is more than it allows
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def serve(
    engine: AsyncLLM,
    settings: Settings,
    listener: socket.socket,
    *,
    shutdown_timeout_s: float = 30.0,
    log_level: str = "info",
) -> bool:
    """Serve on ``listener`` until a signal. Returns False if the engine failed or a second signal aborted requests."""
    config = uvicorn.Config(
        create_app(engine, settings),
        log_level=log_level,
        access_log=False,
        timeout_graceful_shutdown=5,  # for the last bytes to be sent, after the engine has shut down
    )
    raise_file_limit()
    gc.collect()
    gc.freeze()  # so that no collection walks the libraries' 300,000 objects while requests are served
    server = Server(engine, config, shutdown_timeout_s)
    usual_s = sys.getswitchinterval()
    # The engine's thread and the event loop share the interpreter. With Python's usual 5 ms, a thread that returns from
    # a system call waits that long for the other; a shorter interval served 12 % more tokens at 32 concurrent requests.
    sys.setswitchinterval(SWITCH_S)
    try:
        server.run([listener])
    finally:
        sys.setswitchinterval(usual_s)
        gc.unfreeze()  # otherwise the libraries report leaks when the interpreter exits
    return server.service.is_closing and not server.is_forced and not engine.is_abandoned

"""An application that is served in a thread of the tests."""

from __future__ import annotations

import threading
from typing import Any

import uvicorn
from holding import LIMIT_S

from paged_infer.server.run import listen


class Listening:
    """As a context manager, it gives the address."""

    def __init__(self, application: Any) -> None:
        self.listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(application, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()

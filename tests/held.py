"""An engine whose next step does not return until it is let go: a kernel that hangs, made certain."""

from __future__ import annotations

import threading
from typing import Any

from paged_infer import AsyncLLM


class HeldStep:
    """Holds the engine's next ``launch``. ``began`` is set once a step hangs there; ``let_go`` lets it return."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.began, self._released = threading.Event(), threading.Event()
        runner = engine._llm.engine.runner
        launch = runner.launch

        def held(step: Any) -> Any:
            self.began.set()
            self._released.wait()
            return launch(step)

        runner.launch = held  # type: ignore[method-assign]

    def let_go(self) -> None:
        self._released.set()

"""Errors of an engine that cannot continue. Imports no torch, so that commands can name them before that is loaded."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass


class EngineDeadError(RuntimeError):
    """The engine has stopped: a step or a rank has failed (see ``__cause__``), or it was shut down or abandoned."""


class RankTraceback(Exception):
    """The cause of an error in another process: its traceback as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank ends, as it reports it to others. ``is_input``: because the model or an option cannot be used."""

    at_s: float  # ``time.monotonic``, one clock for all processes of a machine
    message: str
    is_input: bool
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        is_input = isinstance(error, ValueError)
        lines = [line for line in str(error).splitlines() if line.strip()]
        text = str(error) if is_input else f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        return cls(time.monotonic(), text, is_input, "".join(traceback.format_exception(error)))

    def as_error(self, rank: int | None = None) -> Exception:
        """The exception for a caller; for a model or an option, the same as if it were loaded in this process."""
        which = "a rank" if rank is None else f"rank {rank}"
        return ValueError(self.message) if self.is_input else EngineDeadError(f"{which} has failed: {self.message}")

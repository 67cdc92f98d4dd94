"""The interface between an engine and the devices that compute its steps.

    engine   -- ScheduledStep -->  Executor.launch        -> RunningStep
             <-- StepResult -----  RunningStep.result()      waits for the device

Both are plain picklable data, and the engine reaches a model only through these two calls. So an executor decides where
the model runs: here it is in this process; ``multiprocess`` and ``ray_cluster`` run it in others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.execution.draft_model import DraftModel
from paged_infer.execution.model_runner import ModelRunner


class RunningStep(Protocol):
    """A step that has been launched."""

    def result(self) -> StepResult:
        """Wait for what the step computes. Called once."""


class RemoteStep(RunningStep, Protocol):
    """A step that other processes compute. ``request``, ``wait`` and ``result`` follow each other.

    Only ``wait`` takes long, and only there may an exception be raised between two instructions, as Ctrl-C does: half a
    message would make the next one unreadable.
    """

    def request(self) -> None:
        """Ask for the result. Does not wait."""

    def wait(self) -> None:
        """Wait until ``result`` can be read, or its process has ended."""


class Executor(Protocol):
    """Computes the steps of one engine, in the order in which they are launched.

    An ``InProcessExecutor`` has the model in this process. Others return a ``RemoteStep`` from ``launch``.
    """

    @property
    def device(self) -> torch.device:
        """What the steps are computed on."""

    def now(self) -> float:
        """The time in seconds by which steps are planned and requests arrive: the same on all ranks that plan."""

    def launch(self, step: ScheduledStep) -> RunningStep:
        """Start ``step``. May return before it, or an earlier step, has been computed.

        Raises:
            EngineDeadError: another process has ended, or does not respond.
        """

    def check_alive(self) -> None:
        """Raises EngineDeadError if ``launch`` would, whatever the step."""

    def on_death(self, callback: Callable[[], None]) -> None:
        """Call ``callback``, in any thread, once another process has ended."""

    def close(self) -> None:
        """End the other processes, from any thread, and what waits for them. Can be called again."""


class InProcessExecutor:
    """Computes steps in the engine's own process. A draft model, if there is one, first fills in each step's drafts."""

    def __init__(self, runner: ModelRunner, drafter: DraftModel | None = None) -> None:
        self.runner = runner
        self.drafter = drafter

    @property
    def device(self) -> torch.device:
        return self.runner.decoder.device

    def now(self) -> float:
        """The time of this process."""
        return time.perf_counter()

    def launch(self, step: ScheduledStep) -> RunningStep:
        """See ``Executor`` and ``ModelRunner.launch``."""
        if self.drafter is not None:
            step = self.drafter.fill_in(step)
        return self.runner.launch(step)

    def check_alive(self) -> None:
        """There is no other process."""

    def on_death(self, callback: Callable[[], None]) -> None:
        """There is no other process."""

    def close(self) -> None:
        """There is no other process."""

"""The interface between an engine and the devices that compute its steps.

    engine   -- ScheduledStep -->  Executor.launch        -> RunningStep
             <-- StepResult -----  RunningStep.result()      waits for the device

Both are plain picklable data, and the engine uses the model only through these two calls. So the executor decides where
the model runs: ``InProcessExecutor`` runs it in this process, a ``RankExecutor`` in others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.execution.draft_model import DraftModel
from paged_infer.execution.model_runner import ModelRunner
from paged_infer.model.parallel import Traffic


class RunningStep(Protocol):
    """A step that has been launched."""

    def result(self) -> StepResult:
        """Wait for the step's result. Called once."""


class RemoteStep(RunningStep, Protocol):
    """A step that other processes compute. ``request``, ``wait`` and ``result`` are called in this order.

    Only ``wait`` takes long, and only there may Ctrl-C raise an exception between two instructions: elsewhere half a
    message could be left, which would make the next one unreadable.
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
        """The device that computes the steps."""

    @property
    def traffic(self) -> Traffic:
        """What one rank has handed to collectives; none if the model is in this process alone."""

    def now(self) -> float:
        """The clock for planning and for arrivals, in seconds: the same on all ranks that plan."""

    def launch(self, step: ScheduledStep) -> RunningStep:
        """Start ``step``. May return before it, or an earlier step, has been computed.

        Raises:
            EngineDeadError: another process has ended, or does not respond.
        """

    def check_alive(self) -> None:
        """Raises EngineDeadError if ``launch`` would raise it for any step."""

    def on_death(self, callback: Callable[[], None]) -> None:
        """Call ``callback``, perhaps in another thread, once another process has ended."""

    def close(self) -> None:
        """End the other processes and the calls that wait for them. May be called from any thread, and again."""


class InProcessExecutor:
    """Computes steps in the engine's own process. A draft model, if there is one, first fills in each step's drafts."""

    def __init__(self, runner: ModelRunner, drafter: DraftModel | None = None) -> None:
        self.runner = runner
        self.drafter = drafter

    @property
    def device(self) -> torch.device:
        return self.runner.decoder.device

    @property
    def traffic(self) -> Traffic:
        return self.runner.decoder.parallel.traffic

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

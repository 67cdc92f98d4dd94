"""The interface between an engine and the devices that compute its steps.

    engine   -- ScheduledStep -->  Executor.launch        -> RunningStep
             <-- StepResult -----  RunningStep.result()      waits for the device

Both are plain picklable data, and the engine reaches a model only through these two calls. So an executor decides where
the model runs: here it is in this process, and a later one may run it in others.
"""

from __future__ import annotations

from typing import Protocol

from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.execution.draft_model import DraftModel
from paged_infer.execution.model_runner import ModelRunner


class RunningStep(Protocol):
    """A step that has been launched."""

    def result(self) -> StepResult:
        """Wait for what the step computes. Called once."""


class Executor(Protocol):
    """Computes the steps of one engine, in the order in which they are launched."""

    def launch(self, step: ScheduledStep) -> RunningStep:
        """Start ``step``. May return before it, or an earlier step, has been computed."""


class InProcessExecutor:
    """Computes steps in the engine's own process. A draft model, if there is one, first fills in each step's drafts."""

    def __init__(self, runner: ModelRunner, drafter: DraftModel | None = None) -> None:
        self.runner = runner
        self.drafter = drafter

    def launch(self, step: ScheduledStep) -> RunningStep:
        """See ``Executor`` and ``ModelRunner.launch``."""
        if self.drafter is not None:
            step = self.drafter.fill_in(step)
        return self.runner.launch(step)

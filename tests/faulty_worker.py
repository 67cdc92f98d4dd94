"""A rank that goes wrong as ``FAULT`` names: the tests let engines start this program instead of theirs."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import torch

from paged_infer.execution import worker
from paged_infer.execution.memory_plan import MemoryPlan

FAULT = os.environ["FAULT"]


class FaultyWorker(worker.Worker):
    """Rank 1 goes wrong at the start, and any rank in its next step after SIGUSR1."""

    is_broken = False

    def prepare(self, setup: worker.Setup) -> dict[str, str]:
        self.is_faulty = setup.rank == 1
        if FAULT == "other options" and self.is_faulty:
            setup = replace(setup, config=replace(setup.config, block_size=setup.config.block_size * 2))
        if FAULT == "unreachable" and self.is_faulty:
            setup = replace(setup, store=(setup.store[0], 1))
        return super().prepare(setup)

    def load(self) -> MemoryPlan:
        if FAULT == "out of memory" and self.is_faulty:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.")
        if FAULT == "killed" and self.is_faulty:
            os.kill(os.getpid(), signal.SIGKILL)
        plan = super().load()
        signal.signal(signal.SIGUSR1, self._break)
        return replace(plan, num_blocks=plan.num_blocks - 2) if FAULT == "small pool" and self.is_faulty else plan

    def _break(self, *_: object) -> None:
        self.is_broken = True

    def launch(self, delta: object) -> None:
        if self.is_broken:
            raise RuntimeError("the device fell off")
        super().launch(delta)  # type: ignore[arg-type]


if __name__ == "__main__":
    worker.main(FaultyWorker())

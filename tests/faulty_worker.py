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
    """Only rank 1 goes wrong."""

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
        return replace(plan, num_blocks=plan.num_blocks - 3) if FAULT == "small" and self.is_faulty else plan

    def launch(self, delta: object) -> None:
        if FAULT == "step" and self.is_faulty:
            raise RuntimeError("the device fell off")
        super().launch(delta)  # type: ignore[arg-type]


if __name__ == "__main__":
    worker.main(FaultyWorker())

"""Makes plain ``pytest --nbval notebooks`` work, from any folder: what is compared, and what may differ."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).parent
collect_ignore = ["gpu", "lab"]  # copies: executed on a GPU (`make notebooks-gpu`), and the reader's own (`make lab`)
LIMIT_S = 600  # ends a cell, or a kernel's start, that hangs
# Pictures and tables of HTML depend on fonts and versions; warnings on the machine. Of a widget only the picture beside
# it is stored, see execute.py.
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
SKIPPED = ("stderr", "image/png", "image/svg+xml", "text/html", WIDGET_VIEW)


def pytest_configure(config):
    if (worker := getattr(config, "workerinput", None)) is not None:  # of pytest-xdist, beside others: share the cores
        threads = max(1, (os.cpu_count() or 1) // worker["workercount"])
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the kernels that it starts
    config.option.nbval_sanitize_with = str(HERE / "sanitize.cfg")
    config.option.nbval_current_env = True  # the kernel that runs is the interpreter that tests
    config.option.nbval_cell_timeout = LIMIT_S
    config.option.nbval_kernel_startup_timeout = LIMIT_S


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare = (*collector.skip_compare, *SKIPPED)

"""Describe the machine of a measurement, to be printed and stored with the result."""

from __future__ import annotations

import os
import platform
from datetime import date
from typing import Any

import torch
import transformers


def describe_machine() -> dict[str, Any]:
    """Device, threads, versions, date, and the load before the run, since another busy process slows torch down."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def machine_line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['device']}, {machine['processor']}, {machine['torch_threads']} torch threads, "
        f"load before {machine['load_before']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, {machine['date']}"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""What a benchmark ran on: printed with every result, because a number without it says nothing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


def describe() -> dict[str, Any]:
    """Processor, cores, memory, versions, and how busy the machine was just before."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "sglang": version("sglang"),
        "torch": version("torch"),
    }


def one_line() -> str:
    found = describe()
    return (
        f"{found['processor']}, {found['cores']} cores, {found['memory_gb']} GB, load {found['load_1min']}, "
        f"Python {found['python']}, SGLang {found['sglang']}, PyTorch {found['torch']}"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

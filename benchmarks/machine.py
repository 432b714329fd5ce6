"""What a benchmark ran on: printed with every result, because a number without it says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
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
        "sglang": _version("sglang"),
        "torch": _version("torch"),
    }


def gpus() -> list[str]:
    """Each GPU's name, memory and driver, as NVIDIA's tool says; empty where there is none."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return said.splitlines()


def one_line() -> str:
    found = describe()
    return (
        f"{found['processor']}, {found['cores']} cores, {found['memory_gb']} GB, load {found['load_1min']}, "
        f"Python {found['python']}, SGLang {found['sglang']}, PyTorch {found['torch']}"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

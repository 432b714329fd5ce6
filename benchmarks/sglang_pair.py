"""A prefill and a decode worker of SGLang alone, over its own NIXL backend: what a peer's router would send to."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from benchmarks import report
from benchmarks.gpu_cluster import gpu_count
from benchmarks.legs import Pair
from engine.launch.errors import LaunchFailed
from engine.launch.flags import arguments

HOST = "127.0.0.1"
BOOT_S = 300.0
STOP_S = 10.0
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0", "SGLANG_PLUGINS": "none"}
"""As our workers have it, and without our plug-in: `SGLANG_PLUGINS` names those that are loaded."""


@contextmanager
def sglang_pair(cluster_file: Path, by_role: bool = False) -> Iterator[Pair]:
    """Both, ready; their logs beside the file. Raises LaunchFailed.

    cluster_file  of gpu_config: the same model, environment, flags for every worker
    by_role       also those that are for one role only: decode's prefix cache, prefill that waits for no decode worker
    """
    tree = yaml.safe_load(cluster_file.read_text())
    groups = {group["role"]: group.get("engine", {}) for group in tree["workers"]} if by_role else {}
    ports = free_ports(3)
    environment = {**os.environ, **ENVIRONMENT, **tree.get("environment", {})}
    with ExitStack() as up:
        processes = {}
        for number, (role, port) in enumerate(zip(("prefill", "decode"), ports[:2], strict=True)):
            flags = {
                **tree["engine"],
                **groups.get(role, {}),
                "model-path": tree["model"]["path"],
                "served-model-name": tree["model"]["served_name"],
                "host": HOST,
                "port": port,
                "base-gpu-id": number % max(1, gpu_count()),
                "disaggregation-mode": role,
                "disaggregation-transfer-backend": "nixl",
                "disaggregation-bootstrap-port": ports[2],
            }
            log = up.enter_context((cluster_file.parent / f"sglang-{role}.log").open("w"))
            command = [sys.executable, "-m", "sglang.launch_server", *arguments(flags)]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            up.callback(_stop, process)
            processes[role] = process
        began_s = time.monotonic()
        for (role, process), port in zip(processes.items(), ports[:2], strict=True):
            _wait_ready(role, process, port, began_s + BOOT_S)
            report.progress(f"  {time.monotonic() - began_s:5.1f} s  SGLang's own {role}: ready")
        yield Pair(f"http://{HOST}:{ports[0]}", f"http://{HOST}:{ports[1]}", HOST, ports[2])


def free_ports(count: int) -> list[int]:
    """Free when it looked."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_ready(role: str, process: subprocess.Popen[bytes], port: int, until_s: float) -> None:
    while True:
        if process.poll() is not None:
            raise LaunchFailed(f"SGLang's own {role} exited with code {process.returncode}: see its log")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://{HOST}:{port}/model_info", timeout=1).close()
            return
        if time.monotonic() > until_s:
            raise LaunchFailed(f"SGLang's own {role} was not ready after {BOOT_S:.0f} s: see its log")
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """It and its children: they are a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)

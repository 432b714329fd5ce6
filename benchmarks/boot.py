"""From `up` to ready: two prefill workers and one decode worker on this machine, and a crashed worker back.

Real SGLang. `ready` is when a client's request would be served. `restart` kills one
worker (SIGKILL) and waits until the router has it ready again, in a new epoch.
`--times` repeats up and down, which shows that nothing is left behind either.
`--install` also installs the locked packages into an empty folder with an empty
cache, and says how long that took and how much it takes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import report
from benchmarks.bench_cluster import run_main, running
from benchmarks.client import get_json
from engine.launch.cluster import Cluster
from engine.model import choose_model

ROOT = Path(__file__).parents[1]
BACK_TIMEOUT_S = 120.0


def main() -> None:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    parser.add_argument("--times", type=int, default=3, help="how often to go up and down (default 3)")
    parser.add_argument("--install", action="store_true", help="also time an installation on an empty cache (9 GB)")
    options = parser.parse_args()
    result = measure(options.times, options.model)
    if options.install:
        result |= install()
    report.publish(result, ("what", "value"), list(result.items()), options.json)


def measure(times: int, model: str | None) -> dict[str, Any]:
    ready: list[float] = []
    down: list[float] = []
    back: list[float] = []
    memory: list[float] = []
    for _ in range(times):
        began_s = time.monotonic()
        with running(model=model) as cluster:
            ready.append(time.monotonic() - began_s)
            report.progress(f"  ready after {ready[-1]:.1f} s")
            pids = [*cluster.workers.values(), cluster.router_pid or 0]
            memory.append(_memory_gb(pids))
            if not back:
                back.append(_crash_and_return(cluster))
                report.progress(f"  a crashed worker was back after {back[0]:.1f} s")
            stopping_s = time.monotonic()
        down.append(time.monotonic() - stopping_s)
        left = [pid for pid in pids if pid and psutil.pid_exists(pid)]
        if left:
            raise SystemExit(f"boot: wanted no process left after down, found {left}")
    checkpoint = choose_model("smollm2", None, model).path
    return {
        "times": times,
        "ready_s": report.median(ready),
        "ready_samples_s": [round(value, 1) for value in ready],
        "crashed_worker_back_s": report.median(back),
        "down_s": report.median(down),
        "memory_gb": report.median(memory),
        "environment_gb": _disk_gb(ROOT / ".venv"),
        "model_gb": _disk_gb(checkpoint),
    }


def install() -> dict[str, Any]:
    """The locked packages, fetched anew into a folder of their own."""
    uv = str(ROOT / "tools" / "uv.sh")
    folder = Path(tempfile.mkdtemp(prefix="mainstem-install-", dir=ROOT))
    environment = {**os.environ, "UV_CACHE_DIR": str(folder / "cache")}
    python = str(folder / "venv" / "bin" / "python")
    locked = ["--python", python, "--require-hashes", str(ROOT / "requirements.lock")]
    try:
        began_s = time.monotonic()
        venv = [uv, "venv", "--quiet", "--python", sys.executable, str(folder / "venv")]
        subprocess.run(venv, check=True, env=environment, cwd=ROOT)
        subprocess.run([uv, "pip", "sync", "--quiet", *locked], check=True, env=environment, cwd=ROOT)
        return {"install_s": round(time.monotonic() - began_s, 1), "install_gb": _disk_gb(folder)}
    finally:
        shutil.rmtree(folder)


def _crash_and_return(cluster: Cluster) -> float:
    name = next(worker.name for worker in cluster.plan.workers if worker.role == "prefill")
    before = _epoch(cluster, name)
    began_s = time.monotonic()
    os.kill(cluster.workers[name], signal.SIGKILL)
    while time.monotonic() - began_s < BACK_TIMEOUT_S:
        epoch = _epoch(cluster, name)
        if epoch is not None and epoch != before:
            return time.monotonic() - began_s
        time.sleep(0.2)
    raise SystemExit(f"boot: wanted {name} back within {BACK_TIMEOUT_S:.0f} s, found it missing")


def _epoch(cluster: Cluster, name: str) -> int | None:
    """The worker's epoch where the router has it ready, else None."""
    for worker in get_json(cluster.url, "/api/state")["workers"]:
        if worker["name"] == name and worker["state"] == "ready":
            return int(worker["epoch"])
    return None


def _memory_gb(pids: list[int]) -> float:
    """Proportional set size of these processes and their children: shared pages count once."""
    processes = {
        child for pid in pids for child in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))
    }
    return sum(process.memory_full_info().pss for process in processes) / 2**30


def _disk_gb(folder: Path) -> float:
    """What the folder takes; a file with several names counts once."""
    seen = {(stat.st_dev, stat.st_ino): stat.st_blocks for path in folder.rglob("*") if (stat := path.lstat())}
    return round(512 * sum(seen.values()) / 2**30, 2)


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Several systems on the same GPUs at the same time, to be measured one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from benchmarks import report
from benchmarks.bench_cluster import running
from benchmarks.legs import Pair
from benchmarks.sglang_pair import sglang_pair
from engine.launch.cluster import Cluster
from engine.launch.errors import LaunchFailed

NIXL = "nixl"
"""SGLang's own pair; every other name but NIXL_BY_ROLE is a cluster of ours."""
NIXL_BY_ROLE = "nixl-by-role"
"""The same with the flags that our workers get for their roles."""
System = Cluster | Pair


@contextmanager
def all_running(files: dict[str, Path]) -> Iterator[dict[str, System]]:
    """Those that started, all at the same time; one that did not is told of, and missing."""
    runs: dict[str, AbstractContextManager[System]] = {
        name: sglang_pair(file, by_role=name == NIXL_BY_ROLE)
        if name in (NIXL, NIXL_BY_ROLE)
        else running(file, state_dir=file.parent)
        for name, file in files.items()
    }
    with ThreadPoolExecutor(len(runs)) as threads, ExitStack() as up:
        starting = {name: threads.submit(run.__enter__) for name, run in runs.items()}
        wait(starting.values())
        systems = {}
        for name, one in starting.items():
            try:
                systems[name] = one.result()
            except LaunchFailed as error:
                report.progress(f"  {name} left out: {error}")
                continue
            up.push(runs[name])
        yield systems

"""A cluster for a benchmark or the demo: brought up with progress, and gone afterwards whatever happens.

`run_main` is how such a program ends: a mistake is a line on stderr, as with the command `mainstem`.
"""

from __future__ import annotations

import http.client
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import yaml

from engine.config import read_cluster
from engine.launch.cluster import Cluster, Event
from engine.launch.errors import BadInput, LaunchFailed, complain

LOCAL_CPU = Path(__file__).parents[1] / "configs" / "local-cpu.yaml"
FLUSH_S = 30.0
"""A scheduler answers between two steps."""


def run_main(main: Callable[[], int | None]) -> int:
    """The exit code of a program: 1 it did not work, 2 the input was wrong, 130 interrupted; else what `main` returns.

    SIGTERM ends the program as Ctrl-C does, so that nothing is left running.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main() or 0
    except (BadInput, LaunchFailed) as error:
        _complain(*error.lines)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        _complain(f"exit code {error.returncode} of: {' '.join(map(str, error.cmd))}")
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130


@contextmanager
def running(
    config_file: Path = LOCAL_CPU, model: str | None = None, state_dir: Path | None = None
) -> Iterator[Cluster]:
    """A ready cluster.

    state_dir  where clusters keep logs and state, as of `mainstem --state-dir`; None: a new folder, which stays only
               after a failure

    Raises BadInput and LaunchFailed.
    """
    began_s = time.monotonic()

    def say(event: Event) -> None:
        print(f"  {time.monotonic() - began_s:5.1f} s  {event.name}: {event.text}", file=sys.stderr, flush=True)

    config = read_cluster(config_file)
    with (
        _kept_on_failure() if state_dir is None else nullcontext(state_dir / config.name) as folder,
        Cluster.start(config, folder, model=model, on_event=say) as cluster,
    ):
        cluster.wait_ready()
        yield cluster


def changed_config(file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """configs/local-cpu.yaml on a free port, changed and written to `file`."""
    tree = yaml.safe_load(LOCAL_CPU.read_text())
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))
        tree["router"]["port"] = placeholder.getsockname()[1]
    change(tree)
    file.write_text(yaml.safe_dump(tree))
    return file


def scheduler_of(cluster: Cluster, worker: str) -> psutil.Process:
    """The process of this worker that SGLang has named its scheduler. Raises LaunchFailed."""
    for process in psutil.Process(cluster.workers[worker]).children(recursive=True):
        if "scheduler" in (" ".join(process.cmdline()) or process.name()):
            return process
    raise LaunchFailed(f"{worker}: wanted a scheduler process, found none")


def emptied(cluster: Cluster, worker: str) -> bool:
    """Has SGLang empty this worker's prefix cache, which it does where it has nothing to do; False where it has."""
    port = next(one.port for one in cluster.view.processes if one.name == worker)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=FLUSH_S)
    try:
        connection.request("POST", "/flush_cache")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextmanager
def _kept_on_failure() -> Iterator[Path]:
    """A folder that is removed afterwards, but not where its logs say why something failed."""
    folder = Path(tempfile.mkdtemp(prefix="mainstem-bench-"))
    keep = False
    try:
        yield folder
    except BadInput:  # Nothing was started, so there is nothing to read.
        raise
    except (Exception, SystemExit):
        keep = True
        raise
    finally:
        if keep:
            print(f"logs and state are kept in {folder}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _complain(*lines: str) -> None:
    complain(Path(sys.argv[0]).stem, *lines)

"""A cluster for a benchmark or the demo: brought up with progress, and gone afterwards whatever happens."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.config import read_cluster
from engine.launch.cluster import Cluster, Event

LOCAL_CPU = Path(__file__).parents[1] / "configs" / "local-cpu.yaml"


@contextmanager
def running(config_file: Path = LOCAL_CPU, model: str | None = None) -> Iterator[Cluster]:
    """A ready cluster. SIGTERM ends the program as Ctrl-C does, so that nothing is left running."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began_s = time.monotonic()

    def say(event: Event) -> None:
        print(f"  {time.monotonic() - began_s:5.1f} s  {event.name}: {event.text}", file=sys.stderr, flush=True)

    with (
        tempfile.TemporaryDirectory(prefix="mainstem-") as folder,
        Cluster.start(read_cluster(config_file), Path(folder), model=model, on_event=say) as cluster,
    ):
        cluster.wait_ready()
        yield cluster

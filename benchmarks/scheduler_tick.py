"""What a hand-off costs SGLang's scheduler: time for each tick, with many in flight and with peers that misbehave.

Real SGLang. A probe (benchmarks/tick_probe.py) rides in each worker's scheduler process.

    busy        64 requests at once: their hand-offs are in flight while prefill computes
    quiet       one prefill worker serves, nothing else happens
    stopped     … while the other one, with hand-offs of its own, is frozen (SIGSTOP)
    killed      … while the other one is killed (SIGKILL)
    blackhole   … while requests name a prefill worker whose port takes connections and never answers

`ours` is the time in our own methods, `whole` everything that the scheduler does for hand-offs, without the
time in which it was ready to run and other processes had the cores.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.bench_cluster import changed_config, run_main, running, scheduler_of
from benchmarks.client import Answer, ask, complete
from benchmarks.legs import Pair, direct
from benchmarks.probes import probed
from benchmarks.tick_probe import FILE_VARIABLE, RECORD
from benchmarks.words import sentence
from engine.launch.cluster import Cluster

BUSY = 64
FULL = 60
"""So many in flight count as 64: some end, and others begin, within a tick."""
PROMPT_WORDS = 300
ANSWER_TOKENS = 2
"""Few, so that decode's ticks are short and many while prefill computes."""
HOSTILE = 12
"""Hand-offs that the misbehaving peer has, or would have."""
TICK = np.dtype([("at_s", "<f8"), ("in_flight", "<u4"), ("whole_ns", "<u4"), ("ours_ns", "<u4"), ("no_core_ns", "<u4")])


@dataclass(frozen=True)
class Phase:
    name: str
    began_s: float
    ended_s: float


def main() -> None:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each phase but busy (default 10)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mainstem-ticks-") as name:
        folder = Path(name)
        with running(
            changed_config(folder / "cluster.yaml", lambda tree: _probed(tree, folder)), model=options.model
        ) as cluster:
            phases = list(_phases(cluster, options.seconds))
            decode = scheduler_of(cluster, "decode-0").pid
            prefill = scheduler_of(cluster, "prefill-0").pid
            time.sleep(1)  # the probes write what they have
        ticks = {"decode": _ticks(folder, decode), "prefill": _ticks(folder, prefill)}
    result = {
        "decode": {phase.name: _summary(_within(ticks["decode"], phase)) for phase in phases},
        "prefill": {phase.name: _summary(_within(ticks["prefill"], phase)) for phase in phases},
    }
    quiet = result["decode"]["quiet"]
    for name in ("stopped", "killed", "blackhole"):
        found = result["decode"][name]
        found["longest_over_quiet_ms"] = round((found["whole_us"]["max"] - quiet["whole_us"]["max"]) / 1e3, 3)
    rows = [
        (role, phase, found["ticks"], found["in_flight"], *found["ours_us"].values(), *found["whole_us"].values())
        for role, found_phases in result.items()
        for phase, found in found_phases.items()
    ]
    columns = ("worker", "phase", "ticks", "in flight", "ours us p50", "p99", "max", "whole us p50", "p99", "max")
    report.publish(result, columns, rows, options.json)


def _probed(tree: dict[str, Any], folder: Path) -> None:
    """The probe in every worker, and room for 64 requests on decode."""
    tree["name"] = "scheduler-tick"
    tree["environment"] |= probed(folder, "ticks", "benchmarks.tick_probe:register", FILE_VARIABLE)
    tree["engine"] |= {"max-total-tokens": 49152, "max-running-requests": 2 * BUSY}
    for group in tree["workers"]:
        if group["role"] == "decode":
            group["engine"] = {**group.get("engine", {}), "num-reserved-decode-tokens": 32}


def _phases(cluster: Cluster, seconds: float) -> Iterator[Phase]:
    workers = {worker.name: worker for worker in cluster.plan.workers}
    good, bad, decode = workers["prefill-0"], workers["prefill-1"], workers["decode-0"]
    model = cluster.plan.router.model
    complete(cluster.url, model, sentence(1, 30), 4)  # connections and first-use work
    direct(Pair.of(bad, decode), model, sentence(2, 30), 4)
    report.progress(f"  busy: {BUSY} requests at once")
    with _phase("busy") as busy, ThreadPoolExecutor(BUSY) as pool:
        pairs = [Pair.of(one, decode) for one in (good, bad)]

        def hand_over(seed: int) -> Answer:
            # Not by the router, which keeps back what decode has no room for yet.
            return direct(pairs[seed % 2], model, sentence(100 + seed, PROMPT_WORDS), ANSWER_TOKENS)

        for answer in pool.map(hand_over, range(BUSY)):
            if answer.error:
                raise SystemExit(f"scheduler_tick: wanted an answer, found {answer.status} {answer.error}")
    yield busy[0]
    over = threading.Event()
    served: list[str] = []

    def serve(number: int) -> None:
        for turn in range(10_000):
            if over.is_set():
                return
            served.append(direct(Pair.of(good, decode), model, sentence(number * 10_000 + turn, 40), 16).error)

    with ThreadPoolExecutor(3 + 2 * HOSTILE) as pool:
        for number in range(3):
            pool.submit(serve, number + 1)
        try:
            time.sleep(1)
            report.progress(f"  quiet: {seconds:g} s")
            with _phase("quiet") as quiet:
                time.sleep(seconds)
            yield quiet[0]
            for name, number in (("stopped", signal.SIGSTOP), ("killed", signal.SIGKILL)):
                for _ in range(HOSTILE):
                    pool.submit(direct, Pair.of(bad, decode), model, sentence(random.getrandbits(31), PROMPT_WORDS), 16)
                time.sleep(0.5)
                victim = scheduler_of(cluster, bad.name)
                report.progress(f"  {name}: {seconds:g} s")
                with _phase(name) as phase:
                    os.kill(victim.pid, number)
                    time.sleep(seconds)
                yield phase[0]
                if number is signal.SIGSTOP:
                    os.kill(victim.pid, signal.SIGCONT)
                    time.sleep(2)
            with socket.create_server(("127.0.0.1", 0), backlog=64) as hole:
                report.progress(f"  blackhole: {seconds:g} s")
                with _phase("blackhole") as phase:
                    for _ in range(HOSTILE):
                        pool.submit(_ask_in_vain, f"http://{decode.host}:{decode.port}", model, hole.getsockname()[1])
                    time.sleep(seconds)
                yield phase[0]
        finally:
            over.set()
    if failed := [error for error in served if error]:
        raise SystemExit(f"scheduler_tick: wanted answers from {good.name}, found {len(failed)} errors: {failed[0]}")


def _ask_in_vain(url: str, model: str, port: int) -> None:
    body = {"model": model, "prompt": sentence(random.getrandbits(31), 40), "max_tokens": 4}
    room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": random.randint(1, 2**62)}
    ask(url, "/v1/completions", body | room, timeout_s=30)


@contextmanager
def _phase(name: str) -> Iterator[list[Phase]]:
    """Yields a list that holds the phase once it is over."""
    found: list[Phase] = []
    began_s = time.monotonic()
    yield found
    found.append(Phase(name, began_s, time.monotonic()))


def _ticks(folder: Path, pid: int) -> np.ndarray[Any, Any]:
    data = (folder / f"ticks.{pid}").read_bytes()
    return np.frombuffer(data[: len(data) // RECORD.size * RECORD.size], TICK)


def _within(ticks: np.ndarray[Any, Any], phase: Phase) -> np.ndarray[Any, Any]:
    chosen = ticks[(ticks["at_s"] >= phase.began_s) & (ticks["at_s"] <= phase.ended_s)]
    if phase.name == "busy":
        most = int(chosen["in_flight"].max(initial=0))
        return chosen[chosen["in_flight"] >= min(FULL, most)]
    return chosen


def _summary(ticks: np.ndarray[Any, Any]) -> dict[str, Any]:
    def spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
        if not len(values):
            return {"p50": 0.0, "p99": 0.0, "max": 0.0}
        p50, p99 = np.percentile(values, [50, 99])
        return {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "max": round(float(values.max()), 1)}

    in_flight = int(np.median(ticks["in_flight"])) if len(ticks) else 0
    whole_us = np.maximum(ticks["whole_ns"].astype(float) - ticks["no_core_ns"], 0) / 1e3
    return {
        "ticks": len(ticks),
        "in_flight": in_flight,
        "ours_us": spread(ticks["ours_ns"] / 1e3),
        "whole_us": spread(whole_us),
        "no_core_us": spread(ticks["no_core_ns"] / 1e3),
    }


if __name__ == "__main__":
    sys.exit(run_main(main))

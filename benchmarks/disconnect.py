"""A client closes its connection: how long do prefill and decode go on with its request?

Real SGLang on a CPU. One request at a time, closed while its prompt is computed or while its answer is generated,
streamed and whole. From then on every worker is asked to empty its cache, which SGLang does only where it has nothing
to do: no request that runs, waits, or is on its way between the two. The time until then is bounded from below by the
step that is being computed: a scheduler hears of nothing before its end.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks import report
from benchmarks.bench_cluster import emptied, run_main, running
from benchmarks.reference import prompt_of
from engine.launch.cluster import Cluster

ROUNDS = 8
PROMPT_TOKENS, DECODING_PROMPT_TOKENS = 1000, 40
ANSWER_TOKENS = 400
PREFILLING_S, DECODING_S = 0.5, 2.5
POLL_S = 0.02
IDLE_S = 60.0


@dataclass(frozen=True)
class Point:
    """When a client leaves."""

    name: str
    prompt_tokens: int
    after_s: float


POINTS = (
    Point("its prompt is computed", PROMPT_TOKENS, PREFILLING_S),
    Point("its answer is generated", DECODING_PROMPT_TOKENS, DECODING_S),
)


def main() -> int:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"clients of each kind (default {ROUNDS})")
    options = parser.parse_args()
    measured: list[dict[str, Any]] = []
    with running(model=options.model) as cluster:
        _left(cluster, Point("", DECODING_PROMPT_TOKENS, DECODING_S), stream=True, seed=1)  # Compiles what it has to.
        for point in POINTS:
            for stream in (True, False):
                rounds = [_left(cluster, point, stream, seed) for seed in range(100, 100 + options.rounds)]
                measured.append({"left_while": point.name, "stream": stream} | _summary(rounds))
                report.progress(f"  {measured[-1]}")
    result = {"rows": measured, "rounds": options.rounds, "polled_every_s": POLL_S, "answer_tokens": ANSWER_TOKENS}
    columns = ("left while", "answer", "prefill idle, median s", "worst", "decode idle, median s", "worst")
    rows = [
        (
            row["left_while"],
            "streamed" if row["stream"] else "whole",
            *(row[f"{role}_{what}_s"] for role in ("prefill", "decode") for what in ("median", "worst")),
        )
        for row in measured
    ]
    report.publish(result, columns, rows, options.json)
    return 0


def _summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    found = {}
    for role in ("prefill", "decode"):
        taken_s = [one[role] for one in rounds]
        found[f"{role}_median_s"], found[f"{role}_worst_s"] = report.median(taken_s), round(max(taken_s), 3)
    return found


def _left(cluster: Cluster, point: Point, stream: bool, seed: int) -> dict[str, float]:
    """Seconds from a client's leaving until all workers of a role have nothing to do."""
    target = urlsplit(cluster.url)
    client = http.client.HTTPConnection(target.hostname or "", target.port, timeout=IDLE_S)
    body = {
        "model": cluster.plan.router.model,
        "prompt": prompt_of(point.prompt_tokens, seed=seed + 1000 * stream),
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "stream": stream,
    }
    client.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    time.sleep(point.after_s)
    if all(emptied(cluster, worker.name) for worker in cluster.plan.workers):
        raise RuntimeError(f"wanted a request at work after {point.after_s} s, found idle workers")
    client.close()
    left_s = time.monotonic()
    idle_s: dict[str, float] = {}

    def watch(name: str) -> None:
        while time.monotonic() < left_s + IDLE_S:
            if emptied(cluster, name):
                idle_s[name] = time.monotonic() - left_s
                return
            time.sleep(POLL_S)

    watching = [threading.Thread(target=watch, args=(worker.name,)) for worker in cluster.plan.workers]
    for thread in watching:
        thread.start()
    for thread in watching:
        thread.join()
    if len(idle_s) < len(watching):
        raise RuntimeError(f"wanted idle workers within {IDLE_S:.0f} s of the client's leaving, found {sorted(idle_s)}")
    return {
        role: max(idle_s[worker.name] for worker in cluster.plan.workers if worker.role == role)
        for role in ("prefill", "decode")
    }


if __name__ == "__main__":
    sys.exit(run_main(main))

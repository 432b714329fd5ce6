"""Requests aborted at random moments, through real SGLang: do the others' outputs stay what they were?

References come from one SGLang worker that does prefill and decode by itself, undisturbed, at
temperature 0 (near ties are replaced beforehand, as in tests/cluster/test_identity.py). Then a
cluster with little room on decode, so that pages are given away again at once, answers the same
prompts while others are aborted:

    client    the client closes its connection: the router aborts both legs
    prefill   the request is aborted on the prefill worker alone
    decode    the request is aborted on the decode worker alone
    both      on both workers, without the router

Where one leg was aborted and the other does not end by itself within a few seconds (the aborted one had not
spoken of the hand-off yet), the other is aborted too, as the router does at once, and that is counted.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import report
from benchmarks.bench_cluster import changed_config, run_main, running
from benchmarks.reference import OUTPUT_TOKENS, Reference, generate, prompt_of
from benchmarks.undisturbed import undisturbed
from engine.launch.cluster import Cluster

KINDS = ("client", "prefill", "decode", "both")
KEEPERS = 3
"""Clients whose answers are compared, one request each at a time."""
ABORTERS = 6
LONGEST_PROMPT_TOKENS = 250
"""Of a request that is aborted: SGLang computes a prompt to its end, aborted or not."""
LONGEST_S = 2.0
"""A request is aborted at a random moment up to so long after it was sent: in the queue, in prefill, in the
hand-off, or while it is being answered."""
OTHER_LEG_S = 5.0
HANG_S = 60.0
DECODE_TOKENS = 4096
"""KV slots of the decode worker: what an aborted request gives back, another has within moments."""


@dataclass
class Tally:
    """What happened. Guarded by `lock`."""

    wanted: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    aborts: Counter[str] = field(default_factory=Counter)
    too_late: int = 0
    """Requests that were over before their moment came."""
    compared: int = 0
    different: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Requests that nobody aborted, and that failed all the same."""
    hangs: int = 0
    other_leg_aborted: int = 0
    """Legs that had to be told that the other was aborted."""

    interrupted: bool = False

    @property
    def enough(self) -> bool:
        return self.interrupted or sum(self.aborts.values()) >= self.wanted


def main() -> None:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    parser.add_argument("--aborts", type=int, default=500, help="how many (default 500)")
    parser.add_argument("--prompts", type=int, default=24, help="how many prompts are compared (default 24)")
    parser.add_argument("--transport", default="shm", help="shm, tcp or nixl (default shm)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="60 aborts, 8 prompts")
    options = parser.parse_args()
    aborts, prompts = (60, 8) if options.quick else (options.aborts, options.prompts)
    chooser = random.Random(options.seed)
    lengths = [chooser.randint(5, 400) for _ in range(prompts)]
    with tempfile.TemporaryDirectory(prefix="mainstem-aborts-") as folder:
        references, replaced = undisturbed(Path(folder), options.model, lengths)
        together = changed_config(Path(folder) / "together.yaml", lambda tree: _together(tree, options.transport))
        with running(together, model=options.model) as cluster:
            tally = disturb(cluster, references, aborts, options.seed)
    result = {
        "transport": options.transport,
        "aborts": sum(tally.aborts.values()),
        "aborts_by_kind": dict(tally.aborts),
        "over_before_their_abort": tally.too_late,
        "compared": tally.compared,
        "different": tally.different,
        "failed": dict(tally.failed),
        "hangs": tally.hangs,
        "other_leg_aborted": tally.other_leg_aborted,
        "output_tokens": OUTPUT_TOKENS,
        "prompts": len(references),
        "near_ties_replaced": replaced,
        "seed": options.seed,
    }
    columns = ("transport", "aborts", "outputs compared", "different", "failed", "hangs")
    row = (
        options.transport,
        result["aborts"],
        tally.compared,
        tally.different,
        sum(tally.failed.values()),
        tally.hangs,
    )
    report.publish(result, columns, [row], options.json)
    if tally.different or tally.hangs:
        raise SystemExit(1)


def disturb(cluster: Cluster, references: list[Reference], aborts: int, seed: int) -> Tally:
    """Answers references over and over until so many other requests have been aborted beside them."""
    tally = Tally(aborts)

    def keep(number: int) -> None:
        turn = number
        while not tally.enough:
            _compare(cluster, references[turn % len(references)], tally)
            turn += KEEPERS

    def abort(number: int) -> None:
        chooser = random.Random(seed * 1000 + number)
        while not tally.enough:
            _abort_one(cluster, chooser, tally)

    with ThreadPoolExecutor(KEEPERS + ABORTERS) as pool:
        running_now = [pool.submit(keep, number) for number in range(KEEPERS)]
        running_now += [pool.submit(abort, number) for number in range(ABORTERS)]
        try:
            while not tally.enough and not any(one.done() for one in running_now):
                time.sleep(2)
                done = sum(tally.aborts.values())
                report.progress(f"  {done} of {aborts} aborted, {tally.compared} compared, {tally.different} different")
        except KeyboardInterrupt:
            tally.interrupted = True
            raise
        for one in running_now:
            one.result()
    for reference in references:  # The pages that they left are given out once more.
        _compare(cluster, reference, tally)
    return tally


def _compare(cluster: Cluster, reference: Reference, tally: Tally) -> None:
    try:
        choice = generate(cluster.url, cluster.plan.router.model, reference.prompt, HANG_S)
    except TimeoutError:
        with tally.lock:
            tally.hangs += 1
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        with tally.lock:
            tally.failed[f"{type(error).__name__}: {error}"[:200]] += 1
        return
    with tally.lock:
        tally.compared += 1
        tally.different += (choice["logprobs"]["tokens"], choice["text"]) != (reference.tokens, reference.text)


def _abort_one(cluster: Cluster, chooser: random.Random, tally: Tally) -> None:
    kind = chooser.choice(KINDS)
    prompt = prompt_of(chooser.randint(20, LONGEST_PROMPT_TOKENS), chooser.getrandbits(32))
    body = {"prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True, "stream": True}
    body["model"] = cluster.plan.router.model
    after_s = chooser.random() ** 2 * LONGEST_S
    early = (
        _hang_up(cluster.url, body, after_s)
        if kind == "client"
        else _abort_legs(cluster, body, kind, after_s, chooser, tally)
    )
    with tally.lock:
        tally.hangs += early is None
        tally.too_late += early is False
        tally.aborts[kind] += early is True


def _hang_up(url: str, body: dict[str, Any], after_s: float) -> bool:
    """Sends the request and closes the connection; whether it was not over by then."""
    leg = Leg(url, body)
    leg.join(after_s)
    over = leg.over
    leg.close()
    return not over


def _abort_legs(
    cluster: Cluster, body: dict[str, Any], kind: str, after_s: float, chooser: random.Random, tally: Tally
) -> bool | None:
    """Sends both legs, aborts one or both; whether that came before the end. None where a leg then hangs."""
    workers = cluster.plan.workers
    prefill = chooser.choice([worker for worker in workers if worker.role == "prefill"])
    decode = next(worker for worker in workers if worker.role == "decode")
    rid = f"abort-{chooser.getrandbits(64):016x}"
    body |= {
        "rid": rid,
        "bootstrap_host": prefill.host,
        "bootstrap_port": prefill.handoff_port,
        "bootstrap_room": chooser.randint(1, 2**62),
    }
    urls: dict[str, str] = {worker.role: f"http://{worker.host}:{worker.port}" for worker in (prefill, decode)}
    legs = {role: Leg(url, body | {"stream": role == "decode"}) for role, url in urls.items()}
    legs["decode"].join(after_s)
    over = legs["decode"].over
    for role in urls if kind == "both" else (kind,):
        post_text(urls[role], "/abort_request", {"rid": rid})
    for leg in legs.values():
        leg.join(OTHER_LEG_S)
    for role, leg in legs.items():
        if not leg.over:
            post_text(urls[role], "/abort_request", {"rid": rid})
            with tally.lock:
                tally.other_leg_aborted += 1
    for leg in legs.values():
        leg.join(HANG_S)
    hung = any(not leg.over for leg in legs.values())
    for leg in legs.values():
        leg.close()
    return None if hung else not over


class Leg:
    """One request, read in a thread of its own until it ends or is closed."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        target = urlsplit(url)
        self._connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=HANG_S)
        self._connection.connect()
        self._thread = threading.Thread(target=self._read, args=(json.dumps(body),))
        self._thread.start()

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def close(self) -> None:
        if self._connection.sock is not None:
            self._connection.sock.close()
        self._thread.join(HANG_S)

    def _read(self, payload: str) -> None:
        try:
            self._connection.request("POST", "/v1/completions", payload, {"content-type": "application/json"})
            self._connection.getresponse().read()
        except (OSError, ValueError, AttributeError, http.client.HTTPException):
            return  # Closed, or refused: it is over.


def post_text(url: str, path: str, body: dict[str, Any]) -> None:
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=HANG_S)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    connection.getresponse().read()
    connection.close()


def _together(tree: dict[str, Any], transport: str) -> None:
    """This transport, and little room on decode."""
    tree["name"] = "aborts"
    tree["transfer"]["transports"] = [transport]
    for group in tree["workers"]:
        if group["role"] == "decode":
            little = {"max-total-tokens": DECODE_TOKENS, "num-reserved-decode-tokens": 64}
            group["engine"] = {**group.get("engine", {}), **little}


if __name__ == "__main__":
    sys.exit(run_main(main))

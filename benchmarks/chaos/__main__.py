"""Faults of every kind at every point of a request's life, on real SGLang: what each client saw, and what is left.

Two prefill and two decode workers of a small model on a CPU, two routers, and a plain TCP balancer in front of them.
Requests run at temperature 0 and are compared with what one undisturbed SGLang says (near ties are replaced
beforehand). Each injection meets one wave of requests and a pulse of small ones beside it:

    SIGKILL of a scheduler, of a worker's HTTP process (where its agent lives), of a router
    SIGSTOP and SIGCONT of a whole worker, or of its scheduler alone
    TCP connections reset, held, or slowed down, to a worker's API or its hand-off port
    decode workers whose KV pool is full

Every relay is a TCP connection that this program passes on. Afterwards the workers' caches are emptied, and what they
have to give is compared with what they had in the beginning.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.bench_cluster import changed_config, run_main, running
from benchmarks.chaos.faults import Faults, Ports
from benchmarks.chaos.injections import KILLS, Injection, Kind, injections
from benchmarks.chaos.leaks import Pools, flushed, leaked_requests, leaked_tokens
from benchmarks.chaos.relay import Relays, free_base
from benchmarks.chaos.traffic import HANG_S, Asked, Pulse, Verdict
from benchmarks.client import get_json
from benchmarks.reference import OUTPUT_TOKENS, Reference
from benchmarks.undisturbed import undisturbed
from benchmarks.unfinished import Unfinished, continue_argument
from engine.launch.cluster import Cluster

WAVE = 4
"""Requests for each injection, the first of which gives the time."""
SPREAD_S = 0.3
"""Between the first and the last of a wave."""
INJECTIONS, QUICK_INJECTIONS = 104, 10
PROMPT_TOKENS = (150, 500)
PROMPTS = 16
BACK_S = 120.0
"""Within which everything is ready again after a fault."""
DECODE_TOKENS = 4096
"""KV slots of a decode worker: a few long requests fill it."""
HUNG_S = 8.0
LEAK_LINES = ("memory leak detected", "pool memory leak")
"""How SGLang's own check of an idle scheduler says that something is missing, before it ends the worker."""


@dataclass
class Tally:
    """What happened so far."""

    verdicts: Counter[str] = field(default_factory=Counter)
    by_kind: dict[str, Counter[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    injections: int = 0
    worst_unavailable_s: float = 0.0

    def add(self, kind: str, verdict: str, problem: str = "") -> None:
        self.verdicts[verdict] += 1
        self.by_kind.setdefault(kind, Counter())[verdict] += 1
        if problem:
            self.problems.append(problem)

    def merge(self, unit: dict[str, Any]) -> None:
        """What one injection came to."""
        self.injections += 1
        self.worst_unavailable_s = max(self.worst_unavailable_s, unit["unavailable_s"])
        for verdict in unit["verdicts"]:
            self.add(unit["kind"], verdict)
        self.problems += unit["problems"]


def main() -> int:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    continue_argument(parser)
    parser.add_argument("--injections", type=int, default=INJECTIONS, help=f"how many (default {INJECTIONS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_INJECTIONS} injections")
    parser.add_argument("--kind", help="only this kind of fault, for example 'SIGSTOP'")
    parser.add_argument("--transport", default="tcp", help="tcp or shm (default tcp: its pages pass the relays too)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    wanted = QUICK_INJECTIONS if options.quick else options.injections
    listed = [one for one in injections(wanted) if options.kind in (None, one.kind.value)]
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mainstem-chaos-") as folder, Relays() as relays:
        chooser = random.Random(options.seed)
        # The first one is short: the pulse's.
        lengths = [12, *(chooser.randint(*PROMPT_TOKENS) for _ in range(PROMPTS))]
        references, _ = undisturbed(Path(folder), options.model, lengths)
        with _disturbed(Path(folder), options, relays) as (cluster, faults, url):
            chaos = _Chaos(cluster, faults, url, references, chooser)
            before = flushed(cluster, cluster.url)
            chaos.warm_up()
            finished = Unfinished(options.unfinished)
            tally = Tally()
            for place, one in enumerate(listed, 1):
                unit = {**one.unit, "transport": options.transport, "seed": options.seed}
                result = finished.once(unit, lambda one=one: chaos.run(one))  # type: ignore[misc]
                tally.merge(result)
                passed_s = time.monotonic() - began_s
                report.progress(
                    f"  {passed_s / 60:4.1f} min  {place:3d} of {len(listed)}  {one.kind.value:18} {one.point.name:26} "
                    f"{one.role:8} {dict(Counter(result['verdicts']))} {'; '.join(result['problems'])}"
                )
            chaos.until_ready()
            after = flushed(cluster, cluster.url)
            complaints = _complaints(cluster)
    return _publish(options, tally, before, after, complaints)


@contextmanager
def _disturbed(folder: Path, options: Any, relays: Relays) -> Iterator[tuple[Cluster, Faults, str]]:
    """A ready cluster whose every port has a relay in front of it, and the address of a balancer of its routers."""
    names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    own, advertised = free_base(40), 0
    advertised = own + 4 * len(names)
    balancer = advertised + 4 * len(names)

    def change(tree: dict[str, Any]) -> None:
        tree["name"] = "chaos"
        tree["router"] |= {"replicas": 2, "port": balancer + 1, "hung_s": HUNG_S, "handoff_floor_s": 8.0}
        tree["launch"] = {"restarts": 1000}
        tree["transfer"] = {"transports": [options.transport, "tcp"] if options.transport != "tcp" else ["tcp"]}
        groups = {group["role"]: group for group in tree["workers"]}
        groups["decode"].setdefault("engine", {})["max-total-tokens"] = DECODE_TOKENS
        tree["workers"] = [
            {
                **groups[name.partition("-")[0]],
                "count": 1,
                "port_base": own + 4 * place,
                "advertise_base": advertised + 4 * place,
            }
            for place, name in enumerate(names)
        ]

    ports: dict[str, Ports] = {}
    for place, name in enumerate(names):
        http, handoff, *_ = (
            relays.add(advertised + 4 * place + number, ("127.0.0.1", own + 4 * place + number)) for number in range(4)
        )
        ports[name] = Ports(http, handoff)
    relays.add(balancer, ("127.0.0.1", balancer + 1), ("127.0.0.1", balancer + 2))
    with running(changed_config(folder / "chaos.yaml", change), model=options.model) as cluster:
        model = cluster.plan.router.model
        yield cluster, Faults(cluster, ports, model), f"http://127.0.0.1:{balancer}"


class _Chaos:
    """A cluster, its clients and its faults."""

    def __init__(
        self, cluster: Cluster, faults: Faults, url: str, references: list[Reference], chooser: random.Random
    ) -> None:
        self._cluster = cluster
        self._faults = faults
        self._url = url
        self._model = cluster.plan.router.model
        self._pulse, *self._prompts = references
        self._chooser = chooser
        self._first_token_s = 2.0
        self._token_s = 0.1

    def warm_up(self) -> None:
        """Two waves without a fault: how long things take. Raises RuntimeError where even that fails."""
        for _ in range(2):
            wave = self._wave(stream=True)
            verdicts = [one.verdict() for one in wave]
            if set(verdicts) != {Verdict.OK}:
                raise RuntimeError(f"wanted a wave without a fault to go well, found {verdicts}")
            firsts = sorted(one.first_s or 0.0 for one in wave)
            self._first_token_s = firsts[len(firsts) // 2]
            self._token_s = max((one.took_s - (one.first_s or 0)) / (one.tokens - 1) for one in wave)
        report.progress(f"  first token after {self._first_token_s:.2f} s, then {self._token_s:.3f} s each")

    def run(self, one: Injection) -> dict[str, Any]:
        """One injection, from all well to all well again."""
        self.until_ready()
        pulse = Pulse(self._url, self._model, self._pulse)
        try:
            wave = self._wave(one.stream)
            victim = self._at(one, wave[0])
            restarts = self._restarts()
            with self._faults.injected(one, victim):
                pass
            if one.kind in KILLS:
                # Who was killed looks well until somebody notices.
                self._until(lambda: self._restarts() > restarts)
            verdicts = [(asked, asked.verdict()) for asked in wave]
            self.until_ready()
        finally:
            pulse.stop()
        verdicts += [(asked, asked.verdict()) for asked in pulse.asked]
        said, problems = [], []
        for asked, verdict in verdicts:
            tries = self._tries(asked.rid)
            said.append("retried_ok" if verdict is Verdict.OK and len(tries) > 1 else verdict.value)
            if verdict is not Verdict.OK:
                problems.append(_problem(asked, verdict, tries))
        return {
            "kind": one.kind.value,
            "verdicts": said,
            "problems": problems,
            "unavailable_s": round(pulse.worst_gap_s, 2),
        }

    def until_ready(self) -> None:
        """Until every router uses every worker. Raises TimeoutError."""
        self._until(lambda: all(self._all_ready(url) for url in self._cluster.plan.urls))

    def _restarts(self) -> int:
        return sum(process.restarts for process in self._cluster.view.processes)

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + BACK_S
        while not holds():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"wanted all ready within {BACK_S:.0f} s, found {self._cluster.view.processes}")
            time.sleep(0.2)

    def _all_ready(self, url: str) -> bool:
        try:
            workers = get_json(url, "/api/state")["workers"]
        except (OSError, ValueError):
            return False
        names = {worker.name for worker in self._cluster.plan.workers}
        return {one["name"] for one in workers if one["state"] == "ready" and one["mode"] == "exact"} == names

    def _wave(self, stream: bool) -> list[Asked]:
        chosen = self._chooser.sample(self._prompts, WAVE)
        wave = []
        for reference in chosen:
            wave.append(Asked(self._url, self._model, reference, stream, OUTPUT_TOKENS))
            time.sleep(SPREAD_S / WAVE)
        return wave

    def _at(self, one: Injection, target: Asked) -> str:
        """Waits until the injection's point, and says whom it hits: who serves the target, where that is known."""
        at_s = target.began_s + one.point.of_first_token * self._first_token_s
        if one.point.tokens and one.stream:
            target.wait_for(one.point.tokens, HANG_S)
        else:
            at_s += one.point.tokens * self._token_s
            time.sleep(max(0.0, at_s - time.monotonic()))
        names = [worker.name for worker in self._cluster.plan.workers if worker.role == one.role]
        for request in self._requests():
            if request["prompt_tokens"] == len(target.reference.prompt) and request["outcome"] == "running":
                return str(request[one.role])
        return self._chooser.choice(names)

    def _requests(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for url in self._cluster.plan.urls:
            try:
                found += get_json(url, "/api/state")["requests"]
            except (OSError, ValueError):
                continue
        return found

    def _tries(self, rid: str) -> list[dict[str, Any]]:
        """The attempts at a request, as the router that had it tells."""
        for url in self._cluster.plan.urls:
            try:
                tries: list[dict[str, Any]] = get_json(url, f"/api/explain/{rid}")["tries"]
            except (OSError, ValueError):
                continue
            return tries
        return []


def _problem(asked: Asked, verdict: Verdict, tries: list[dict[str, Any]]) -> str:
    what = asked.error or asked.text[-60:] or "nothing"
    way = "stream" if asked.stream else "whole"
    ways = ", ".join(f"{one['prefill']} {one['decode']} {one['failed']} {one['then']}" for one in tries)
    return (
        f"{verdict.value} ({way}, {asked.tokens} tokens, {asked.took_s:.1f} s): {what!r}; tries: {ways or 'none known'}"
    )


def _complaints(cluster: Cluster) -> list[str]:
    """Lines in which SGLang's own check found something missing."""
    found = []
    for view in cluster.view.processes:
        for line in view.log_file.read_text(errors="replace").splitlines():
            if any(said in line for said in LEAK_LINES):
                found.append(f"{view.name}: {line[:160]}")
    return found


def _publish(
    options: Any, tally: Tally, before: dict[str, Pools], after: dict[str, Pools], complaints: list[str]
) -> int:
    count: Callable[[str], int] = lambda name: tally.verdicts[name]  # noqa: E731
    requests = sum(tally.verdicts.values())
    well = count("ok") + count("retried_ok")
    cut_by_routers = sum(tally.by_kind.get(Kind.KILL_ROUTER.value, Counter())[name] for name in ("cut", "clean_error"))
    result = {
        "injections": tally.injections,
        "requests": requests,
        "ok": count("ok"),
        "retried_ok": count("retried_ok"),
        "clean_errors": count("clean_error") + count("cut"),
        "of_which_cut_by_a_killed_router": cut_by_routers,
        "hangs": count("hang"),
        "empty_200": count("empty_200"),
        "wrong_output": count("wrong_output"),
        "leaked_pages": sum(leaked_tokens(before[name], after[name]) for name in before),
        "leaked_requests": sum(leaked_requests(before[name], after[name]) for name in before) + len(complaints),
        "worst_unavailable_s": tally.worst_unavailable_s,
        "success": round(well / requests, 4),
        "success_without_killed_routers": round(well / max(1, requests - cut_by_routers), 4),
        "pools_before": {name: asdict(pools) for name, pools in before.items()},
        "pools_after": {name: asdict(pools) for name, pools in after.items()},
        "by_kind": {kind: dict(verdicts) for kind, verdicts in tally.by_kind.items()},
        "problems": tally.problems,
        "complaints": complaints,
        "transport": options.transport,
        "output_tokens": OUTPUT_TOKENS,
        "seed": options.seed,
    }
    columns = ("kind", "ok", "retried, ok", "errors", "hangs", "empty 200", "wrong")
    rows = [
        (
            kind,
            said["ok"],
            said["retried_ok"],
            said["clean_error"] + said["cut"],
            said["hang"],
            said["empty_200"],
            said["wrong_output"],
        )
        for kind, said in tally.by_kind.items()
    ]
    report.publish(result, columns, rows, options.json)
    if not options.json:
        print(json.dumps({key: value for key, value in result.items() if key not in ("by_kind", "problems")}))
    bad = ("hangs", "empty_200", "wrong_output", "leaked_pages", "leaked_requests")
    return 1 if any(result[name] for name in bad) else 0


if __name__ == "__main__":
    sys.exit(run_main(main))

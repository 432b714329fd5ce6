"""The matrix of faults at scale, on simulated workers: is a request lost, does one hang, is one answered wrongly?

A real router over real sockets; the workers are simulated (`router.fake_worker`): they compute nothing, but hand over,
stream, fail and come back as workers do. Every second another one fails in another way, and is itself again two
seconds later. The answers are known, token by token.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from benchmarks import report
from benchmarks.bench_cluster import LOCAL_CPU, run_main
from benchmarks.simulated import serving
from engine.config import read_cluster
from engine.model import choose_model
from router.app import Router
from router.config import RouterSection, RouterSpec
from router.fake_worker import FakeWorker, Fault, Handoffs
from transfer.auth import ClusterKey

WORKERS = 64
REQUESTS = 10_000
CLIENTS = 64
FAULT_EVERY_S = 1.0
SICK_S = 2.0
HANG_S = 30.0
RENEW_S = 0.5
PREFIXES = 200
TOKENS = (4, 12)
KILLED, SILENT = "killed", "scheduler hangs"
SICKNESSES = (
    KILLED,
    SILENT,
    Fault.ERROR,
    Fault.HANG,
    Fault.DROP,
    Fault.EMPTY,
    Fault.ERROR_EVENT_FIRST,
    Fault.ERROR_EVENT,
    Fault.ABORTED,
    Fault.DIE_MIDSTREAM,
    Fault.OTHER_PROMPT,
    Fault.HANDOFF,
    Fault.STALL,
)


@dataclass
class Tally:
    verdicts: Counter[str] = field(default_factory=Counter)
    sicknesses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


def main() -> int:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"half of each role (default {WORKERS})")
    parser.add_argument("--requests", type=int, default=REQUESTS, help=f"how many (default {REQUESTS})")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    return asyncio.run(_measure(options))


async def _measure(options: argparse.Namespace) -> int:
    model = read_cluster(LOCAL_CPU).model
    served = choose_model(model.path, model.served_name, options.model)
    key = ClusterKey.generate()
    with tempfile.TemporaryDirectory(prefix="mainstem-scale-") as folder:
        key.write(Path(folder) / "key")
        section = RouterSection(
            handoff_floor_s=3, stall_timeout_s=3, first_byte_timeout_s=6, hung_s=3, retries=4, resumes=4
        )
        spec = RouterSpec(
            section=section,
            model="simulated",
            model_path=served.path,
            key_file=Path(folder) / "key",
            cluster="scale",
        )
        async with serving(spec) as (router, url):
            scale = _Scale(router, url, key, options)
            began_s = time.monotonic()
            tally = await scale.run()
            took_s = time.monotonic() - began_s
    return _publish(options, tally, took_s, scale)


class _Scale:
    def __init__(self, router: Router, url: str, key: ClusterKey, options: argparse.Namespace) -> None:
        self._router = router
        self._url = url
        self._options = options
        self._chooser = random.Random(options.seed)
        handoffs = Handoffs()
        half = options.workers // 2
        self._workers = [
            FakeWorker(f"{role}-{number}", role, key, handoffs, model="simulated", page_tokens=16, lease_s=2.0)
            for role in ("prefill", "decode")
            for number in range(half)
        ]
        self._renewing: dict[str, asyncio.Task[None]] = {}
        self._tally = Tally()
        self._left = iter(range(options.requests))
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> Tally:
        for worker in self._workers:
            await worker.start()
            self._renew(worker)
        while self._router.unready():
            await asyncio.sleep(0.05)
        failing = asyncio.create_task(self._fail_for_ever())
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=HANG_S)
        try:
            async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
                await asyncio.gather(*(self._client(session) for _ in range(CLIENTS)))
        finally:
            failing.cancel()
            await asyncio.gather(failing, *self._tasks, return_exceptions=True)
            await self._until_idle()
            for worker in self._workers:
                await worker.stop()
        return self._tally

    @property
    def left_behind(self) -> dict[str, int]:
        """What the router still counts when nobody asks for anything any more."""
        return {
            "inflight_requests": sum(worker.inflight_requests for worker in self._router.fleet),
            "outstanding_tokens": sum(worker.outstanding_uncached_tokens for worker in self._router.fleet),
            "reserved_tokens": sum(worker.reserved_tokens for worker in self._router.fleet),
            "waiting": len(self._router.admission),
        }

    async def _until_idle(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(HANG_S):
                while any(self.left_behind.values()):
                    await asyncio.sleep(0.1)

    def _renew(self, worker: FakeWorker) -> None:
        self._renewing[worker.name] = worker.renew(self._url, RENEW_S)

    async def _fail_for_ever(self) -> None:
        for number in range(10**9):
            await asyncio.sleep(FAULT_EVERY_S)
            well = [worker for worker in self._workers if worker.fault is Fault.NONE and not worker.silent_s]
            if well:
                task = asyncio.create_task(
                    self._sicken(self._chooser.choice(well), SICKNESSES[number % len(SICKNESSES)])
                )
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _sicken(self, worker: FakeWorker, sickness: str) -> None:
        self._tally.sicknesses[str(sickness)] += 1
        if sickness == KILLED:
            worker.fault = Fault.HANG  # So that nobody makes it sick twice.
            await worker.stop()
            await asyncio.sleep(SICK_S)
            worker.epoch, worker.fault = time.time_ns(), Fault.NONE
            await worker.start()
            self._renew(worker)
        elif sickness == SILENT:
            worker.silent_s = 60.0
            worker.gate.clear()
            await asyncio.sleep(SICK_S)
            worker.silent_s = 0.0
            worker.gate.set()
        else:
            worker.fault = Fault(sickness)
            await asyncio.sleep(SICK_S)
            worker.fault = Fault.NONE

    async def _client(self, session: aiohttp.ClientSession) -> None:
        for number in self._left:
            if number % 1000 == 0:
                report.progress(f"  {number} of {self._options.requests} requests: {dict(self._tally.verdicts)}")
            self._tally.verdicts[await self._ask(session, number)] += 1

    async def _ask(self, session: aiohttp.ClientSession, number: int) -> str:
        chooser = random.Random(self._options.seed * 1_000_003 + number)
        prefix = chooser.randrange(PREFIXES)
        tokens, stream = chooser.randint(*TOKENS), chooser.random() < 0.5
        prompt = [1000 + prefix * 7 + place % 50 for place in range(96)] + [chooser.randrange(500) for _ in range(32)]
        body = {"model": "simulated", "prompt": prompt, "max_tokens": tokens, "stream": stream}
        wanted = " ".join(f"t{place}" for place in range(tokens))
        try:
            async with session.post(f"{self._url}/v1/completions", json=body) as response:
                raw = await response.read()
        except TimeoutError:
            return "hang"
        except aiohttp.ClientError as error:
            self._tally.errors[type(error).__name__] += 1
            return "unclean_error"
        text, told = _streamed(raw) if stream and response.status == 200 else _whole(raw, response.status)
        if told:
            self._tally.errors[told] += 1
            return "clean_error"
        if not text:
            return "empty_200"
        return "ok" if text.strip() == wanted else "wrong_output"


def _whole(raw: bytes, status: int) -> tuple[str, str]:
    answer = msgspec.json.decode(raw)
    if status != 200:
        return "", f"{status} {answer['error']['code']}"
    choice: dict[str, Any] = answer["choices"][0]
    # A chat's or a completion's: the simulated worker knows only the one for the other's path.
    return str(choice.get("text") or choice["message"]["content"]), ""


def _streamed(raw: bytes) -> tuple[str, str]:
    text, done = "", False
    for line in raw.split(b"\n"):
        if not line.startswith(b"data: "):
            continue
        if line[6:] == b"[DONE]":
            done = True
            continue
        event = msgspec.json.decode(line[6:])
        if "error" in event:
            return "", f"event {event['error']['code']}"
        text += "".join(choice.get("text") or "" for choice in event["choices"])
    return (text, "") if done else (text, "event: no end")


def _publish(options: argparse.Namespace, tally: Tally, took_s: float, scale: _Scale) -> int:
    requests = sum(tally.verdicts.values())
    left = scale.left_behind
    result = {
        "workers": options.workers,
        "requests": requests,
        "injections": sum(tally.sicknesses.values()),
        "ok": tally.verdicts["ok"],
        "clean_errors": tally.verdicts["clean_error"],
        "unclean_errors": tally.verdicts["unclean_error"],
        "hangs": tally.verdicts["hang"],
        "empty_200": tally.verdicts["empty_200"],
        "wrong_output": tally.verdicts["wrong_output"],
        "lost": options.requests - requests,
        "left_behind": left,
        "success": round(tally.verdicts["ok"] / requests, 5),
        "errors": dict(tally.errors),
        "sicknesses": dict(tally.sicknesses),
        "took_s": round(took_s, 1),
        "seed": options.seed,
        "engine": "simulated workers",
    }
    columns = ("workers", "requests", "faults", "ok", "clean errors", "hangs", "empty 200", "wrong", "lost")
    row = tuple(
        result[name]
        for name in (
            "workers",
            "requests",
            "injections",
            "ok",
            "clean_errors",
            "hangs",
            "empty_200",
            "wrong_output",
            "lost",
        )
    )
    report.publish(result, columns, [row], options.json)
    bad = ("unclean_errors", "hangs", "empty_200", "wrong_output", "lost")
    return 1 if any(result[name] for name in bad) or any(left.values()) else 0


if __name__ == "__main__":
    sys.exit(run_main(main))

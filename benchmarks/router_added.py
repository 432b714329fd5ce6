"""What the router adds to a first token's time, by the prompt's length: a real router, workers that compute nothing.

    python -m benchmarks.router_added [--json] [--model NAME]

Router, workers and client are a process each. The workers are simulated: a prefill worker answers once it has read the
request, a decode worker sends its tokens once prefill has answered. `direct` sends both legs by hand, as the router
does; `added` is the router's median minus that, both with decode's first token: prefill's would come sooner. Token ids
are the client's own; a chat is text that the router renders, which the simulated workers do not: there `rendering` is a
part of what is added, and an engine is spared it. `8 x` is eight requests whose bytes come at once: until the first of
their first tokens, which is how long a worker that has nothing to do waits for something.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import selectors
import socket
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import report
from benchmarks.bench_cluster import LOCAL_CPU, run_main
from benchmarks.client import DECODES, Answer, ask, ask_ready, get_json, streaming
from benchmarks.legs import Pair
from benchmarks.words import sentence
from engine.config import read_cluster
from engine.model import choose_model
from router import server
from router.config import RouterSection, RouterSpec
from router.fake_worker import FakeWorker, Handoffs
from router.openai import Endpoint, read
from router.planner import render
from router.render import Renderer
from transfer.auth import ClusterKey
from transfer.wire import Role

MODEL = "simulated"
LENGTHS = (64, 1024, 8192, 32768)
MAX_TOKENS = 2
AT_ONCE = 8
WARM = 3
WITHIN_S = 60.0
HOST = "127.0.0.1"


def main() -> int:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    parser.add_argument("--repeats", type=int, default=25, help="of every cell (default 25)")
    options = parser.parse_args()
    with running(options.model) as (folder, url, _, ports):
        results = [
            row(kind, length, url, ports, options.repeats, folder) for kind in ("ids", "chat") for length in LENGTHS
        ]
        results += [row_at_once(length, url, ports, options.repeats) for length in LENGTHS[:3]]
    columns = {
        "prompt": "kind",
        "tokens": "tokens",
        "direct ms": "direct_ms",
        "router ms": "router_ms",
        "added ms": "added_ms",
        "rendering ms": "rendering_ms",
    }
    rows = [[one[key] for key in columns.values()] for one in results]
    report.publish({"repeats": options.repeats, "results": results}, tuple(columns), rows, options.json)
    return 0


def row(kind: str, length: int, url: str, ports: tuple[int, int], repeats: int, folder: Path) -> dict[str, Any]:
    endpoint, fields, tokens, rendering_ms = _prompt(kind, length, folder)
    body = {"model": MODEL, "max_tokens": MAX_TOKENS, "temperature": 0, **fields}

    def both() -> tuple[float, float]:
        return _first_s(_direct(ports, endpoint, body)), _first_s(ask(url, endpoint, body, headers=DECODES))

    return {**_medians(kind, tokens, both, repeats), "rendering_ms": rendering_ms}


def row_at_once(length: int, url: str, ports: tuple[int, int], repeats: int) -> dict[str, Any]:
    chooser = random.Random(length)
    router_port = urlsplit(url).port or 0

    def both() -> tuple[float, float]:
        prompts = [[chooser.randrange(1000, 20000) for _ in range(length)] for _ in range(AT_ONCE)]
        bodies = [{"model": MODEL, "max_tokens": MAX_TOKENS, "temperature": 0, "prompt": prompt} for prompt in prompts]
        legs = [streaming({**body, **ByHand.of_ports(ports).meeting()}) for body in bodies]
        direct_s = first_of([(port, leg) for leg in legs for port in ports], watched=ports[1])
        return direct_s, first_of([(router_port, streaming(body)) for body in bodies], watched=router_port)

    return {**_medians(f"{AT_ONCE} x ids", length, both, repeats), "rendering_ms": 0.0}


def _medians(kind: str, tokens: int, both: Callable[[], tuple[float, float]], repeats: int) -> dict[str, Any]:
    """both: seconds by hand and by the router. The first ones open connections, and do not count."""
    taken = [both() for _ in range(WARM + repeats)][WARM:]
    direct_ms, router_ms = (1e3 * statistics.median(seconds) for seconds in zip(*taken, strict=True))
    report.progress(f"  {kind}, {tokens} tokens: {direct_ms:.1f} ms, {router_ms:.1f} ms by the router")
    return {
        "kind": kind,
        "tokens": tokens,
        "direct_ms": round(direct_ms, 2),
        "router_ms": round(router_ms, 2),
        "added_ms": round(router_ms - direct_ms, 2),
    }


def first_of(requests: list[tuple[int, str]], watched: int) -> float:
    """Sends all of them at once, each to its port. Seconds until the first event from `watched`; returns when all are
    answered. Raises SystemExit where one is not in time."""
    extra = "".join(f"{name}: {value}\r\n" for name, value in DECODES.items())
    ready = []
    for port, payload in requests:
        head = f"POST {Endpoint.COMPLETIONS.value} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n{extra}"
        head += f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
        ready.append((socket.create_connection((HOST, port), WITHIN_S), port, (head + payload).encode()))
    with selectors.DefaultSelector() as waiting:
        began_s, first_s = time.perf_counter(), None
        for one, port, message in ready:
            one.sendall(message)
            waiting.register(one, selectors.EVENT_READ, port)
        while waiting.get_map():
            found = waiting.select(WITHIN_S)
            if not found:
                raise SystemExit("router_added: wanted all answers, some did not come")
            for key, _ in found:
                answer = key.fileobj
                assert isinstance(answer, socket.socket), "that is what was registered"
                piece = answer.recv(1 << 16)
                if first_s is None and key.data == watched and b"data:" in piece:
                    first_s = time.perf_counter() - began_s
                if not piece:
                    waiting.unregister(answer)
                    answer.close()
    if first_s is None:
        raise SystemExit("router_added: wanted a token, found none")
    return first_s


def _prompt(kind: str, length: int, folder: Path) -> tuple[str, dict[str, Any], int, float]:
    """Endpoint, fields, tokens, and how long the router's rendering takes by itself."""
    if kind == "ids":
        chooser = random.Random(length)
        endpoint = Endpoint.COMPLETIONS
        fields: dict[str, Any] = {"prompt": [chooser.randrange(1000, 20000) for _ in range(length)]}
    else:
        endpoint = Endpoint.CHAT
        fields = {"messages": [{"role": "user", "content": sentence(length, length)}]}
    request = read(endpoint, json.dumps({"model": MODEL, **fields}).encode(), MODEL)
    renderer = Renderer.load(folder)
    took_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        prompt = render(renderer, request)
        took_s.append(time.perf_counter() - began_s)
    return endpoint.value, fields, prompt.tokens, round(1e3 * min(took_s), 2)


def _first_s(answer: Answer) -> float:
    if answer.first_s is None or answer.error:
        raise SystemExit(f"router_added: wanted a token, found {answer.status} {answer.error}")
    return answer.first_s


def _direct(ports: tuple[int, int], path: str, body: dict[str, Any]) -> Answer:
    """Both legs by hand, the prefill one in a thread; both ready before the clock begins, as the router's one is."""
    pair = ByHand.of_ports(ports)
    payload = streaming({**body, **pair.meeting()})
    began_s = time.perf_counter()
    other = threading.Thread(target=ask_ready, args=(pair.prefill_url, path, payload, began_s))
    other.start()
    answer = ask_ready(pair.decode_url, path, payload, began_s)
    other.join()
    return answer


@dataclass(frozen=True)
class ByHand(Pair):
    """Simulated workers, which want a name for each request, as the router gives it one."""

    @classmethod
    def of_ports(cls, ports: tuple[int, int]) -> ByHand:
        """Prefill's and decode's."""
        prefill_url, decode_url = (f"http://{HOST}:{port}" for port in ports)
        return cls(prefill_url, decode_url, HOST, ports[0])

    def meeting(self) -> dict[str, Any]:
        return {**super().meeting(), "rid": uuid.uuid4().hex}


@contextmanager
def running(
    model: str | None, decode: type[FakeWorker] = FakeWorker
) -> Iterator[tuple[Path, str, int, tuple[int, int]]]:
    """The model's folder; the router's URL and process; the ports of a prefill and a decode worker."""
    wanted = read_cluster(LOCAL_CPU).model
    folder = choose_model(wanted.path, wanted.served_name, model).path
    with tempfile.TemporaryDirectory(prefix="mainstem-router-") as temporary:
        key_file = Path(temporary) / "key"
        ClusterKey.generate().write(key_file)
        with router(folder, key_file) as (url, process), workers(key_file, url, decode) as ports:
            yield folder, url, process, ports


@contextmanager
def router(folder: Path, key_file: Path) -> Iterator[tuple[str, int]]:
    """As the launcher runs it: its URL and its process."""
    with socket.socket() as placeholder:
        placeholder.bind((HOST, 0))
        port = placeholder.getsockname()[1]
    section = RouterSection(host=HOST, port=port)
    spec = RouterSpec(section=section, model=MODEL, model_path=folder, key_file=key_file, cluster="added")
    with _process(server.run, spec) as process:
        url, deadline_s = f"http://{HOST}:{port}", time.monotonic() + WITHIN_S
        while True:
            with suppress(OSError):
                get_json(url, "/health")
                break
            if time.monotonic() > deadline_s:
                raise SystemExit(f"{MODEL}: the router did not start within {WITHIN_S:g} s")
            time.sleep(0.1)
        yield url, process


@contextmanager
def workers(key_file: Path, url: str, decode: type[FakeWorker]) -> Iterator[tuple[int, int]]:
    """Their HTTP ports, prefill's and decode's."""
    mine, its = multiprocessing.Pipe()
    with _process(_run_workers, its, key_file, url, decode):
        if not mine.poll(WITHIN_S):
            raise SystemExit(f"{MODEL}: the workers did not start within {WITHIN_S:g} s")
        yield mine.recv()


@contextmanager
def _process(work: Callable[..., None], *arguments: Any) -> Iterator[int]:
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    assert process.pid is not None, "it was started"
    try:
        yield process.pid
    finally:
        process.terminate()
        process.join(10)
        process.kill()


def _run_workers(connection: Connection, key_file: Path, url: str, decode: type[FakeWorker]) -> None:
    asyncio.run(_serve_workers(connection, key_file, url, decode))


async def _serve_workers(connection: Connection, key_file: Path, url: str, decode: type[FakeWorker]) -> None:
    handoffs = Handoffs()
    kinds: dict[Role, type[FakeWorker]] = {"prefill": FakeWorker, "decode": decode}
    workers = [
        kind(
            role,
            role,
            ClusterKey.read(key_file),
            handoffs,
            model=MODEL,
            page_tokens=64,
            max_context_tokens=1 << 20,
            capacity_tokens=1 << 24,
            lease_s=30.0,
        )
        for role, kind in kinds.items()
    ]
    for worker in workers:
        await worker.start()
        await worker.register(url)
        worker.renew(url, 1.0)
    await asyncio.sleep(1)
    connection.send(tuple(int(worker.url.rpartition(":")[2]) for worker in workers))
    await asyncio.Event().wait()


if __name__ == "__main__":
    sys.exit(run_main(main))

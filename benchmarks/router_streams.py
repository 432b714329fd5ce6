"""What the router takes for each token that passes, and what it does to the gaps between them: a real router, workers
that compute nothing.

    python -m benchmarks.router_streams [--json] [--model NAME]

Router, workers and client are a process each. The decode worker is simulated: its streams go on together, a step at a
time, as an engine's do. `direct` asks both workers by hand, `router` asks the router, in turns; CPU is that of the
router's process, over all tokens of its streams.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks import report
from benchmarks.bench_cluster import run_main
from benchmarks.legs import Pair
from benchmarks.router_added import MODEL, ByHand, running
from benchmarks.streams import Client, Stream, percentile, session
from router.fake_worker import FakeWorker

PROMPT_TOKENS = 64
STEP_S = 0.02
COLUMNS = {
    "way": "way",
    "streams": "streams",
    "tokens": "tokens",
    "gap p50 ms": "gap_p50_ms",
    "p99": "gap_p99_ms",
    "router's CPU us a token": "router_cpu_us",
}


def main() -> int:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    parser.add_argument("--streams", type=int, default=32, help="at the same time (default 32)")
    parser.add_argument("--tokens", type=int, default=300, help="of each (default 300)")
    parser.add_argument("--rounds", type=int, default=3, help="of both ways (default 3)")
    options = parser.parse_args()
    with running(options.model, decode=Stepping) as (_, url, process, ports):
        targets: dict[str, str | Pair] = {"direct": ByHand.of_ports(ports), "router": url}
        asked = psutil.Process(process)
        results = asyncio.run(measure(targets, asked, options.streams, options.tokens, options.rounds))
    rows = [[one[key] for key in COLUMNS.values()] for one in results]
    report.publish({"step_ms": 1e3 * STEP_S, "results": results}, tuple(COLUMNS), rows, options.json)
    return 0


async def measure(
    targets: dict[str, str | Pair], process: psutil.Process, streams: int, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows of all ways, over all rounds. process: the router's"""
    gaps_s: dict[str, list[float]] = {way: [] for way in targets}
    spent_us: dict[str, list[float]] = {way: [] for way in targets}
    chooser = random.Random(streams)
    async with session() as opened:
        for number in range(rounds):
            for way, target in targets.items():
                client, before_s = Client(opened, target, MODEL), _cpu_s(process)
                prompts = [chooser.choices(range(1000, 20000), k=PROMPT_TOKENS) for _ in range(streams)]
                found = await asyncio.gather(*(client.stream(prompt, tokens) for prompt in prompts))
                gaps_s[way] += [gap for stream in found for gap in _checked(stream, tokens).itl_s]
                spent_us[way].append(1e6 * (_cpu_s(process) - before_s) / (streams * tokens))
                report.progress(f"  round {number + 1} of {rounds}, {way}: {spent_us[way][-1]:.0f} us a token")
    return [
        {
            "way": way,
            "streams": streams,
            "tokens": tokens,
            "gap_p50_ms": round(1e3 * percentile(gaps_s[way], 0.5), 2),
            "gap_p99_ms": round(1e3 * percentile(gaps_s[way], 0.99), 2),
            "router_cpu_us": round(statistics.median(spent_us[way]), 1),
        }
        for way in targets
    ]


def _checked(stream: Stream, tokens: int) -> Stream:
    # One more event says why it ended.
    if stream.error or len(stream.tokens_s) - stream.wordless != tokens:
        raise SystemExit(f"router_streams: wanted {tokens} tokens, found {len(stream.tokens_s)} {stream.error}")
    return stream


def _cpu_s(process: psutil.Process) -> float:
    """What it has taken of processors."""
    times = process.cpu_times()
    return times.user + times.system


@dataclass
class Stepping(FakeWorker):
    """A simulated decode worker. Its streams say a token each, all at once, every STEP_S."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stepped = asyncio.Event()

    async def start(self) -> None:
        await super().start()
        self._tasks.append(asyncio.create_task(self._step()))

    async def _step(self) -> None:
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        while True:
            next_s = max(next_s + STEP_S, loop.time())
            await asyncio.sleep(next_s - loop.time())
            self._stepped.set()
            self._stepped.clear()

    async def before_token(self) -> None:
        await self._stepped.wait()


if __name__ == "__main__":
    sys.exit(run_main(main))

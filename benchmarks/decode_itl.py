"""What hand-offs do to those who are decoding: ITL of 32 running requests, with 8k-token prompts coming in, and none.

A prefill and a decode worker (configs/1p1d-nvlink.yaml), asked by the router; and SGLang's own pair over NIXL, to which
this program sends both legs. The running requests are streams of a short prompt each, and their tokens are counted in
turns: a while with nothing else, a while in which an 8,192-token prompt that stops after its first token arrives every
250 ms. ITL is the time between two tokens of a stream as a client sees it. With one GPU for both workers prefill's own
arithmetic slows decode down: then this says nothing of hand-offs, but that all of it works.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import machine, report
from benchmarks.bench_cluster import run_main
from benchmarks.gpu_cluster import MODEL, gpu_config, gpu_count
from benchmarks.gpu_systems import NIXL, all_running
from benchmarks.legs import Pair
from benchmarks.reference import VOCABULARY
from benchmarks.streams import Client, Stream, percentile, session

RUNNING = 32
PROMPT_TOKENS = 512
ARRIVING_TOKENS = 8192
POOL_TOKENS = 160_000
SETTLE_S = 2.0
WARM_S = 180.0
LONGEST_TOKENS = 3000
"""Of an answer, so that what runs has a place in the pool."""
SYSTEMS = ("mainstem", NIXL)
COLUMNS = {
    "system": "system",
    "phase": "phase",
    "tokens": "tokens",
    "ITL p50 ms": "itl_p50_ms",
    "p99": "itl_p99_ms",
    "of quiet": "p99_ratio",
    "hand-offs": "handoffs",
    "their TTFT p50 ms": "arriving_ttft_p50_ms",
}


def main() -> int:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="a model's folder; its config and tokenizer will do")
    parser.add_argument("--flags", type=yaml.safe_load, default={}, help="more of SGLang's flags, as YAML")
    parser.add_argument("--rate", type=float, default=4.0, help="hand-offs a second (default 4)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of both phases (default 3)")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS), help="default: both")
    parser.add_argument("--keep", type=Path, help="a folder in which logs stay")
    options = parser.parse_args()
    if unknown := [name for name in options.systems if name not in SYSTEMS]:
        parser.error(f"--systems: wanted some of {', '.join(SYSTEMS)}, found {', '.join(unknown)}")
    if not gpu_count():
        report.progress("decode_itl: wanted a GPU, found none")
        return 2
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        files = {name: cluster_file(folder / name, options) for name in options.systems}
        with all_running(files) as systems:
            for name, system in systems.items():
                target = system if isinstance(system, Pair) else system.url
                rows += [{"system": name, **row} for row in asyncio.run(measure(name, target, options))]
    link = "two GPUs" if gpu_count() > 1 else "one GPU for both workers: no link is crossed"
    result = {"gpus": machine.gpus(), "between": link, "running": RUNNING, "rate": options.rate, "results": rows}
    report.publish(result, tuple(COLUMNS), [[row[key] for key in COLUMNS.values()] for row in rows], options.json)
    return 0


def cluster_file(folder: Path, options: argparse.Namespace) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return gpu_config(
        folder / "cluster.yaml",
        options.model.resolve(),
        pool_tokens=POOL_TOKENS,
        flags={"context-length": 16384, "cuda-graph-max-bs": RUNNING + 8, **options.flags},
    )


async def measure(name: str, target: str | Pair, options: argparse.Namespace) -> list[dict[str, Any]]:
    chooser = random.Random(7)

    def prompt(tokens: int) -> list[int]:
        return [chooser.choice(VOCABULARY) for _ in range(tokens)]

    async with session() as opened:
        client = Client(opened, target, MODEL)
        await warm(client, prompt)
        gaps: dict[str, list[float]] = {"quiet": [], "handed over to": []}
        arrivals: dict[str, list[Stream]] = {name: [] for name in gaps}
        for number in range(options.rounds):
            # Fresh streams each round, both phases within their length.
            streams = [
                asyncio.create_task(client.stream(prompt(PROMPT_TOKENS), LONGEST_TOKENS)) for _ in range(RUNNING)
            ]
            await asyncio.sleep(SETTLE_S)
            order = list(gaps) if number % 2 == 0 else list(gaps)[::-1]
            spans: dict[str, tuple[float, float]] = {}
            for phase in order:
                began_s = time.perf_counter()
                if phase == "quiet":
                    await asyncio.sleep(options.seconds)
                else:
                    arrivals[phase] += await arriving(client, prompt, options.rate, options.seconds)
                spans[phase] = (began_s, time.perf_counter())
                report.progress(f"  {name}, round {number + 1} of {options.rounds}, {phase}: done")
            done = _checked(await asyncio.gather(*streams))
            for phase, (from_s, until_s) in spans.items():
                gaps[phase] += within(done, from_s, until_s)
    return phases(gaps, arrivals)


async def warm(client: Client, prompt: Any) -> None:
    """Until two prompts in a row were answered: kernels are compiled at first, and the router gives up on who stands
    still for so long."""
    until_s, answered = time.monotonic() + WARM_S, 0
    while answered < 2:
        stream = await client.stream(prompt(ARRIVING_TOKENS), 2)
        answered = 0 if stream.error else answered + 1
        if stream.error:
            report.progress(f"  warming up: {stream.error}")
            if time.monotonic() > until_s:
                raise SystemExit("decode_itl: wanted an answer while warming up, found none")
            await asyncio.sleep(1.0)


async def arriving(client: Client, prompt: Any, rate: float, seconds: float) -> list[Stream]:
    """Prompts at this rate, whatever becomes of those before."""
    began_s = time.perf_counter()
    sent = []
    for number in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, began_s + number / rate - time.perf_counter()))
        sent.append(asyncio.create_task(client.stream(prompt(ARRIVING_TOKENS), 1)))
    return _checked(await asyncio.gather(*sent))


def within(streams: list[Stream], from_s: float, until_s: float) -> list[float]:
    """The gaps between two tokens that both came in this span."""
    return [
        after - before
        for stream in streams
        for before, after in zip(stream.tokens_s, stream.tokens_s[1:], strict=False)
        if from_s <= before and after <= until_s
    ]


def phases(gaps: dict[str, list[float]], arrivals: dict[str, list[Stream]]) -> list[dict[str, Any]]:
    quiet_p99_s = percentile(gaps["quiet"], 0.99)
    found = []
    for phase, taken in gaps.items():
        ttfts = [stream.ttft_s for stream in arrivals[phase] if stream.ttft_s is not None]
        found.append(
            {
                "phase": phase,
                "tokens": len(taken),
                "itl_p50_ms": round(1e3 * percentile(taken, 0.5), 2),
                "itl_p99_ms": round(1e3 * percentile(taken, 0.99), 2),
                "p99_ratio": round(percentile(taken, 0.99) / quiet_p99_s, 3),
                "handoffs": len(ttfts),
                "arriving_ttft_p50_ms": round(1e3 * percentile(ttfts, 0.5), 1) if ttfts else None,
            }
        )
    return found


def _checked(streams: list[Stream]) -> list[Stream]:
    """Raises SystemExit where one failed."""
    for stream in streams:
        if stream.error:
            raise SystemExit(f"decode_itl: wanted tokens, found {stream.error}")
    return streams


if __name__ == "__main__":
    sys.exit(run_main(main))

"""What hand-offs do to those who are decoding: ITL of 32 running requests, with 8k-token prompts coming in, and none.

A prefill and a decode worker (configs/1p1d-nvlink.yaml), asked by the router; and SGLang's own pair over NIXL, to which
this program sends both legs. The running requests are streams of a short prompt each, and their tokens are counted in
turns: a while with nothing else, a while in which an 8,192-token prompt that stops after its first token arrives every
250 ms, from another process, so that nobody who counts tokens has to send prompts. ITL is the time between two tokens
of a stream as a client sees it; a step is that between two results of decode's scheduler, told by a probe in it
(benchmarks/step_probe.py). A stream that speaks in parts of characters, as made-up weights may have it, is left out:
who passes on which part when says nothing of hand-offs. Below the table: where the longest steps were spent. With one
GPU for both workers prefill's own arithmetic slows decode down: then this says nothing of hand-offs, but that all of it
works.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from benchmarks import machine, report
from benchmarks.bench_cluster import run_main
from benchmarks.gpu_cluster import MODEL, gpu_config, gpu_count
from benchmarks.gpu_systems import NIXL, all_running
from benchmarks.legs import Pair
from benchmarks.probes import probed, told_by
from benchmarks.reference import VOCABULARY
from benchmarks.step_probe import FILE_VARIABLE, PARTS, Step, steps
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
PROBE = "steps"
QUIET, DISTURBED = "quiet", "handed over to"
WORDLESS_SHARE = 0.01
"""A stream of more tokens without text is left out."""
LONGEST_SHARE = 0.02
"""Of a phase's steps, of which it is told where they were spent."""
Span = tuple[float, float]
"""Seconds of `time.perf_counter`."""
COLUMNS = {
    "system": "system",
    "phase": "phase",
    "streams": "streams",
    "tokens": "tokens",
    "ITL p50 ms": "itl_p50_ms",
    "p99": "itl_p99_ms",
    "of quiet": "p99_ratio",
    "step p50 ms": "step_p50_ms",
    "step p99": "step_p99_ms",
    "of quiet step": "step_p99_ratio",
    "hand-offs": "handoffs",
    "their TTFT p50 ms": "arriving_ttft_p50_ms",
}


def main() -> int:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="a model's folder; its config and tokenizer will do")
    parser.add_argument("--flags", type=yaml.safe_load, default={}, help="more of SGLang's flags, as YAML")
    parser.add_argument("--rate", type=float, default=4.0, help="hand-offs a second (default 4)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase (default 8)")
    parser.add_argument("--rounds", type=_even, default=2, help="of both phases, an even number (default 2)")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS), help="default: both")
    parser.add_argument("--keep", type=Path, help="a folder in which logs stay")
    options = parser.parse_args()
    if unknown := [name for name in options.systems if name not in SYSTEMS]:
        parser.error(f"--systems: wanted some of {', '.join(SYSTEMS)}, found {', '.join(unknown)}")
    if not gpu_count():
        report.progress("decode_itl: wanted a GPU, found none")
        return 2
    rows = []
    spent: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as elsewhere,
    ):
        folder = options.keep or Path(temporary)
        files = {name: cluster_file(folder / name, name, options) for name in options.systems}
        with all_running(files) as systems:
            for name, system in systems.items():
                target = system if isinstance(system, Pair) else system.url
                found = asyncio.run(measure(name, target, folder / name, elsewhere, options))
                rows += [{"system": name, "phase": phase, **row} for phase, row in phases(found).items()]
                spent[name] = {phase: longest(one.steps) for phase, one in found.items()}
    link = "two GPUs" if gpu_count() > 1 else "one GPU for both workers: no link is crossed"
    result = {"gpus": machine.gpus(), "between": link, "running": RUNNING, "rate": options.rate}
    result |= {"longest_steps_ms": spent, "results": rows}
    report.publish(result, tuple(COLUMNS), [[row[key] for key in COLUMNS.values()] for row in rows], options.json)
    if not options.json:
        print(f"{', '.join(machine.gpus())}; {link}; the longest {LONGEST_SHARE:.0%} of the steps, in ms:")
        for name, by_phase in spent.items():
            for phase, parts in by_phase.items():
                print(f"{name}, {phase}: {parts}")
    return 0


def _even(text: str) -> int:
    """Contexts grow from one phase to the next, so each has to come first as often. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 2 or int(text) % 2:
        raise argparse.ArgumentTypeError(f"wanted an even number of rounds, found {text}")
    return int(text)


def cluster_file(folder: Path, name: str, options: argparse.Namespace) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return gpu_config(
        folder / "cluster.yaml",
        options.model.resolve(),
        pool_tokens=POOL_TOKENS,
        flags={"context-length": 16384, "cuda-graph-max-bs": RUNNING + 8, **options.flags},
        environment=probed(folder, PROBE, "benchmarks.step_probe:register", FILE_VARIABLE, alone=name == NIXL),
    )


@dataclass
class Phase:
    """What was seen in all rounds of one."""

    gaps_s: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    arrivals: list[Stream] = field(default_factory=list)
    streams: int = 0
    """Whose gaps these are."""


async def measure(
    name: str, target: str | Pair, folder: Path, elsewhere: ProcessPoolExecutor, options: argparse.Namespace
) -> dict[str, Phase]:
    found = {QUIET: Phase(), DISTURBED: Phase()}
    chooser = random.Random(name)
    loop = asyncio.get_running_loop()
    async with session() as opened:
        client = Client(opened, target, MODEL)
        await warm(client, chooser)
        for number in range(options.rounds):
            # Fresh streams each round, both phases within their length.
            prompts = [prompt(chooser, PROMPT_TOKENS) for _ in range(RUNNING)]
            streams = [asyncio.create_task(client.stream(one, LONGEST_TOKENS)) for one in prompts]
            await asyncio.sleep(SETTLE_S)
            order = list(found) if number % 2 == 0 else list(found)[::-1]
            spans: dict[str, Span] = {}
            for phase in order:
                if phase == QUIET:
                    began_s = time.perf_counter()
                    await asyncio.sleep(options.seconds)
                    spans[phase] = began_s, time.perf_counter()
                else:
                    seed = f"{name} {number}"
                    spans[phase], sent = await loop.run_in_executor(
                        elsewhere, arriving, target, seed, options.rate, options.seconds
                    )
                    found[phase].arrivals += _checked(sent)
                report.progress(f"  {name}, round {number + 1} of {options.rounds}, {phase}: done")
            done = [one for one in _checked(await asyncio.gather(*streams)) if in_words(one)]
            if not done:
                raise SystemExit("decode_itl: wanted streams that speak in words, found none")
            files = told_by(folder, PROBE)
            for phase, span in spans.items():
                found[phase].streams += len(done)
                found[phase].gaps_s += within(done, *span)
                found[phase].steps += steps(files, *span, least_requests=RUNNING)
    return found


def prompt(chooser: random.Random, tokens: int) -> list[int]:
    return chooser.choices(VOCABULARY, k=tokens)


async def warm(client: Client, chooser: random.Random) -> None:
    """Until two prompts in a row were answered: kernels are compiled at first, and the router gives up on who stands
    still for so long."""
    until_s, answered = time.monotonic() + WARM_S, 0
    while answered < 2:
        stream = await client.stream(prompt(chooser, ARRIVING_TOKENS), 2)
        answered = 0 if stream.error else answered + 1
        if stream.error:
            report.progress(f"  warming up: {stream.error}")
            if time.monotonic() > until_s:
                raise SystemExit("decode_itl: wanted an answer while warming up, found none")
            await asyncio.sleep(1.0)


def arriving(target: str | Pair, seed: str, rate: float, seconds: float) -> tuple[Span, list[Stream]]:
    """Prompts at this rate, whatever becomes of those before: from the first one to the last answer's end. For a
    process of its own."""
    chooser = random.Random(seed)
    return asyncio.run(
        _arriving(target, [prompt(chooser, ARRIVING_TOKENS) for _ in range(round(rate * seconds))], rate)
    )


async def _arriving(target: str | Pair, prompts: list[list[int]], rate: float) -> tuple[Span, list[Stream]]:
    async with session() as opened:
        client = Client(opened, target, MODEL)
        began_s = time.perf_counter()
        sent = []
        for number, one in enumerate(prompts):
            await asyncio.sleep(max(0.0, began_s + number / rate - time.perf_counter()))
            sent.append(asyncio.create_task(client.stream(one, 1)))
        streams = await asyncio.gather(*sent)
        return (began_s, time.perf_counter()), streams


def in_words(stream: Stream) -> bool:
    return stream.wordless <= WORDLESS_SHARE * len(stream.tokens_s)


def within(streams: list[Stream], from_s: float, until_s: float) -> list[float]:
    """The gaps between two tokens that both came in this span."""
    return [
        after - before
        for stream in streams
        for before, after in zip(stream.tokens_s, stream.tokens_s[1:], strict=False)
        if from_s <= before and after <= until_s
    ]


def phases(found: dict[str, Phase]) -> dict[str, dict[str, Any]]:
    quiet_p99_s = percentile(found[QUIET].gaps_s, 0.99)
    quiet_step_p99_ms = _gap_ms(found[QUIET].steps, 0.99)
    rows = {}
    for phase, seen in found.items():
        ttfts = [stream.ttft_s for stream in seen.arrivals if stream.ttft_s is not None]
        p50_s, p99_s = (percentile(seen.gaps_s, share) for share in (0.5, 0.99))
        step_p99_ms = _gap_ms(seen.steps, 0.99)
        rows[phase] = {
            "streams": seen.streams,
            "tokens": len(seen.gaps_s),
            "itl_p50_ms": round(1e3 * p50_s, 2),
            "itl_p99_ms": round(1e3 * p99_s, 2),
            "p99_ratio": round(p99_s / quiet_p99_s, 3),
            "step_p50_ms": _gap_ms(seen.steps, 0.5),
            "step_p99_ms": step_p99_ms,
            "step_p99_ratio": round(step_p99_ms / quiet_step_p99_ms, 3) if step_p99_ms and quiet_step_p99_ms else None,
            "handoffs": len(ttfts),
            "arriving_ttft_p50_ms": round(1e3 * percentile(ttfts, 0.5), 1) if ttfts else None,
        }
    return rows


def longest(taken: list[Step]) -> dict[str, float]:
    """Means over the longest steps, in milliseconds: the whole, and each part. Empty where no step was told of."""
    chosen = sorted(taken, key=lambda step: step["gap_ms"])[-max(1, int(LONGEST_SHARE * len(taken))) :]
    return {part: round(fmean(step[part] for step in chosen), 2) for part in ("gap_ms", *PARTS)} if chosen else {}


def _gap_ms(taken: list[Step], share: float) -> float | None:
    return round(percentile([step["gap_ms"] for step in taken], share), 2) if taken else None


def _checked(streams: list[Stream]) -> list[Stream]:
    """Raises SystemExit where one failed."""
    for stream in streams:
        if stream.error:
            raise SystemExit(f"decode_itl: wanted tokens, found {stream.error}")
    return streams


if __name__ == "__main__":
    sys.exit(run_main(main))

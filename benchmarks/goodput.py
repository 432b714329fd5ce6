"""Goodput: requests a second that met both objectives, TTFT within 500 ms and the p99 of their ITL within 30 ms.

The shape of llm-d's shared-prefix benchmark, for one model of 8B dimensions on two GPUs: groups of requests that share
a system prompt, each with a question of its own; arrivals at random (Poisson), the same ones for every system.

    mainstem                one prefill and one decode worker of ours behind our router
    sglang nixl             the same of SGLang's own over NIXL; this program sends both legs, so no router takes time
    sglang nixl, by role    and with the flags that our workers get for their roles
    both, robin             two workers that do both, asked in turn by this program: a router that takes no time
    both, mainstem          the same two behind our prefix routing

All workers are up at the same time, and idle but for those that are measured; with `--apart` only those, so that their
pools may be as large as they would be (`--pool-tokens`). Each load is a run of its own on prompts
that no run before had; a system's capacity is the largest load of which 90 % met both. With one GPU for all workers no
link is crossed: then this says that it works.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import machine, report
from benchmarks.bench_cluster import run_main
from benchmarks.gpu_cluster import MODEL, gpu_config, gpu_count
from benchmarks.gpu_systems import NIXL, NIXL_BY_ROLE, System, all_running
from benchmarks.legs import Pair
from benchmarks.reference import VOCABULARY
from benchmarks.streams import Client, Stream, percentile, session

TTFT_S = 0.5
ITL_S = 0.030
MET = 0.9
GROUPS = 8
PREFIX_TOKENS, QUESTION_TOKENS = 6000, 1200
COLUMNS = {
    "system": "system",
    "sent/s": "rate",
    "sent": "requests",
    "failed": "failed",
    "met": "met",
    "good/s": "goodput",
    "TTFT p50 ms": "ttft_p50_ms",
    "p90": "ttft_p90_ms",
    "ITL p99 ms": "itl_p99_ms",
}
SYSTEMS = ("mainstem", "sglang nixl", "sglang nixl, by role", "both, robin", "both, mainstem")


@dataclass(frozen=True)
class Load:
    """One run."""

    rate: float
    seconds: float
    answer_tokens: int
    seed: str
    """Of the tokens, which are others for each system: some share their workers. Arrivals and groups are the same."""

    def requests(self) -> list[tuple[float, list[int]]]:
        """When each is sent, from the start, and its prompt: group by group at random."""
        chooser, words = random.Random(self.rate), random.Random(f"{self.seed} {self.rate}")

        def tokens(count: int) -> list[int]:
            return words.choices(VOCABULARY, k=count)

        prefixes = [tokens(PREFIX_TOKENS) for _ in range(GROUPS)]
        found, at_s = [], chooser.expovariate(self.rate)
        while at_s < self.seconds:
            found.append((at_s, chooser.choice(prefixes) + tokens(QUESTION_TOKENS)))
            at_s += chooser.expovariate(self.rate)
        return found


def main() -> int:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="a model's folder; its config and tokenizer will do")
    parser.add_argument("--flags", type=yaml.safe_load, default={}, help="more of SGLang's flags, as YAML")
    rates = "1,2,4,8,12,16,20,24"
    parser.add_argument("--rates", default=rates, help=f"requests a second, one run each (default {rates})")
    parser.add_argument("--seconds", type=float, default=12.0, help="of arrivals in each run (default 12)")
    parser.add_argument("--answer-tokens", type=int, default=250, help="of each answer (default 250)")
    parser.add_argument("--pool-tokens", type=int, default=130_000, help="KV slots of each worker (default 130,000)")
    parser.add_argument("--apart", action="store_true", help="only the workers that are measured are up")
    parser.add_argument("--systems", default=";".join(SYSTEMS), help="which, by semicolons (default all)")
    parser.add_argument("--keep", type=Path, help="a folder in which logs stay")
    options = parser.parse_args()
    names = options.systems.split(";")
    if unknown := [name for name in names if name not in SYSTEMS]:
        parser.error(f"--systems: wanted some of {'; '.join(SYSTEMS)}, found {'; '.join(unknown)}")
    if not gpu_count():
        report.progress("goodput: wanted a GPU, found none")
        return 2
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        groups = list(dict.fromkeys(map(group_of, names)))
        for up in [[group] for group in groups] if options.apart else [groups]:
            with all_running({group: cluster_file(folder / group, group, options) for group in up}) as systems:
                for name in names:
                    if group_of(name) in systems:
                        results += asyncio.run(measure(name, targets(name, systems[group_of(name)]), options))
    link = "two GPUs" if gpu_count() > 1 else "one GPU for all workers: no link is crossed"
    objective = {"ttft_s": TTFT_S, "itl_p99_s": ITL_S, "met": MET}
    load = {"groups": GROUPS, "prefix_tokens": PREFIX_TOKENS, "question_tokens": QUESTION_TOKENS}
    load |= {"answer_tokens": options.answer_tokens, "seconds": options.seconds}
    pools = {"tokens": options.pool_tokens, "apart": options.apart}
    result = {
        "gpus": machine.gpus(),
        "between": link,
        "objective": objective,
        "load": load,
        "pools": pools,
        "results": results,
    }
    report.publish(result, tuple(COLUMNS), [[row[key] for key in COLUMNS.values()] for row in results], options.json)
    for name in names if not options.json else ():
        met = [row["rate"] for row in results if row["system"] == name and row["met"] >= MET]
        print(f"{name}: {MET:.0%} meet both up to {max(met, default=0.0):g} requests/s")
    return 0


def group_of(name: str) -> str:
    """What has to be up for this system."""
    groups = {"mainstem": "pair", "sglang nixl": NIXL, "sglang nixl, by role": NIXL_BY_ROLE}
    return groups.get(name, "both")


def cluster_file(folder: Path, group: str, options: argparse.Namespace) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return gpu_config(
        folder / "cluster.yaml",
        options.model.resolve(),
        pool_tokens=options.pool_tokens,
        flags={"context-length": 16384, **options.flags},
        both=2 if group == "both" else 0,
    )


def targets(name: str, system: System) -> list[str | Pair]:
    """Where requests are sent, in turn."""
    if isinstance(system, Pair):
        return [system]
    if name == "both, robin":
        return [f"http://{worker.host}:{worker.port}" for worker in system.plan.workers]
    return [system.url]


async def measure(name: str, where: list[str | Pair], options: argparse.Namespace) -> list[dict[str, Any]]:
    rates = [float(rate) for rate in options.rates.split(",")]
    found = []
    async with session() as opened:
        clients = [Client(opened, target, MODEL) for target in where]
        await run(clients, Load(2.0, 4.0, options.answer_tokens, seed=name))  # Compiles.
        for rate in rates:
            load = Load(rate, options.seconds, options.answer_tokens, seed=f"measured {name}")
            found.append(row(name, load, await run(clients, load)))
            report.progress(f"  {name}, {rate:g} requests/s: {found[-1]['met']:.0%} met both")
            if found[-1]["met"] < MET / 2:
                break
    return found


async def run(clients: list[Client], load: Load) -> list[Stream]:
    """All of its requests, each sent at its time whatever became of those before, to the clients in turn."""
    requests = load.requests()
    began_s = time.perf_counter()
    sent = []
    for client, (at_s, prompt) in zip(itertools.cycle(clients), requests, strict=False):
        await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
        sent.append(asyncio.create_task(client.stream(prompt, load.answer_tokens)))
    return await asyncio.gather(*sent)


def met(stream: Stream) -> bool:
    """Whether a request was served within both objectives."""
    if stream.error or stream.ttft_s is None or stream.ttft_s > TTFT_S:
        return False
    return not stream.itl_s or percentile(stream.itl_s, 0.99) <= ITL_S


def row(name: str, load: Load, streams: list[Stream]) -> dict[str, Any]:
    good = sum(met(stream) for stream in streams)
    ttfts = [stream.ttft_s for stream in streams if stream.ttft_s is not None]
    gaps = [gap for stream in streams for gap in stream.itl_s]
    return {
        "system": name,
        "rate": load.rate,
        "requests": len(streams),
        "failed": sum(bool(stream.error) for stream in streams),
        "met": round(good / max(1, len(streams)), 3),
        "goodput": round(good / load.seconds, 2),
        "ttft_p50_ms": round(1e3 * percentile(ttfts, 0.5), 1) if ttfts else None,
        "ttft_p90_ms": round(1e3 * percentile(ttfts, 0.9), 1) if ttfts else None,
        "itl_p99_ms": round(1e3 * percentile(gaps, 0.99), 1) if gaps else None,
    }


if __name__ == "__main__":
    sys.exit(run_main(main))

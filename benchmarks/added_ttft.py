"""TTFT that disaggregation adds on GPUs: a prefill and a decode worker beside one SGLang that does both.

The same flags, the same run, prompts as token ids on every side, each prompt new. `mono` asks the one worker; `direct`
sends both legs to the pair by hand, and waits for decode's first token; `router` asks the router, which passes on
prefill's, and `router, decode's` asks it so that it does not. `added` is a way's median minus mono's. `whole` is a pair
whose pages leave when SGLang sends them, `pass` one whose pages leave when the GPU has computed their forward pass,
`layers` one all of whose layers but the last leave while that one is computed; `nixl` is SGLang's own pair, without
any of us.
"8 x" is eight requests at once: the median is over all of them. "fragmented": after many requests of all lengths, so
that pages lie anywhere. "text": the prompt is text, about a token a word, which workers and router tokenize.
By the router also where the time went: in the router until it sent the request on (with text: rendering, tokenizing),
until decode had found pages, until prefill had computed them, and handing them over.
All ways are asked in turn. Below the table: when a request was where, told by a probe in the workers
(benchmarks/ttft_probe.py), and how long it took beside the passes until its token, which the GPU computes as long for
one worker as for another, but a CPU does not launch as quickly at one time as at another.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks import machine, report
from benchmarks.bench_cluster import run_main
from benchmarks.client import DECODES, Answer, complete, get_json
from benchmarks.gpu_cluster import MODEL, gpu_config, gpu_count
from benchmarks.gpu_systems import NIXL, System, all_running
from benchmarks.legs import Pair, direct
from benchmarks.probes import probed, told_by
from benchmarks.reference import VOCABULARY
from benchmarks.ttft_probe import FILE_VARIABLE, FLAG, Asked, read, timeline
from benchmarks.words import sentence
from engine.launch.cluster import Cluster

POOL_TOKENS = 70_000
MAX_TOKENS = 4
CHURN = 150
"""Requests before a pool counts as fragmented."""
CHURN_AT_ONCE = 4
Text = str | list[int]
Ask = Callable[[Text], Answer]


@dataclass(frozen=True)
class Cell:
    tokens: int
    at_once: int = 1
    fragmented: bool = False
    text: bool = False

    def __str__(self) -> str:
        many = f"{self.at_once} x " if self.at_once > 1 else ""
        return f"{many}{self.tokens}{' text' if self.text else ''}{' fragmented' if self.fragmented else ''}"

    def prompt(self, chooser: random.Random) -> Text:
        if self.text:
            return sentence(chooser.getrandbits(60), self.tokens - SPARE_WORDS)
        return chooser.choices(VOCABULARY, k=self.tokens)


CELLS = (
    Cell(64),
    Cell(1024),
    Cell(8192),
    Cell(32768),
    Cell(1024, at_once=8),
    Cell(8192, at_once=8),
    Cell(64, text=True),
    Cell(1024, text=True),
    Cell(8192, text=True),
    Cell(32768, text=True),
    Cell(8192, fragmented=True),
    Cell(1024, at_once=8, fragmented=True),
)
Taken = dict[tuple[str, Cell], list[Asked]]
SPANS = ("opening_s", "computing_s", "handover_s")
ROUTER_SPAN = "queued_s"
Handoffs = dict[tuple[str, Cell], dict[str, float]]
"""Medians over a cell's hand-offs."""
WARM_TWICE_TOKENS = 8192
"""Of cells with more, one round warms up: it takes seconds."""
LARGE_REPEATS = 3
"""Of those too at most: what they add is told by fewer."""
AHEAD = ("pass", "layers")
"""Systems that are called as their `transfer.ahead` is."""
WITH_TEXT = ("mono", "pass")
COMPARED = (700, 3000, 8192, 12_000) * 3
"""Lengths of the prompts whose outputs are compared with mono's."""
COMPARED_TOKENS = 16
SPARE_WORDS = 16
"""That a text has fewer, as some are two tokens: one token more than a pass takes would be another pass."""
PROBE = "times"
TOLD_S = 0.3
"""How long a decode worker may take to tell of a hand-off's end."""


def main() -> int:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="a model's folder; its config and tokenizer will do")
    parser.add_argument("--flags", type=yaml.safe_load, default={}, help="more of SGLang's flags, as YAML")
    parser.add_argument("--repeats", type=int, default=7, help="of every cell (default 7)")
    parser.add_argument(
        "--clusters",
        default="mono,pass,layers,nixl",
        help="what is up at the same time, and what after it: as memory allows (default: mono,pass,layers,nixl)",
    )
    parser.add_argument(
        "--cells",
        type=_cells,
        default=CELLS,
        help=f"some of these, by commas: {', '.join(map(str, CELLS))} (default: all)",
    )
    parser.add_argument("--keep", type=Path, help="a folder in which logs stay, and rows.json so far")
    options = parser.parse_args()
    if not gpu_count():
        report.progress("added_ttft: wanted a GPU, found none")
        return 2
    flags = {"context-length": 40_000, FLAG: True, **options.flags}
    taken: Taken = {}
    handoffs: Handoffs = {}
    ahead: dict[str, int] = {}
    timelines: dict[str, dict[str, Any]] = {}
    same: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for names in (group.split(",") for group in options.clusters.split()):
            files = {name: config(folder / name, name, options.model.resolve(), flags) for name in names}
            with all_running(files) as systems:
                ways = [way for name, system in systems.items() for way in ways_of(name, system)]
                for cell in options.cells:
                    measure(cell, ways, options.repeats, taken, handoffs)
                    # For whoever has less time than this takes.
                    (folder / "rows.json").write_text(json.dumps(rows(taken, handoffs), indent=1))
                ahead |= {name: ahead_pages(system) for name, system in systems.items() if isinstance(system, Cluster)}
                same |= same_outputs(systems)
            for way in ways:
                timelines[way.name] = timelines_of(way, read(told_by(folder / way.system, PROBE)), taken)
    results = rows(taken, handoffs)
    link = "two GPUs" if gpu_count() > 1 else "one GPU for both workers: no link is crossed"
    result = {
        "gpus": machine.gpus(),
        "between": link,
        "flags": flags,
        "ahead_pages": ahead,
        "same_outputs_as_mono": same,
        "timelines_ms": timelines,
        "results": results,
    }
    columns = {"tokens": "cell", "way": "way", "TTFT p50 ms": "ttft_ms", "p90": "p90_ms", "added ms": "added_ms"}
    columns |= {"in the router": "queued_ms", "finding pages": "opening_ms"}
    columns |= {"computing": "computing_ms", "handing over": "handover_ms"}
    table = [[one.get(key, "") for key in columns.values()] for one in results]
    report.publish(result, tuple(columns), table, options.json)
    if not options.json:
        print(f"{', '.join(machine.gpus())}; {link}; pages that left ahead: {ahead}")
        print(f"outputs of {len(COMPARED)} prompts that are mono's: {same}")
        for way_name, by_cell in timelines.items():
            for cell_name, points in by_cell.items():
                print(f"{way_name}, {cell_name} tokens, ms: {points}")
    return 0


def _cells(text: str) -> tuple[Cell, ...]:
    """Raises ArgumentTypeError."""
    known = {str(cell): cell for cell in CELLS}
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"wanted some of {', '.join(known)}, found {', '.join(unknown)}")
    return tuple(known[name] for name in names)


def config(folder: Path, name: str, model: Path, flags: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return gpu_config(
        folder / "cluster.yaml",
        model,
        pool_tokens=POOL_TOKENS,
        flags=flags,
        both=int(name == "mono"),
        ahead=name if name in AHEAD else "never",
        environment=probed(folder, PROBE, "benchmarks.ttft_probe:register", FILE_VARIABLE, alone=name == NIXL),
    )


def timelines_of(way: Way, records: list[dict[str, Any]], taken: Taken) -> dict[str, Any]:
    """By cell."""
    return {
        str(cell): timeline(records, asked, together=cell.at_once > 1)
        for (name, cell), asked in taken.items()
        if name == way.name
    }


@dataclass
class Way:
    """One way to ask one system."""

    name: str
    system: str
    ask: Ask
    takes_text: bool
    url: str | None = None
    """The router's, which tells of its requests' hand-offs; None where it was not asked."""
    said_by: str = "prefill"
    """Whose its first token is, by the router."""
    chooser: random.Random = field(default_factory=random.Random)
    """Of prompts, others for each way: a cached one would be another measurement."""
    churned: bool = False

    def __post_init__(self) -> None:
        self.chooser.seed(self.name)


def ways_of(name: str, system: System, max_tokens: int = MAX_TOKENS) -> list[Way]:
    text = name in WITH_TEXT
    if isinstance(system, Pair):
        return [Way(f"{name}, direct", name, lambda prompt: direct(system, MODEL, prompt, max_tokens), text)]
    cluster, model = system, system.plan.router.model
    by_role = {worker.role: worker for worker in cluster.plan.workers}
    if name == "mono":
        worker = by_role["both"]
        url = f"http://{worker.host}:{worker.port}"
        return [Way("mono", name, lambda prompt: complete(url, model, prompt, max_tokens, ignore_eos=True), text)]
    pair = Pair.of(by_role["prefill"], by_role["decode"])

    def routed(headers: dict[str, str]) -> Ask:
        return lambda prompt: complete(cluster.url, model, prompt, max_tokens, headers, ignore_eos=True)

    return [
        Way(f"{name}, direct", name, lambda prompt: direct(pair, model, prompt, max_tokens), text),
        Way(f"{name}, router", name, routed({}), text, cluster.url),
        Way(f"{name}, router, decode's", name, routed(DECODES), text, cluster.url, "decode"),
    ]


def same_outputs(systems: dict[str, System]) -> dict[str, str]:
    """Of each way, how many outputs are those of the one worker, where there is one to compare with."""
    if "mono" not in systems:
        return {}
    chooser = random.Random("compared")
    prompts = [chooser.choices(VOCABULARY, k=length) for length in COMPARED]
    ways = [way for name, system in systems.items() for way in ways_of(name, system, COMPARED_TOKENS)]
    found = {way.name: [way.ask(prompt).text for prompt in prompts] for way in ways}
    return {
        name: f"{sum(map(str.__eq__, texts, found['mono']))} of {len(prompts)}, {len(set(texts))} different"
        for name, texts in found.items()
        if name != "mono"
    }


def measure(cell: Cell, ways: list[Way], repeats: int, taken: Taken, handoffs: Handoffs) -> None:
    """One cell of all ways in turn, so that what a machine does meanwhile is done to all of them; their first requests
    unmeasured. Raises SystemExit where one fails."""
    small = cell.tokens * cell.at_once <= WARM_TWICE_TOKENS
    taking = [way for way in ways if way.takes_text or not cell.text]
    with ThreadPoolExecutor(max(cell.at_once, CHURN_AT_ONCE)) as threads:
        for way in taking:
            if cell.fragmented and not way.churned:
                way.churned = True
                for _ in range(CHURN // CHURN_AT_ONCE):
                    once(way, Cell(way.chooser.randint(64, 2500), CHURN_AT_ONCE), threads)
            for _ in range(2 if small else 1):
                once(way, cell, threads)
            taken[way.name, cell] = []
        for _ in range(repeats if small else min(repeats, LARGE_REPEATS)):
            for way in taking:
                taken[way.name, cell] += once(way, cell, threads)
    for way in taking:
        if way.url is not None:
            handoffs[way.name, cell] = spans_of_newest(way.url, len(taken[way.name, cell]), way.said_by)
        report.progress(f"  {way.name}, {cell} tokens: {1e3 * statistics.median(ttfts(way.name, cell, taken)):.1f} ms")


def once(way: Way, cell: Cell, threads: ThreadPoolExecutor) -> list[Asked]:
    """Each of a cell's requests, until its first token. Raises SystemExit."""
    answers = list(threads.map(way.ask, [cell.prompt(way.chooser) for _ in range(cell.at_once)]))
    for answer in answers:
        if answer.first_s is None or answer.error:
            raise SystemExit(f"added_ttft: {way.name}: wanted a token, found {answer.status} {answer.error}")
    return [Asked(one.sent_s, one.sent_s + one.first_s) for one in answers if one.first_s is not None]


def spans_of_newest(url: str, count: int, said_by: str) -> dict[str, float]:
    """Of so many requests whose first token was this worker's. Raises SystemExit where there is none."""
    time.sleep(TOLD_S)
    shown = get_json(url, "/api/state")["requests"]
    newest = [one for one in shown if one["first_token_from"] == said_by][:count]
    if not newest:
        raise SystemExit(f"added_ttft: wanted first tokens from {said_by}, found none among {len(shown)} requests")
    spans = {ROUTER_SPAN: statistics.median(one[ROUTER_SPAN] for one in newest)}
    told = [get_json(url, f"/api/explain/{one['id']}")["handoff"] for one in newest]
    known = [one for one in told if one and one["handover_s"] is not None]
    return spans | ({span: statistics.median(one[span] for one in known) for span in SPANS} if known else {})


def ahead_pages(cluster: Cluster) -> int:
    """Pages that left before SGLang sent them, over all hand-offs."""
    with urllib.request.urlopen(f"{cluster.url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("mainstem_handoff_ahead_pages_total"))


def ttfts(way: str, cell: Cell, taken: Taken) -> list[float]:
    """Seconds."""
    return [one.first_s - one.sent_s for one in taken[way, cell]]


def rows(taken: Taken, handoffs: Handoffs) -> list[dict[str, Any]]:
    """Cell by cell, of what was measured."""
    ways = dict.fromkeys(way for way, _ in taken)
    return [row(cell, way, taken, handoffs) for cell in CELLS for way in ways if (way, cell) in taken]


def row(cell: Cell, way: str, taken: Taken, handoffs: Handoffs) -> dict[str, Any]:
    spans = {f"{span[:-2]}_ms": round(1e3 * value, 2) for span, value in handoffs.get((way, cell), {}).items()}
    taken_s = sorted(ttfts(way, cell, taken))
    p50 = statistics.median(taken_s)
    mono_p50 = statistics.median(ttfts("mono", cell, taken)) if ("mono", cell) in taken else None
    return {
        "cell": str(cell),
        "way": way,
        "tokens": cell.tokens,
        "at_once": cell.at_once,
        "fragmented": cell.fragmented,
        "text": cell.text,
        "requests": len(taken_s),
        "ttft_ms": round(1e3 * p50, 1),
        "p90_ms": round(1e3 * taken_s[int(0.9 * (len(taken_s) - 1))], 1),
        "added_ms": round(1e3 * (p50 - mono_p50), 1) if mono_p50 is not None else None,
        **spans,
    }


if __name__ == "__main__":
    sys.exit(run_main(main))

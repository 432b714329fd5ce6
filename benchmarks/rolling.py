"""Every worker started anew, one after the other, under load: what did clients notice?

Clients ask one request after the other, at temperature 0, streamed and whole; every answer is compared with what one
undisturbed SGLang says. Meanwhile `mainstem restart --rolling` does what it does.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.bench_cluster import changed_config, run_main, running
from benchmarks.chaos.traffic import Asked, Verdict
from benchmarks.reference import OUTPUT_TOKENS, Reference
from benchmarks.undisturbed import undisturbed
from engine.launch.cluster import Cluster
from engine.launch.rolling import Routers, restart
from transfer.auth import ClusterKey

CLIENTS = 3
PROMPTS = 12
PROMPT_TOKENS = (20, 300)
WITHIN_S = 1.0
"""Little time to end by themselves: so that streams have to go on elsewhere."""
TIMEOUT_S = 120.0
CALM_S = 3.0
"""Of traffic before the first restart and after the last one."""


@dataclass
class Rolled:
    """What happened."""

    verdicts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    """Of the requests that went well."""
    took_s: float = 0.0


def main() -> int:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chooser = random.Random(options.seed)
    lengths = [chooser.randint(*PROMPT_TOKENS) for _ in range(PROMPTS)]
    with tempfile.TemporaryDirectory(prefix="mainstem-rolling-") as folder:
        references, _ = undisturbed(Path(folder), options.model, lengths)
        config = changed_config(Path(folder) / "rolling.yaml", _two_of_each)
        with running(config, model=options.model) as cluster:
            rolled = roll(cluster, references, report.progress)
    result = {
        "restarted": rolled.restarted,
        "requests": sum(rolled.verdicts.values()),
        "ok": rolled.verdicts[Verdict.OK],
        "errors": rolled.verdicts[Verdict.CLEAN_ERROR] + rolled.verdicts[Verdict.CUT],
        "hangs": rolled.verdicts[Verdict.HANG],
        "wrong_output": rolled.verdicts[Verdict.WRONG_OUTPUT] + rolled.verdicts[Verdict.EMPTY_200],
        "longest_s": round(rolled.longest_s, 2),
        "took_s": round(rolled.took_s, 1),
        "problems": rolled.problems,
        "output_tokens": OUTPUT_TOKENS,
        "seed": options.seed,
    }
    columns = ("workers restarted", "requests", "ok", "errors", "hangs", "wrong", "longest s", "all of it s")
    names = ("requests", "ok", "errors", "hangs", "wrong_output", "longest_s", "took_s")
    report.publish(result, columns, [(len(rolled.restarted), *(result[name] for name in names))], options.json)
    return 0 if rolled.verdicts[Verdict.OK] == sum(rolled.verdicts.values()) else 1


def roll(cluster: Cluster, references: list[Reference], tell: Callable[[str], None]) -> Rolled:
    """Restarts every worker under load."""
    rolled, over, lock = Rolled(), threading.Event(), threading.Lock()

    def talk(number: int) -> None:
        turn = number
        while not over.is_set():
            reference = references[turn % len(references)]
            asked = Asked(cluster.url, cluster.plan.router.model, reference, turn % 2 == 0, OUTPUT_TOKENS)
            verdict = asked.verdict()
            with lock:
                rolled.verdicts[verdict] += 1
                if verdict is Verdict.OK:
                    rolled.longest_s = max(rolled.longest_s, asked.took_s)
                else:
                    rolled.problems.append(f"{verdict}: {asked.error or asked.text!r} (rid {asked.rid})")
            turn += CLIENTS

    clients = [threading.Thread(target=talk, args=(number,)) for number in range(CLIENTS)]
    began_s = time.monotonic()
    for client in clients:
        client.start()
    try:
        time.sleep(CALM_S)
        folder = cluster.plan.folders.state
        routers = Routers({"router": cluster.url}, ClusterKey.read(folder / "key"))
        for name in routers.workers():
            restart(
                routers,
                folder,
                name,
                within_s=WITHIN_S,
                timeout_s=TIMEOUT_S,
                ready_s=TIMEOUT_S,
                tell=lambda text: tell(f"  {text}"),
            )
            rolled.restarted.append(name)
        time.sleep(CALM_S)
    finally:
        over.set()
        for client in clients:
            client.join()
    rolled.took_s = time.monotonic() - began_s
    return rolled


def _two_of_each(tree: dict[str, Any]) -> None:
    tree["name"] = "rolling"
    for group in tree["workers"]:
        group["count"] = 2


if __name__ == "__main__":
    sys.exit(run_main(main))

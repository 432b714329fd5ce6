"""The main job, shown: a real model, routed by prefix, prefilled on one worker and decoded on another.

Pulls the model, brings up configs/local-cpu.yaml, holds a scripted conversation over
the API (one long system prompt, three users, several turns), and prints for each
request where it went, what was matched and cached, and the time to first token. Then it
stays up, for you to try, until Ctrl-C; with --once it stops. Its state is where `mainstem
status` looks.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.bench_cluster import LOCAL_CPU, run_main, running
from benchmarks.client import Answer, chat
from engine.launch.cluster import Cluster
from engine.launch.state import STATE_DIR_VARIABLE

TURNS = 3
MAX_TOKENS = 24
EVENT_TRAVEL_S = 0.3
"""Between two requests: a person would take longer, and the pages just stored are known by then."""

SYSTEM = (
    "You are the assistant of a small public library in a harbour town. You answer in one short sentence, in plain "
    "words, and you never invent a book. "
) + " ".join(
    f"Rule {number}: {text}"
    for number, text in enumerate(
        (
            "A loan lasts four weeks and may be renewed twice, unless somebody else has asked for the book.",
            "Children under ten need a card that a parent has signed, and may take six books at a time.",
            "The reading room on the first floor is open from nine in the morning until eight in the evening.",
            "On Sundays only the reading room is open, from ten until four, and nothing can be borrowed or returned.",
            "Newspapers of the last two weeks lie beside the window; older ones must be asked for at the desk.",
            "A book that comes back late costs ten cents a day, but never more than the book itself.",
            "Maps, letters and photographs of the harbour are kept in the cellar and may be seen on Thursdays.",
            "Visitors may print twenty pages a day without paying, and scan as many as they like.",
            "Bicycles belong in the yard behind the house, prams and wheelchairs have a place beside the lift.",
            "A quiet room for four people can be reserved for two hours, by telephone or at the desk.",
            "Books in large print, audio books and a magnifying screen are on the ground floor, to the left.",
            "Whoever wants a book that the library does not have may suggest it on a form beside the entrance.",
        ),
        start=1,
    )
    for _ in range(2)
)


@dataclass(frozen=True)
class Person:
    name: str
    questions: tuple[str, ...]


PEOPLE = (
    Person("Ada", ("How long may I keep a book?", "And if somebody else wants it?", "What does a late book cost?")),
    Person("Ben", ("Are you open on Sunday?", "Can I borrow something then?", "Where is the quiet room?")),
    Person("Cleo", ("Where are the old maps?", "On which day may I see them?", "May I print a page?")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="stop after the conversation instead of staying up")
    parser.add_argument("--model", help="a checkpoint's folder, in place of SmolLM2-135M-Instruct")
    parser.add_argument("--config", type=Path, default=LOCAL_CPU, help="a cluster file (default %(default)s)")
    options = parser.parse_args()
    console = Console()
    if options.model is None:
        subprocess.run([sys.executable, "-m", "engine.launch", "model", "pull", "smollm2"], check=True)
    console.print(f"Bringing up [bold]{options.config.name}[/bold] (about a minute on two idle cores) …")
    state_dir = Path(os.environ.get(STATE_DIR_VARIABLE, ".mainstem"))
    try:
        with running(options.config, options.model, state_dir) as cluster:
            failed = converse(cluster, console)
            if not options.once and not failed:
                stay(cluster, console)
            return 1 if failed else 0
    except KeyboardInterrupt:
        console.print("stopped: no process is left")
        return 0


def converse(cluster: Cluster, console: Console) -> int:
    """Holds the conversation and prints its table. Returns how many requests failed."""
    console.print("Three people talk to it, under one long system prompt …")
    histories = {person.name: [{"role": "system", "content": SYSTEM}] for person in PEOPLE}
    table = Table(title="each request, and where its prefix was", title_justify="left")
    for column in ("who", "turn", "prefill → decode"):
        table.add_column(column)
    for column in ("prompt tokens", "matched", "cached", "first token s"):
        table.add_column(column, justify="right")
    failed = 0
    for turn in range(TURNS):
        for person in PEOPLE:
            messages = histories[person.name]
            messages.append({"role": "user", "content": person.questions[turn]})
            answer = chat(cluster.url, cluster.plan.router.model, messages, MAX_TOKENS)
            messages.append({"role": "assistant", "content": answer.text})
            failed += bool(answer.error)
            table.add_row(person.name, str(turn + 1), *_cells(answer))
            console.print(f"  {person.name}: {person.questions[turn]}\n     {answer.text.strip() or answer.error}")
            time.sleep(EVENT_TRAVEL_S)
    console.print(table)
    console.print("matched: tokens the router knew to be on that prefill worker; cached: what the engine then used")
    console.print(machine.one_line(), style="dim")
    return failed


def stay(cluster: Cluster, console: Console) -> None:
    """Says how to go on by hand, and waits for Ctrl-C or the cluster's end."""
    console.print(
        f"\nIt stays up. The dashboard: [bold]{cluster.url}/[/bold]   metrics: {cluster.url}/metrics\n"
        f"  curl {cluster.url}/v1/chat/completions -H 'content-type: application/json' -d '"
        f'{{"model": "{cluster.plan.router.model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n'
        "Ctrl-C stops everything.",
        soft_wrap=True,
    )
    while not cluster.wait_over(timeout_s=1.0):
        pass
    raise SystemExit(f"the cluster ended: {cluster.view.problem or 'it was stopped'}")


def _cells(answer: Answer) -> tuple[str, ...]:
    first = "-" if answer.ttft_s is None else f"{answer.ttft_s:.2f}"
    where = f"{answer.prefill} → {answer.decode}"
    return where, str(answer.prompt_tokens), str(answer.matched_tokens), str(answer.cached_tokens), first


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Bytes handed over for each turn of a ten-turn conversation, with and without decode's own prefix cache.

Real SGLang, two clusters one after the other: the same turns, the same answers. What decode holds of
a prompt (`disaggregation-decode-enable-radix-cache`) is not handed over again.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.bench_cluster import changed_config, run_main, running
from benchmarks.client import chat, get_json
from benchmarks.words import sentence
from engine.launch.cluster import Cluster

FLAG = "disaggregation-decode-enable-radix-cache"
SYSTEM_WORDS = 200
QUESTION_WORDS = 30
ANSWER_TOKENS = 32
TOLD_WITHIN_S = 10.0
EVENTS_S = 0.3
"""For the event of the stored pages to reach the router before the next turn."""


def main() -> None:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    parser.add_argument("--turns", type=int, default=10, help="turns of the conversation (default 10)")
    options = parser.parse_args()
    ways: dict[str, list[dict[str, Any]]] = {}
    for way, keeps in (("without", False), ("with", True)):
        with tempfile.TemporaryDirectory(prefix="mainstem-delta-") as folder:
            file = changed_config(Path(folder) / "cluster.yaml", partial(_decode_keeps, keeps=keeps))
            with running(file, model=options.model) as cluster:
                ways[way] = converse(cluster, options.turns)
    result = {
        "turns": options.turns,
        "moved_bytes": {way: [turn["moved_bytes"] for turn in turns] for way, turns in ways.items()},
        "prompt_tokens": [turn["prompt_tokens"] for turn in ways["with"]],
        "cached_tokens": {way: [turn["cached_tokens"] for turn in turns] for way, turns in ways.items()},
        "ttft_s": {way: [turn["ttft_s"] for turn in turns] for way, turns in ways.items()},
        "same_answers": [turn["text"] for turn in ways["with"]] == [turn["text"] for turn in ways["without"]],
    }
    total = {way: sum(moved) for way, moved in result["moved_bytes"].items()}
    result["total_bytes"] = total
    result["moved_with_over_without"] = round(total["with"] / total["without"], 3)
    rows = [
        (
            number + 1,
            ways["with"][number]["prompt_tokens"],
            *(f"{ways[way][number]['moved_bytes'] / 1e6:.2f}" for way in ("without", "with")),
            ways["with"][number]["prefix_tokens"],
        )
        for number in range(options.turns)
    ]
    rows.append(("all", "", *(f"{total[way] / 1e6:.2f}" for way in ("without", "with")), ""))
    columns = ("turn", "prompt tokens", "MB moved without", "MB moved with", "tokens that decode held")
    report.publish(result, columns, rows, options.json)


def converse(cluster: Cluster, turns: int) -> list[dict[str, Any]]:
    """The conversation, and what was handed over for each turn. Raises SystemExit where a turn fails."""
    messages = [{"role": "system", "content": sentence(1, SYSTEM_WORDS)}]
    found = []
    for turn in range(turns):
        messages.append({"role": "user", "content": sentence(100 + turn, QUESTION_WORDS)})
        answer = chat(cluster.url, cluster.plan.router.model, messages, ANSWER_TOKENS, ignore_eos=True)
        if answer.error:
            raise SystemExit(f"delta: wanted an answer, found {answer.status} {answer.error}")
        messages.append({"role": "assistant", "content": answer.text})
        moved = _handoff(cluster, answer.headers["x-request-id"])
        found.append(
            {
                "moved_bytes": moved["moved_bytes"],
                "prefix_tokens": moved["prefix_tokens"],
                "prompt_tokens": answer.prompt_tokens,
                "cached_tokens": answer.cached_tokens,
                "ttft_s": round(answer.ttft_s or 0.0, 3),
                "text": answer.text,
            }
        )
        report.progress(f"  turn {turn + 1}: {answer.prompt_tokens} tokens, {moved['moved_bytes'] / 1e6:.2f} MB moved")
        time.sleep(EVENTS_S)
    return found


def _handoff(cluster: Cluster, request: str) -> dict[str, Any]:
    """What the router was told about this request's hand-off."""
    deadline_s = time.monotonic() + TOLD_WITHIN_S
    while time.monotonic() < deadline_s:
        moved: dict[str, Any] | None = get_json(cluster.url, f"/api/explain/{request}")["handoff"]
        if moved:
            return moved
        time.sleep(0.05)
    raise SystemExit(f"delta: the router was not told of the hand-off of {request}")


def _decode_keeps(tree: dict[str, Any], *, keeps: bool) -> None:
    tree["name"] = "delta"
    for group in tree["workers"]:
        if group["role"] == "decode":
            group["engine"] = {**group.get("engine", {}), FLAG: keeps}


if __name__ == "__main__":
    sys.exit(run_main(main))

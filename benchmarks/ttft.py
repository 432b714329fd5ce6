"""Time to first token, cold and with a cached 1,000-token prefix, through the router and without it.

Real SGLang, one run. The same prompt shape every time: a prefix of about 1,000
tokens and a short question. `cold` is a prefix never seen; `cached` one that the
prefill worker computed just before. `direct` sends the same two legs to the same
workers by hand, without the router: the difference is what the router adds.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks import report
from benchmarks.bench_cluster import run_main, running
from benchmarks.client import complete
from benchmarks.legs import Pair, direct
from benchmarks.words import sentence
from engine.launch.cluster import Cluster

PREFIX_WORDS = 1000
"""As many tokens of SmolLM2."""
MAX_TOKENS = 4


def main() -> None:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of cold and cached requests (default 5)")
    options = parser.parse_args()
    with running(model=options.model) as cluster:
        result = measure(cluster, options.repeats)
    ways = ("router", "direct")
    rows = [
        (way, result[way]["cold_s"], result[way]["cached_s"], result[way]["cached_over_cold"], result["cached_tokens"])
        for way in ways
    ]
    report.publish(result, ("way", "cold s", "cached s", "cached / cold", "tokens cached"), rows, options.json)


def measure(cluster: Cluster, repeats: int) -> dict[str, Any]:
    model = cluster.plan.router.model
    prefill = next(worker for worker in cluster.plan.workers if worker.role == "prefill")
    decode = next(worker for worker in cluster.plan.workers if worker.role == "decode")
    pair = Pair.of(prefill, decode)
    complete(cluster.url, model, sentence(1, 30), MAX_TOKENS)  # connections and first-use work, on every path
    direct(pair, model, sentence(2, 30), MAX_TOKENS)
    times: dict[str, list[float]] = {"router cold": [], "router cached": [], "direct cold": [], "direct cached": []}
    cached_tokens = []
    for repeat in range(repeats):
        # The two ways take turns at being first, so that neither gets the warmer machine.
        for way in ("router", "direct") if repeat % 2 == 0 else ("direct", "router"):
            prefix = sentence(1000 + 2 * repeat + (way == "direct"), PREFIX_WORDS)
            for kind, question in (("cold", "first question"), ("cached", "second question")):
                prompt = f"{prefix} {question}"
                if way == "router":
                    answer = complete(cluster.url, model, prompt, MAX_TOKENS)
                else:
                    answer = direct(pair, model, prompt, MAX_TOKENS)
                if answer.ttft_s is None:
                    raise SystemExit(f"ttft: wanted a token, found {answer.status} {answer.error}")
                times[f"{way} {kind}"].append(answer.ttft_s)
                if kind == "cached":
                    cached_tokens.append(answer.cached_tokens)
                report.progress(f"  {way:6} {kind:6} {answer.ttft_s:6.3f} s, {answer.cached_tokens} cached")
                time.sleep(0.3)  # the event of the stored pages reaches the router before the next request
    medians = {name: report.median(values) for name, values in times.items()}
    result: dict[str, Any] = {"requests": 4 * repeats, "cached_tokens": int(report.median(cached_tokens))}
    for way in ("router", "direct"):
        cold, cached = medians[f"{way} cold"], medians[f"{way} cached"]
        result[way] = {"cold_s": cold, "cached_s": cached, "cached_over_cold": round(cached / cold, 3)}
    result["router_adds_s"] = round(medians["router cached"] - medians["direct cached"], 3)
    result["samples_s"] = {name: [round(value, 3) for value in values] for name, values in times.items()}
    return result


if __name__ == "__main__":
    sys.exit(run_main(main))

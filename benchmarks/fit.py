"""Constants of the pair's cost for this machine, ready for the `router: cost:` table of a cluster file.

Real SGLang, one cluster. Prefill: prompts never seen, of several lengths, and long ones whose
beginning is cached, one at a time, timed at the prefill worker's answer (its 200 means
that the pages were delivered); a least-squares fit of

    seconds = overhead + uncached / rate * (1 + middle of the uncached part / halving)

Decode: the time between tokens with one and with several requests.
"""

from __future__ import annotations

import random
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.bench_cluster import run_main, running
from benchmarks.client import complete, post_json
from engine.launch.cluster import Cluster
from engine.spec import WorkerSpec

VOCABULARY = range(1000, 20000)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 3072)
CACHED = ((1024, 64), (1024, 512), (2048, 64), (2048, 512), (3072, 256))
"""(tokens cached, tokens not): the same work at another context."""
OUTPUT_TOKENS = 32
"""An answer's length: what a longer wait between tokens is multiplied with."""
BATCH = 3


def main() -> None:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    options = parser.parse_args()
    with running(model=options.model) as cluster:
        result = measure(cluster)
    report.publish(result, ("constant", "value"), list(result.items()), options.json)


def measure(cluster: Cluster) -> dict[str, Any]:
    samples = prefill_samples(cluster)
    overhead_s, per_token_s, per_square_s = fit(samples)
    one_s, several_s = token_seconds(cluster, 1), token_seconds(cluster, BATCH)
    predicted = [overhead_s + per_token_s * new + per_square_s * new * (held + new / 2) for held, new, _ in samples]
    errors = [abs(guess - seconds) / seconds for guess, (_, _, seconds) in zip(predicted, samples, strict=True)]
    return {
        "prefill_overhead_s": round(overhead_s, 3),
        "prefill_tokens_per_s": round(1 / per_token_s, 1),
        "context_halving_tokens": round(per_token_s / per_square_s),
        "decode_request_s": round(max(0.0, several_s - one_s) / (BATCH - 1) * OUTPUT_TOKENS, 3),
        "median_error": round(statistics.median(errors), 3),
        "token_s": round(one_s, 4),
        "token_s_of_several": round(several_s, 4),
        "samples": [(held, new, round(seconds, 3)) for held, new, seconds in samples],
    }


def prefill_samples(cluster: Cluster) -> list[tuple[int, int, float]]:
    """(tokens cached, tokens not, seconds), each the quicker of two: the other was disturbed."""
    prefill = next(worker for worker in cluster.plan.workers if worker.role == "prefill")
    decode = next(worker for worker in cluster.plan.workers if worker.role == "decode")
    chooser = random.Random(3)
    samples = []
    for held, new in [(0, length) for length in LENGTHS] + list(CACHED):
        seconds = []
        for _ in range(2):
            beginning = [chooser.choice(VOCABULARY) for _ in range(held)]
            if held:
                prefill_seconds(prefill, decode, beginning)
            seconds.append(
                prefill_seconds(prefill, decode, beginning + [chooser.choice(VOCABULARY) for _ in range(new)])
            )
        samples.append((held, new, min(seconds)))
        report.progress(f"  {held:5} cached {new:5} new {samples[-1][2]:7.3f} s")
    return samples


def prefill_seconds(prefill: WorkerSpec, decode: WorkerSpec, prompt: list[int]) -> float:
    """Both legs by hand; the time until prefill says that it is done."""
    body = {
        "model": prefill.served_model,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "bootstrap_host": prefill.host,
        "bootstrap_port": prefill.handoff_port,
        "bootstrap_room": random.randint(1, 2**62),
    }
    other = threading.Thread(target=post_json, args=(f"http://{decode.host}:{decode.port}", "/v1/completions", body))
    began_s = time.perf_counter()
    other.start()
    post_json(f"http://{prefill.host}:{prefill.port}", "/v1/completions", body)
    took_s = time.perf_counter() - began_s
    other.join()
    return took_s


def fit(samples: list[tuple[int, int, float]]) -> tuple[float, float, float]:
    """Overhead, seconds a token, and seconds a token and token before it; relative errors count alike."""
    rows = np.array([(1.0, new, new * (held + new / 2)) for held, new, _ in samples])
    seconds = np.array([seconds for _, _, seconds in samples])
    solution, *_ = np.linalg.lstsq(rows / seconds[:, None], np.ones(len(samples)), rcond=None)
    overhead_s, per_token_s, per_square_s = (float(value) for value in solution)
    return max(0.0, overhead_s), per_token_s, max(1e-12, per_square_s)


def token_seconds(cluster: Cluster, requests: int) -> float:
    """Seconds between two tokens of an answer, with so many running on the decode worker."""
    chooser = random.Random(requests)
    prompts = [[chooser.choice(VOCABULARY) for _ in range(64)] for _ in range(requests)]

    def one(prompt: list[int]) -> float:
        answer = complete(cluster.url, cluster.plan.router.model, prompt, OUTPUT_TOKENS, ignore_eos=True)
        if answer.ttft_s is None:
            raise SystemExit(f"fit: wanted an answer, found {answer.status} {answer.error}")
        return (answer.total_s - answer.ttft_s) / (OUTPUT_TOKENS - 1)

    with ThreadPoolExecutor(requests) as pool:
        return statistics.median(pool.map(one, prompts))


if __name__ == "__main__":
    sys.exit(run_main(main))

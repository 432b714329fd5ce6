"""Does the router know what is cached? Its prediction against the engine's own report, request by request.

Real SGLang. Mixed requests: conversations that grow turn by turn under shared system
prompts, prompts that share part of a prefix, prompts seen before, prompts never
seen, and several users at once. For each, the router said before dispatch how many
tokens the chosen prefill worker holds; the engine said afterwards how many it used.
"""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks import report
from benchmarks.bench_cluster import run_main, running
from benchmarks.client import Answer, chat, complete
from benchmarks.words import sentence
from engine.launch.cluster import Cluster

SYSTEM_PROMPTS = 4
USERS = 3
"""Requests in flight: more only queue on two cores."""


@dataclass
class User:
    """Somebody who talks, and now and then sends something else."""

    number: int
    chooser: random.Random
    messages: list[dict[str, str]] = field(default_factory=list)

    def request(self, cluster: Cluster) -> Answer:
        kind = self.chooser.random()
        model = cluster.plan.router.model
        if kind < 0.15:
            return complete(cluster.url, model, sentence(self.chooser.getrandbits(32), 120), 2)
        if kind < 0.35:
            shared = sentence(7, 40 * self.chooser.randint(1, 5))
            return complete(cluster.url, model, f"{shared} {self.chooser.randint(0, 5)}", 2)
        if not self.messages or len(self.messages) > 9:
            system = sentence(self.chooser.randrange(SYSTEM_PROMPTS), 150)
            self.messages = [{"role": "system", "content": system}]
        self.messages.append({"role": "user", "content": sentence(self.chooser.getrandbits(32), 20)})
        answer = chat(cluster.url, model, self.messages, 8)
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer


def main() -> None:
    parser = report.arguments(__doc__ or "")
    report.model_argument(parser)
    parser.add_argument("--requests", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with running(model=options.model) as cluster:
        result = measure(cluster, options.requests, options.seed)
    row = [
        result[name] for name in ("requests", "within_one_page", "predicted_tokens", "actual_tokens", "prompt_tokens")
    ]
    columns = ("requests", "within one page", "predicted tokens", "actual tokens", "prompt tokens")
    report.publish(result, columns, [row], options.json)


def measure(cluster: Cluster, requests: int, seed: int) -> dict[str, Any]:
    page_tokens = cluster.plan.workers[0].page_tokens
    users = [User(number, random.Random(seed * 1000 + number)) for number in range(USERS)]
    shares = [requests // USERS + (number < requests % USERS) for number in range(USERS)]
    answers: list[Answer] = []

    def talk(user: User, share: int) -> None:
        for _ in range(share):
            answer = user.request(cluster)
            if answer.error:
                raise SystemExit(f"prediction: wanted an answer, found {answer.status} {answer.error}")
            answers.append(answer)
            if len(answers) % 20 == 0:
                report.progress(f"  {len(answers)} of {requests} requests")

    with ThreadPoolExecutor(USERS) as pool:
        for outcome in [pool.submit(talk, user, share) for user, share in zip(users, shares, strict=True)]:
            outcome.result()
    off = [abs(answer.matched_tokens - answer.cached_tokens) for answer in answers]
    return {
        "requests": len(answers),
        "within_one_page": sum(difference <= page_tokens for difference in off),
        "exact": sum(difference == 0 for difference in off),
        "predicted_tokens": sum(answer.matched_tokens for answer in answers),
        "actual_tokens": sum(answer.cached_tokens for answer in answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "page_tokens": page_tokens,
    }


if __name__ == "__main__":
    sys.exit(run_main(main))

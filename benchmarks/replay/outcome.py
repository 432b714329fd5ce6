"""What one replay came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Outcome:
    """Filled while a replay runs. Times to the first token in seconds, work in tokens."""

    workers: Sequence[str]
    ttft_s: list[float] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    """Of the same requests, in the same order."""
    lengths: list[int] = field(default_factory=list)
    """Prompt tokens of the same requests."""
    hits: list[int] = field(default_factory=list)
    """Of those, the ones that their worker had in its cache."""
    computed: dict[str, int] = field(default_factory=dict)
    """Prompt tokens that a worker computed."""
    sent: dict[str, int] = field(default_factory=dict)
    """Requests that a worker was sent."""
    refused: int = 0
    """Requests without a whole answer: no worker has room for them, or theirs was restarted while it answered."""
    ended_s: float = 0.0
    cut: bool = False
    """Whether it was ended early, as its objective was out of reach."""

    def first_token(self, worker: str, arrived_s: float, at_s: float, prompt_tokens: int, cached_tokens: int) -> None:
        """One request has its first token."""
        self.ttft_s.append(at_s - arrived_s)
        self.arrived_s.append(arrived_s)
        self.lengths.append(prompt_tokens)
        self.hits.append(cached_tokens)
        self.computed[worker] = self.computed.get(worker, 0) + prompt_tokens - cached_tokens
        self.sent[worker] = self.sent.get(worker, 0) + 1
        self.ended_s = max(self.ended_s, at_s)

    @property
    def prompt_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def cached_tokens(self) -> int:
        return sum(self.hits)

    def since(self, from_s: float) -> Outcome:
        """The same of the requests that arrived from then on, without what is counted by worker."""
        kept = [place for place, at_s in enumerate(self.arrived_s) if at_s >= from_s]
        return Outcome(
            self.workers,
            ttft_s=[self.ttft_s[place] for place in kept],
            arrived_s=[self.arrived_s[place] for place in kept],
            lengths=[self.lengths[place] for place in kept],
            hits=[self.hits[place] for place in kept],
        )

    @property
    def hit_rate(self) -> float:
        """Cached of all prompt tokens."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def imbalance(self) -> float:
        """Tokens that the busiest worker computed, over the mean; 1 is even."""
        return _over_mean([self.computed.get(worker, 0) for worker in self.workers])

    @property
    def request_imbalance(self) -> float:
        """Requests of the busiest worker, over the mean."""
        return _over_mean([self.sent.get(worker, 0) for worker in self.workers])

    def ttft(self, share: float) -> float:
        """The time within which this share of the requests had its first token."""
        return float(np.quantile(self.ttft_s, share)) if self.ttft_s else float("nan")

    @property
    def ttft_mean(self) -> float:
        return float(np.mean(self.ttft_s)) if self.ttft_s else float("nan")


def _over_mean(values: Sequence[int]) -> float:
    return max(values) * len(values) / sum(values) if sum(values) else 1.0

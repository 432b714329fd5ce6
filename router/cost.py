"""What a choice costs, in seconds, by constants that are learned while requests end.

    wait(P) + weighed(P) + transfer(pages D lacks, P -> D) + pressure(D)
    weighed(P) = prefill on P + (alpha - 1) * prefill on a usual worker, of the tokens P lacks

Everything is in one unit, so a long cached prefix can outweigh a short queue and a
long queue can outweigh the cache, without thresholds. `alpha` weighs work that a hit would have
spared the fleet, and a worker's own speed changes nothing about that: it counts once, in what the request
waits for. Were it weighed too, a worker a quarter slower would idle beside one with a queue.

A token attends to all before it: at position x it costs (1 + x / context_halving_tokens)
times what the first one costs. Hence `n` tokens that end a prompt of `c` take

    overhead + (n + n * (c - n / 2) / context_halving_tokens) / tokens_per_s

The configured constants are where learning begins (`router.fit`), not where it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from router.bandwidths import Bandwidths, Floats
from router.config import CostConfig
from router.fit import RobustFit, SureRatio

KILO = 1e3
"""Features are in thousands of tokens, and thousands squared, so that all are of a size."""
MAX_SPEED = 8.0
"""No worker is believed to be so many times slower or faster than its fleet."""
SETTLED = 8
"""Prefills of the fleet before any worker is told from it: until then, what is wrong may be the prior."""


@dataclass(slots=True)
class Work:
    """Prefills that were done one after the other, as the sums that their seconds depend on."""

    requests: float = 0.0
    uncached_tokens: float = 0.0
    attended: float = 0.0
    """Sum of uncached tokens times the position of their middle."""

    @classmethod
    def of(cls, uncached_tokens: int, context_tokens: int) -> Work:
        """The last `uncached_tokens` of a prompt of `context_tokens`."""
        return cls(1.0, uncached_tokens, uncached_tokens * (context_tokens - uncached_tokens / 2))

    def plus(self, other: Work) -> Work:
        return Work(
            self.requests + other.requests,
            self.uncached_tokens + other.uncached_tokens,
            self.attended + other.attended,
        )

    def features(self) -> tuple[float, float, float]:
        return self.requests, self.uncached_tokens / KILO, self.attended / KILO**2


class CostModel:
    """Seconds for what a request may lead to; `learn_…` takes in what one did lead to."""

    def __init__(self, config: CostConfig) -> None:
        self.config = config
        rate = KILO / config.prefill_tokens_per_s
        prior = (config.prefill_overhead_s, rate, rate * KILO / config.context_halving_tokens)
        self._prefill = RobustFit(prior, [Work.of(tokens, tokens).features() for tokens in (1, 1000, 8000)])
        self._speed: dict[str, SureRatio] = {}
        self._slowness: dict[str, float] = {}
        """What follows from these, within bounds."""
        self._decode = RobustFit((0.0, config.decode_request_s), [(1.0, 1.0), (1.0, 16.0)])
        self._bandwidths = Bandwidths(1 / config.handoff_bytes_per_s)

    # What is expected.

    def prefill_s(self, worker: str, uncached_tokens: float, context_tokens: int) -> float:
        """One prefill of the last `uncached_tokens` of a prompt of `context_tokens`, alone on this worker."""
        return self.at_own_speed_s([worker], self.usual_prefills_s([uncached_tokens], context_tokens))[0]

    def at_own_speed_s(self, workers: Sequence[str], usual_s: list[float]) -> list[float]:
        """What each of these workers takes for what usually takes so long."""
        slowness = self._slowness
        if not slowness:
            return usual_s
        return [slowness.get(worker, 1.0) * seconds for worker, seconds in zip(workers, usual_s, strict=True)]

    def usual_prefills_s(self, uncached_tokens: Sequence[float], context_tokens: int) -> list[float]:
        """Prefills of the same prompt by workers that lack so much of it, at the fleet's usual speed."""
        overhead_s, per_kilo_s, per_attended_s = self._prefill.constants
        # Of one uncached token, and of one times itself: a choice asks for many workers at once.
        first_s = per_kilo_s / KILO + context_tokens * per_attended_s / KILO**2
        square_s = per_attended_s / (2 * KILO**2)
        return [overhead_s + tokens * (first_s - tokens * square_s) for tokens in uncached_tokens]

    def tokens_in(self, seconds: float) -> int:
        """Tokens that a worker computes in so long, at the start of a prompt."""
        per_kilo_s = self._prefill.constants[1]
        return int(seconds * KILO / per_kilo_s) if per_kilo_s else 0

    def work_s(self, worker: str, work: Work) -> float:
        """Several, one after the other."""
        overhead_s, per_kilo_s, per_attended_s = self._prefill.constants
        requests, kilo, attended = work.features()
        slowness = self._slowness.get(worker, 1.0)
        return slowness * (requests * overhead_s + kilo * per_kilo_s + attended * per_attended_s)

    @property
    def knows_bandwidths(self) -> bool:
        """Whether any hand-off was measured."""
        return bool(self._bandwidths)

    def page_s(self, prefill: str, decode: str) -> float:
        """Handing one page over from one to the other."""
        return self.config.page_bytes * self._bandwidths.byte_s(prefill, decode)

    def pages_s(self, prefills: Sequence[str], decodes: Sequence[str]) -> Floats:
        """`page_s` of every pair. Shape: (prefills, decodes)."""
        return self.config.page_bytes * self._bandwidths.bytes_s(prefills, decodes)

    def pressure_s(self, running_requests: int) -> float:
        """What one more request costs those that decode there."""
        return running_requests * self._decode.constants[1]

    # What was found.

    def learn_prefill(self, worker: str, work: Work, seconds: float) -> None:
        """So much work kept this worker busy for so long."""
        if not self.config.learn or seconds <= 0:
            return
        if self.observed_prefills >= SETTLED:
            speed = self._speed.setdefault(worker, SureRatio())
            # Not the other way round as well: two scales that correct each other drift off together.
            speed.learn(seconds * self._slowness.get(worker, 1.0) / self.work_s(worker, work))
            self._slowness[worker] = min(MAX_SPEED, max(1 / MAX_SPEED, speed.value))
        self._prefill.learn(work.features(), seconds)

    def learn_transfer(self, prefill: str, decode: str, moved_bytes: int, seconds: float) -> None:
        """So many bytes took so long between this pair."""
        if not self.config.learn or seconds <= 0 or moved_bytes <= 0:
            return
        self._bandwidths.learn(prefill, decode, seconds / moved_bytes)

    def learn_decode(self, running_requests: int, itl_s: float, tokens: int) -> None:
        """A request that decoded beside so many others had its `tokens` so far apart."""
        if not self.config.learn or itl_s <= 0 or tokens < 2:
            return
        # In seconds of the whole request: that is what a neighbour costs it.
        self._decode.learn((1.0, float(running_requests)), itl_s * tokens)

    def forget(self, worker: str) -> None:
        """Another worker may take this name."""
        self._speed.pop(worker, None)
        self._slowness.pop(worker, None)
        self._bandwidths.forget(worker)

    # What is shown.

    def constants(self) -> Iterator[tuple[str, float]]:
        """(name, value) of everything learned for the fleet, in the names of the configuration."""
        overhead_s, per_kilo_s, per_attended_s = self._prefill.constants
        yield "prefill_overhead_s", overhead_s
        yield "prefill_tokens_per_s", KILO / per_kilo_s if per_kilo_s else float("inf")
        yield "context_halving_tokens", KILO * per_kilo_s / per_attended_s if per_attended_s else float("inf")
        yield "handoff_bytes_per_s", 1 / self._bandwidths.usual_s
        yield "decode_request_s", self._decode.constants[1]

    def slowness(self) -> Iterator[tuple[str, float]]:
        """(worker, its seconds over the fleet's for the same work)."""
        return iter(self._slowness.items())

    def bandwidths(self) -> Iterator[tuple[str, str, float]]:
        """(prefill worker, decode worker, bytes a second)."""
        return ((prefill, decode, 1 / byte_s) for prefill, decode, byte_s in self._bandwidths)

    @property
    def observed_prefills(self) -> int:
        return self._prefill.observed

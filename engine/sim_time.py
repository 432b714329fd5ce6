"""How long a simulated worker computes: closed forms, so that no event per token is needed."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

from engine.sim_job import SimConfig


def prefill_s(config: SimConfig, start: int, tokens: int) -> float:
    """Seconds for the tokens [start, start + tokens) of a prompt, without the overhead.

    A token after c others takes (1 + c / halving) / rate. That is linear in c, so its sum over a
    chunk is the chunk's length times the value at its middle, exactly: however a prompt is cut into
    chunks, they add up to the same. For the same reason the overhead is paid once, when a request
    begins, and not for every chunk.
    """
    middle = start + tokens / 2
    return tokens / config.prefill_tokens_per_s * (1 + middle / config.context_halving_tokens)


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Decode steps one after the other with the same requests.

    first_s   of the first step
    growth_s  by which each step is longer than the one before: every request has one KV token more
    """

    first_s: float
    growth_s: float

    @classmethod
    def of(cls, config: SimConfig, requests: int, context_tokens: int) -> DecodeRun:
        """context_tokens: KV tokens of all requests before the first step."""
        first_s = config.decode_step_s + config.decode_request_s * requests + config.decode_context_s * context_tokens
        return cls(first_s, config.decode_context_s * requests)

    def duration_s(self, steps: int) -> float:
        return steps * self.first_s + self.growth_s * steps * (steps - 1) / 2

    def steps_by(self, elapsed_s: float) -> int:
        """The least number of steps, at least one, that take so long or longer."""
        if elapsed_s <= self.first_s:
            return 1
        # growth / 2 * n^2 + half * n = elapsed
        half = self.first_s - self.growth_s / 2
        guess = 2 * elapsed_s / (half + sqrt(half * half + 2 * self.growth_s * elapsed_s))
        steps = max(1, ceil(guess))
        while steps > 1 and self.duration_s(steps - 1) >= elapsed_s:
            steps -= 1
        while self.duration_s(steps) < elapsed_s:
            steps += 1
        return steps

"""The workers and speeds of one replay, for either model of a worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

from benchmarks.traces.trace import Trace
from engine.sim_job import SimConfig
from router.config import CostConfig
from transfer.wire import Role

OVERHEAD_S = 0.02
CONTEXT_HALVING_TOKENS = 54_000
TOKEN_S = 0.02
"""Between two tokens of an answer, where nobody is in the way."""

TOKEN_BYTES = 320 * 1024
"""KV of one token of a model of 70 billion parameters with grouped heads."""
HANDOFF_BYTES_PER_S = 40e9


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a trace's workers are, so that one infinite cache shared by eight of them would be 60 % busy.

    prefill_tokens_per_s  of one worker, at the start of a prompt
    objective_s           that 90 % of first tokens must come within, for a load to count as sustained
    """

    prefill_tokens_per_s: float
    objective_s: float


SPEEDS = {
    "mooncake_conversation_trace": Speed(7200, 10),
    "conversation_trace": Speed(7200, 10),
    "SYNTHETIC_toolmix": Speed(7821, 8),
    "synthetic_trace": Speed(5737, 15),
    "claude_code_sessions": Speed(10_000, 5),
}
USUAL = Speed(7200, 10)


def speed_of(trace: Trace) -> Speed:
    return SPEEDS.get(trace.name, USUAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One fleet.

    prefill, decode  workers of these roles; none: `workers` of them do both
    slowness         how many times the usual time each takes, in turn; the router is not told
    """

    workers: int
    capacity_tokens: int
    speed: Speed
    prefill: int = 0
    decode: int = 0
    slowness: Sequence[float] = (1.0,)
    seed: int = 0
    page_tokens: int = 512

    def configs(self) -> Iterator[tuple[str, SimConfig]]:
        """(name, configuration) of every simulated worker."""
        roles: Sequence[tuple[Role, int]] = (("prefill", self.prefill), ("decode", self.decode))
        for role, workers in roles if self.prefill else (("both", self.workers),):
            for number, slowness in zip(range(workers), cycle(self.slowness), strict=False):
                yield (
                    f"{'worker' if role == 'both' else role}-{number}",
                    SimConfig(
                        role=role,
                        capacity_tokens=self.capacity_tokens,
                        page_tokens=self.page_tokens,
                        prefill_overhead_s=OVERHEAD_S * slowness,
                        prefill_tokens_per_s=self.speed.prefill_tokens_per_s / slowness,
                        context_halving_tokens=CONTEXT_HALVING_TOKENS,
                        decode_step_s=TOKEN_S * slowness,
                        page_bytes=self.page_tokens * TOKEN_BYTES,
                        handoff_bytes_per_s=HANDOFF_BYTES_PER_S,
                    ),
                )

    @property
    def cost(self) -> CostConfig:
        """Where a policy's learning begins."""
        return CostConfig(
            prefill_overhead_s=OVERHEAD_S,
            prefill_tokens_per_s=self.speed.prefill_tokens_per_s,
            context_halving_tokens=CONTEXT_HALVING_TOKENS,
            decode_request_s=0.0,
            handoff_bytes_per_s=HANDOFF_BYTES_PER_S,
            page_bytes=self.page_tokens * TOKEN_BYTES,
        )

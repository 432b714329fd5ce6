"""What a choice costs, in seconds.

    wait(P) + alpha * prefill(tokens P lacks, context) + transfer(pages D lacks) + pressure(D)

Everything is in one unit, so a long cached prefix can outweigh a short queue and a
long queue can outweigh the cache, without thresholds.
"""

from __future__ import annotations

from router.config import CostConfig


def prefill_seconds(uncached_tokens: int, context_tokens: int, config: CostConfig) -> float:
    """Time one prefill worker computes, alone, for the last `uncached_tokens` of a prompt of `context_tokens`.

    A token attends to all before it, so at position x it costs (1 + x / context_halving_tokens)
    times what the first one costs; this is the integral.
    """
    middle = context_tokens - uncached_tokens / 2
    slowdown = 1 + middle / config.context_halving_tokens
    return config.prefill_overhead_s + uncached_tokens / config.prefill_tokens_per_s * slowdown


def wait_seconds(outstanding_tokens: int, outstanding_requests: int, config: CostConfig) -> float:
    """Time until a prefill worker has computed what it was sent before."""
    return outstanding_requests * config.prefill_overhead_s + outstanding_tokens / config.prefill_tokens_per_s


def transfer_seconds(pages: int, config: CostConfig) -> float:
    """Time to hand so many pages over."""
    return pages * config.page_bytes / config.handoff_bytes_per_s


def decode_pressure(running_requests: int, config: CostConfig) -> float:
    """What one more request costs those that decode there."""
    return running_requests * config.decode_request_s

"""What the dashboard is told: one JSON object, made anew each time from what the router knows."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from typing import Any

import msgspec

from router.audit import Audits
from router.fleet import Fleet, Worker
from router.index import Index
from router.ledger import FOLLOWED, Counts, Ledger, Record
from router.placement import Placement

SHOWN_REQUESTS = 50


def snapshot(
    *,
    cluster: str,
    router: str,
    model: str,
    uptime_s: float,
    now_s: float,
    steady_s: float,
    fleet: Fleet,
    index: Index,
    ledger: Ledger,
    audits: Audits,
    placement: Placement,
    waiting_requests: int = 0,
) -> dict[str, Any]:
    """The whole state. `now_s` is since 1970, `steady_s` is of the fleet's clock."""
    return {
        "cluster": cluster,
        "router": router,
        "uptime_s": uptime_s,
        "now_s": now_s,
        "model": model,
        "totals": asdict(ledger.totals),
        "waiting_requests": waiting_requests,
        "mended": sum(ledger.followed.get(then, 0) for then in FOLLOWED),
        "series": [{"t_s": second, **_in_series(counts)} for second, counts in ledger.series(now_s)],
        "index": {"nodes": len(index), "bytes": index.bytes, "max_bytes": index.max_bytes},
        "workers": [
            _worker(worker, index, audits, steady_s) for worker in sorted(fleet, key=lambda worker: worker.name)
        ],
        "policy": placement.policy.name,
        "learned": {name: value if isfinite(value) else None for name, value in placement.model.constants()},
        "shadows": [
            {
                "policy": shadow.policy.name,
                "requests": shadow.requests,
                "hit_rate": shadow.hit_rate,
                "imbalance": shadow.imbalance,
            }
            for shadow in placement.shadows
        ],
        "requests": [_request(record) for record in ledger.newest(SHOWN_REQUESTS)],
    }


def explanation(record: Record) -> dict[str, Any]:
    """Everything about one request's choice."""
    return {**_request(record), "unrendered": record.unrendered or None, "decision": record.decision.explained()}


def _in_series(counts: Counts) -> dict[str, int]:
    sums = asdict(counts)
    del sums["generated_tokens"]
    return sums


def _worker(worker: Worker, index: Index, audits: Audits, steady_s: float) -> dict[str, Any]:
    registration = worker.registration
    return {
        "name": worker.name,
        "role": worker.role,
        "state": worker.state(),
        "url": registration.url,
        "epoch": registration.epoch,
        "mode": worker.mode.value,
        "audits": audits[worker.name].audits,
        "agreement": audits[worker.name].agreement,
        "held_pages": index.held(worker.name),
        "capacity_pages": registration.capacity_tokens // registration.page_tokens,
        "running_requests": registration.load.running_requests,
        "waiting_requests": registration.load.waiting_requests,
        "inflight_requests": worker.inflight_requests,
        "outstanding_uncached_tokens": worker.outstanding_uncached_tokens,
        "used_tokens": registration.load.used_tokens,
        "capacity_tokens": registration.capacity_tokens,
        "silent_s": registration.load.silent_s,
        "pools": None if registration.load.pools is None else msgspec.structs.asdict(registration.load.pools),
        "page_tokens": registration.page_tokens,
        "last_seen_s": steady_s - worker.seen_s,
        "requests": worker.requests,
    }


def _request(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "at_s": record.at_s,
        "endpoint": record.endpoint,
        "prefill": record.decision.prefill,
        "decode": record.decision.decode,
        "prompt_tokens": record.prompt_tokens,
        "predicted_cached_tokens": record.predicted_cached_tokens,
        "actual_cached_tokens": record.actual_cached_tokens,
        "generated_tokens": record.generated_tokens,
        "ttft_s": record.ttft_s,
        "first_token_from": record.first_token_from or None,
        "total_s": record.total_s,
        "queued_s": record.queued_s,
        "stream": record.stream,
        "outcome": record.outcome.value,
        "reason": record.reason,
        "error": record.error,
        "tries": [
            {"prefill": one.prefill, "decode": one.decode, "failed": one.failed or None, "then": one.then or None}
            for one in record.tries
        ],
        "handoff": _handoff(record),
    }


def _handoff(record: Record) -> dict[str, Any] | None:
    """What was moved for this request, over all of its prompts; None where nothing is known of it (yet)."""
    if not record.handoffs:
        return None
    moved = [ended for ended in record.handoffs if not ended.reason]
    return {
        "transport": ", ".join(sorted({ended.transport for ended in record.handoffs if ended.transport})),
        "moved_bytes": sum(ended.moved_bytes for ended in moved),
        "pages": sum(ended.pages for ended in moved),
        "ahead_pages": sum(ended.ahead_pages for ended in moved),
        "prefix_tokens": sum(ended.prefix_tokens for ended in moved),
        "took_s": max(ended.took_s for ended in record.handoffs),
        "opening_s": max((ended.opening_s for ended in moved), default=None),
        "computing_s": max((ended.computing_s for ended in moved), default=None),
        "handover_s": max((ended.handover_s for ended in moved), default=None),
        "ended": len(record.handoffs),
        "failed": len(record.handoffs) - len(moved),
        "reason": next((ended.reason for ended in record.handoffs if ended.reason), ""),
    }

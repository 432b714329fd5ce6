"""What became of one request, in one line of a log: words and numbers, nothing of its text.

rid=4f… outcome=ok endpoint=/v1/completions stream=true prefill=prefill-0 decode=decode-0 prompt_tokens=812
cached_tokens=768 generated_tokens=32 queued_s=0.001 ttft_s=0.214 first_token_from=prefill total_s=1.822
tries=2 failed=prefill-1:unreachable:retry
"""

from __future__ import annotations

from router.ledger import Record


def line(record: Record) -> str:
    """`key=value` pairs, none of which contains a space."""
    said: dict[str, object] = {
        "rid": record.id,
        "outcome": record.outcome.value,
        "endpoint": record.endpoint,
        "stream": str(record.stream).lower(),
        "prefill": record.decision.prefill,
        "decode": record.decision.decode,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.actual_cached_tokens,
        "generated_tokens": record.generated_tokens,
        "queued_s": _seconds(record.queued_s),
        "ttft_s": _seconds(record.ttft_s),
        "first_token_from": record.first_token_from or None,
        "total_s": _seconds(record.total_s),
        "tries": len(record.tries),
    }
    if record.tenant:
        said["tenant"] = record.tenant
    failed = [f"{one.failed}:{one.then}" for one in record.tries if one.failed]
    if failed:
        said["failed"] = ",".join(failed)
    return " ".join(f"{key}={str(value).replace(' ', '_')}" for key, value in said.items() if value is not None)


def _seconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.3f}"

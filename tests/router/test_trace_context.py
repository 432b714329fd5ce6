"""A client's trace goes on; nonsense begins a new one."""

from __future__ import annotations

import pytest

from router.trace_context import TraceContext

RID = "0" * 31 + "1"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_a_clients_trace_goes_on_with_a_span_of_the_attempt() -> None:
    context = TraceContext.of(f"00-{TRACE}-00f067aa0ba902b7-00", RID)

    assert context.trace == TRACE
    assert context.parent("aa" + "b" * 16) == f"00-{TRACE}-{'b' * 16}-00"


@pytest.mark.parametrize(
    "header", ["", "nonsense", f"00-{'0' * 32}-00f067aa0ba902b7-01", f"ff-{TRACE}-00f067aa0ba902b7-01"]
)
def test_without_one_the_request_is_its_own_trace(header: str) -> None:
    assert TraceContext.of(header, RID).trace == RID

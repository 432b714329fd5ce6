"""Registrations for tests that need no worker behind them."""

from __future__ import annotations

from transfer.wire import Registration, Role


def registration(name: str, role: Role = "prefill", epoch: int = 1) -> Registration:
    """What this worker says of itself where nothing else matters."""
    return Registration(
        worker=name,
        epoch=epoch,
        role=role,
        state="ready",
        url="http://127.0.0.1:1",
        events="",
        replay="",
        model="tiny",
        page_tokens=16,
        kv_dtype="float32",
        capacity_tokens=100_000,
        max_context_tokens=10_000,
        lease_s=5.0,
    )

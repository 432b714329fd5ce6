"""How baselines order workers: by load, and by chance where they are equal."""

from __future__ import annotations

import xxhash

from router.policy import Ask, PrefillView


def chance(seed: int, number: int, name: str) -> int:
    """A draw for this name: uniform below 2**64, the same for the same inputs."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{number}\0{name}".encode())


def token_load(view: PrefillView) -> tuple[int, int]:
    """Uncached tokens sent and not computed, then requests."""
    return view.outstanding_tokens, view.outstanding_requests


def beginning(ask: Ask, tokens: int) -> int | None:
    """What names the prompt's first `tokens` tokens, in whole pages and at least one; None where no page is known."""
    if not ask.ids:
        return None
    return ask.ids[min(max(1, tokens // ask.page_tokens), len(ask.ids)) - 1]

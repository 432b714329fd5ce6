"""A session's requests on one worker, chosen by its name alone (rendezvous hashing).

A worker that comes or goes moves only its own sessions. Nothing is remembered and no load is looked
at: busy sessions that meet on one worker stay there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from router.baselines.order import beginning, chance
from router.policy import Ask, Pick, Policy

if TYPE_CHECKING:
    from router.pairs import Pairs

BEGINNING_TOKENS = 2_048
"""A request without a session counts as one with all that begin alike for this long."""


class SessionHash(Policy):
    """Where neither session nor prompt is known, each request is its own session."""

    name = "session_hash"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        session = _number_of(ask)
        prefill = min(pairs.prefills, key=lambda view: chance(self._seed, session, view.name))
        return Pick(prefill, pairs.idlest_partner(prefill), f"session {session:016x}")


def _number_of(ask: Ask) -> int:
    if ask.session:
        return xxhash.xxh3_64_intdigest(ask.session.encode(errors="surrogatepass"))
    page = beginning(ask, BEGINNING_TOKENS)
    return ask.number if page is None else page

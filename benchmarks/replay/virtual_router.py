"""One router in virtual time: fleet, index, placement and gossip, put together as the real one has them.

Source ──> Feed ──> Index ──┐
registrations ────> Fleet ──┼──> Placement.choose
other routers ──> Peers ────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks.replay.feed import Feed, Later, Lost, Source
from benchmarks.traces.trace import Turn
from router import gossip
from router.audit import Audits
from router.config import RouterSection
from router.decision import Decision
from router.fleet import Change, Fleet
from router.index import Index
from router.placement import Placement

INDEX_BYTES = 1 << 31
GOSSIP_LAG_S = 0.001
"""From one router to another."""


class VirtualRouter:
    """Does what it is told of, when it is told.

    later  does something at a later time
    lost   whether a worker's message does not arrive here
    """

    def __init__(self, name: str, section: RouterSection, later: Later, lost: Lost) -> None:
        self.name = name
        self.fleet = Fleet()
        self.index = Index(INDEX_BYTES)
        self.placement = Placement(section, self.fleet)
        self.audits = Audits()
        self.feeds: dict[str, Feed] = {}
        self._later = later
        self._lost = lost
        self._announcer = gossip.Announcer(name, 1)
        self._peers = gossip.Peers(name)
        self._came: list[bytes] = []

    def choose(
        self, turn: Turn, session: str, page_tokens: int, now_s: float, held: Mapping[str, int] | None = None
    ) -> Decision:
        """The pair for a request. Raises policy.NoWorker.

        held  pages that the workers hold, where somebody knows better than the index
        """
        prefills, decodes = self.fleet.candidates()
        return self.placement.choose(
            prefills,
            decodes,
            self.index.match(turn.ids) if held is None else held,
            turn.ids,
            turn.prompt_tokens,
            page_tokens,
            session,
            now_s,
        )

    # Workers

    def registered(self, source: Source, audit_s: float, now_s: float) -> None:
        """The worker's agent has said that it is there."""
        name, registration = source.worker.name, source.registration(audit_s)
        if self.fleet.register(registration, now_s) is Change.REPLACED:
            self._forget(name)
        feed = self.feeds.get(name)
        if feed is None:
            feed = self.feeds[name] = Feed(source, self.index, self.fleet, self.audits, self._later, self._lost)
            feed.start(now_s)
        feed.sequence.announced(registration.sequence, audit_s)

    def tick(self, now_s: float) -> None:
        """Looks at leases and at feeds that are behind."""
        for name in self.fleet.expire(now_s):
            self._forget(name)
        for feed in list(self.feeds.values()):
            feed.tick(now_s)

    def _forget(self, name: str) -> None:
        if (feed := self.feeds.pop(name, None)) is not None:
            feed.close()
        self.placement.lost(name)

    # Gossip

    def talk(self, others: list[VirtualRouter], now_s: float) -> None:
        """Takes in what other routers said, and says what is in flight from here where that is due."""
        came, self._came = self._came, []
        changed = [self._peers.heard(gossip.decode(data), now_s) for data in came]
        if self._peers.expire(now_s) or any(changed):
            for worker in self.fleet:
                worker.elsewhere = self._peers.elsewhere(worker.name, worker.registration.epoch)
        loads = self._announcer.due(self.fleet.in_flight(), now_s)
        if loads is not None:
            data = gossip.encode(loads)
            for other in others:
                self._later(now_s + GOSSIP_LAG_S, partial(other._hear, data))

    def _hear(self, data: bytes, now_s: float) -> None:
        self._came.append(data)

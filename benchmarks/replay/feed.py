"""One simulated worker's page events on their way to routers: numbered, encoded, sometimes lost.

    SimWorker.page_events ──> Source ──> wire ──(lag, loss)──> Feed ──> Index
                               ^  └─ Journal                    │ └ Sequence, Audits
                               └────────── PageRequest ─────────┘

All of it is the product's own code but the network, which is a heap of what arrives when: a source
stands for a worker's agent, a feed for what a router's follower does with one worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import msgspec

from engine.journal import Journal
from engine.sim import SimWorker
from router.audit import Audits
from router.fleet import Fleet
from router.index import Index
from router.mirror import Mirror
from router.sequence import Step
from transfer.wire import (
    Audit,
    Batch,
    Handoffs,
    PageRequest,
    Published,
    Registration,
    decode_page_message,
    decode_page_request,
    decode_published,
    encode,
)

LAG_S = 0.005
"""From the moment that SGLang stores a page until the router knows: what the real plug-in takes."""
RENEW_S, LEASE_S, AUDIT_S = 1.0, 5.0, 5.0
"""An agent's own times, where it renews its registration at all."""
MODEL = "simulated"

Later = Callable[[float, Callable[[float], None]], None]
"""(when, what), to be called with the time."""
Lost = Callable[["Feed", Published, float], bool]
"""Whether this message, published now, does not arrive at this feed."""


@dataclass
class Source:
    """The agent of one life of a worker."""

    worker: SimWorker
    journal: Journal
    feeds: list[Feed] = field(default_factory=list)
    answers: bool = True
    """Whether it answers questions. A life that is over does not."""

    def __post_init__(self) -> None:
        self._audits = count()

    def publish(self, now_s: float) -> None:
        """What the cache stored and dropped since the last call goes out."""
        if events := self.worker.page_events():
            self._say(self.journal.apply(events), now_s)

    def audit(self, now_s: float) -> None:
        """A sample of what is held goes out, after all that was published before."""
        self._say(self.journal.audit(next(self._audits)), now_s)

    def answer(self, question: bytes) -> list[bytes]:
        """Every message of the answer, encoded; none where it does not answer."""
        if not self.answers:
            return []
        return [encode(message) for message in self.journal.answer(decode_page_request(question))]

    def registration(self, audit_s: float = 0.0) -> Registration:
        """What the agent says to a router now. audit_s: 0 where it makes no audits."""
        made = self.worker.registration(model=MODEL, sequence=self.journal.sequence, lease_s=LEASE_S)
        return msgspec.structs.replace(made, audit_s=audit_s)

    def _say(self, message: Published, now_s: float) -> None:
        data = encode(message)
        for feed in self.feeds:
            feed.sent(message, data, now_s)


@dataclass
class Feed:
    """What one router makes of one source.

    later  does something at a later time
    """

    source: Source
    index: Index
    fleet: Fleet
    audits: Audits
    later: Later
    lost: Lost
    closed: bool = False
    """Whether the router has stopped to listen."""

    def __post_init__(self) -> None:
        self.name = self.source.worker.name
        self._mirror = Mirror(self.name, self.source.journal.epoch, self.index, self.audits)
        self.sequence = self._mirror.sequence

    def start(self, now_s: float) -> None:
        """First contact."""
        self.source.feeds.append(self)
        self._take(self.sequence.start(now_s), now_s)

    def close(self) -> None:
        """Nothing more is taken in, and the worker's pages are forgotten."""
        self.closed = True
        self.source.feeds.remove(self)
        self.index.forget(self.name)

    def sent(self, message: Published, data: bytes, now_s: float) -> None:
        """The source has published this."""
        if not self.lost(self, message, now_s):
            self.later(now_s + LAG_S, lambda at_s: self._arrived(data, at_s))

    def tick(self, now_s: float) -> None:
        """The router looks at the time."""
        self._take(self.sequence.tick(now_s), now_s)

    def _arrived(self, data: bytes, now_s: float) -> None:
        if self.closed:
            return
        match decode_published(data):
            case Batch() as batch:
                self._take(self.sequence.live(batch, now_s), now_s)
            case Audit() as audit:
                self._take(self.sequence.reached(audit.epoch, audit.sequence, now_s), now_s)
                if self.sequence.stands_at(audit.epoch, audit.sequence):
                    self._take(self._mirror.compared(audit, now_s), now_s)
            case Handoffs():
                """Simulated workers tell of none."""

    def _take(self, step: Step, now_s: float) -> None:
        self._mirror.apply(step.events)
        worker = self.fleet.get(self.name)
        if worker is not None and not worker.lost:
            worker.mode = self._mirror.mode(now_s)
        if step.ask is not None:
            self._ask(step.ask, now_s)

    def _ask(self, request: PageRequest, now_s: float) -> None:
        question = encode(request)

        def asked(at_s: float) -> None:
            answer = self.source.answer(question)
            self.later(at_s + LAG_S, lambda later_s: self._answered(answer, later_s))

        self.later(now_s + LAG_S, asked)

    def _answered(self, answer: list[bytes], now_s: float) -> None:
        for data in answer:
            if not self.closed:
                self._take(self.sequence.answered(decode_page_message(data), now_s), now_s)

"""What happened: the last requests, totals, and a line of seconds for the dashboard.

Never any text of a prompt or an answer, and no message of the engine, which may quote
one. Time comes in; seconds since 1970 where it is shown, seconds of a steady clock
where it is subtracted.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from router.decision import Decision
from transfer.ended import Ended

KEPT_REQUESTS = 200
FOLLOWED = ("retry", "resume")
KEPT_S = 15 * 60
"""How far back the line of seconds goes."""


class Outcome(StrEnum):
    RUNNING = "running"
    OK = "ok"
    ERROR = "error"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Try:
    """One pair's attempt at a request."""

    prefill: str
    decode: str
    failed: str = ""
    """What went wrong, without any words of the engine; "" where nothing did."""
    unseen: bool = False
    """Whether nobody has computed anything for it."""
    decoded: bool = False
    """Whether decode has said a token."""
    then: str = ""
    """What followed: retry, resume, or why neither; "" after the one that went well."""


@dataclass(slots=True, kw_only=True)
class Record:
    """One request, from its choice to its end."""

    id: str
    at_s: float
    """Seconds since 1970."""
    started_s: float
    """Seconds of the steady clock."""
    endpoint: str
    stream: bool
    decision: Decision
    tenant: str = ""
    """The name of its key; "" where it has none."""
    queued_s: float = 0.0
    """From its body to its first dispatch."""
    unrendered: str = ""
    """Why the prompt was not tokenized here; "" where it was."""
    prompt_tokens: int
    actual_cached_tokens: int | None = None
    """As the engine reported; None while unknown."""
    generated_tokens: int = 0
    ttft_s: float | None = None
    """Until the first bytes of a stream."""
    first_token_from: Literal["", "prefill", "decode"] = ""
    """Which of the two said a stream's first token; "" before, and where there is no stream."""
    itl_s: float | None = None
    """Mean time between the tokens after the first."""
    total_s: float | None = None
    outcome: Outcome = Outcome.RUNNING
    error: str | None = None
    tries: list[Try] = field(default_factory=list)
    """In their order; all but the last have failed, or were moved."""
    rooms: range = range(0)
    """Where its pages are handed over, a room for each prompt; none where one worker does both parts."""
    handoffs: list[Ended] = field(default_factory=list)
    """Those that are over, as the decode worker told of them."""

    @property
    def mode(self) -> str:
        """Whether one worker did both parts, or two."""
        return "aggregated" if self.decision.prefill == self.decision.decode else "disaggregated"

    @property
    def predicted_cached_tokens(self) -> int:
        return self.decision.matched_tokens

    @property
    def reason(self) -> str:
        return f"not rendered: {self.unrendered}" if self.unrendered else self.decision.reason


@dataclass(slots=True)
class Counts:
    """Sums over requests. Tokens are counted when a request ends, requests when it begins."""

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    predicted_cached_tokens: int = 0
    actual_cached_tokens: int = 0
    generated_tokens: int = 0

    def add(self, other: Counts) -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.prompt_tokens += other.prompt_tokens
        self.predicted_cached_tokens += other.predicted_cached_tokens
        self.actual_cached_tokens += other.actual_cached_tokens
        self.generated_tokens += other.generated_tokens


class Ledger:
    """Bounded: KEPT_REQUESTS requests and KEPT_S seconds."""

    def __init__(self) -> None:
        self.totals = Counts()
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._by_room: dict[int, Record] = {}
        self.followed: dict[str, int] = {}
        """By what followed a failed attempt (retry, resume, told), how often."""
        self._seconds: deque[tuple[int, Counts]] = deque()

    def begin(self, record: Record) -> None:
        """A request was sent to its workers."""
        self._records[record.id] = record
        while len(self._records) > KEPT_REQUESTS:
            _, oldest = self._records.popitem(last=False)
            for room in oldest.rooms:
                self._by_room.pop(room, None)
        self._count(record.at_s, Counts(requests=1))

    def expect(self, record: Record, room: int, prompts: int) -> None:
        """The request's pages are handed over in this room; those of a batch in as many, counted up from it."""
        for earlier in record.rooms:
            self._by_room.pop(earlier, None)
        record.rooms = range(room, room + prompts)
        if self._records.get(record.id) is record:
            self._by_room |= dict.fromkeys(record.rooms, record)

    def handed_over(self, ended: Ended) -> None:
        """A hand-off is over. Of a request that is not kept any more, or another router's, nothing is noted."""
        record = self._by_room.pop(ended.room, None)
        if record is not None:
            record.handoffs.append(ended)

    def end(self, record: Record, outcome: Outcome, *, now_s: float, steady_s: float, error: str | None = None) -> None:
        """The request is over. Its tokens count as cached only where the engine said so itself."""
        record.outcome, record.error = outcome, error
        for one in record.tries:
            if one.failed:
                then = one.then if one.then in FOLLOWED else "told"
                self.followed[then] = self.followed.get(then, 0) + 1
        record.total_s = steady_s - record.started_s
        if record.ttft_s is not None and record.generated_tokens > 1:
            record.itl_s = (record.total_s - record.ttft_s) / (record.generated_tokens - 1)
        counts = Counts(errors=int(outcome is Outcome.ERROR), generated_tokens=record.generated_tokens)
        if record.actual_cached_tokens is not None:
            # Predicted and actual are compared over the same requests.
            counts.prompt_tokens = record.prompt_tokens
            counts.predicted_cached_tokens = record.predicted_cached_tokens
            counts.actual_cached_tokens = record.actual_cached_tokens
        self._count(now_s, counts)

    def refused(self, now_s: float) -> None:
        """A request that was sent to nobody."""
        self._count(now_s, Counts(requests=1, errors=1))

    def newest(self, count: int) -> list[Record]:
        """The last requests, newest first."""
        newest: list[Record] = []
        for record in reversed(self._records.values()):
            if len(newest) == count:
                break
            newest.append(record)
        return newest

    def get(self, request_id: str) -> Record | None:
        return self._records.get(request_id)

    def series(self, now_s: float) -> Iterator[tuple[int, Counts]]:
        """(second since 1970, its sums), oldest first, of the last KEPT_S seconds; empty seconds are left out."""
        self._prune(now_s)
        return iter(self._seconds)

    def _count(self, at_s: float, counts: Counts) -> None:
        self.totals.add(counts)
        # Two requests may be counted in the wrong order when a clock is set back; the line stays in order.
        second = max(int(at_s), self._seconds[-1][0]) if self._seconds else int(at_s)
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append((second, Counts()))
        self._seconds[-1][1].add(counts)
        self._prune(at_s)

    def _prune(self, now_s: float) -> None:
        while self._seconds and self._seconds[0][0] < now_s - KEPT_S:
            self._seconds.popleft()

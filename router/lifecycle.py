"""A request between its dispatch and its end, as a table: what happens to its two legs, and what is done about it.

    SENT ──prefilled──> DELIVERED ──token──> STREAMING ──answered──> DONE
      └──────────────────token───────────────────^
    any of them ──failed, lost, late, moved──> FAILED ──> again elsewhere, on from its tokens, or the client is told
                ──the client left, the request's time is over──> ENDED

A prefill leg matters until its pages are delivered or decode has a token, the decode leg to the end. An attempt that
is over is never taken up again: what arrives late changes nothing. What follows a failed attempt is `after`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto


class Phase(Enum):
    """Of one attempt: one pair of workers."""

    SENT = auto()
    """Both legs are open; neither has got anywhere."""
    DELIVERED = auto()
    """Prefill's answer has ended well: decode has the pages."""
    STREAMING = auto()
    """Decode's first token has come. The client may have it from prefill, in any phase before."""
    DONE = auto()
    """The client has its whole answer."""
    FAILED = auto()
    """Not with this pair."""
    ENDED = auto()
    """Nobody waits for it any more."""


class Event(Enum):
    PREFILLED = auto()
    """Prefill answered, with success."""
    PREFILL_FAILED = auto()
    """Prefill answered with an error, broke off, was lost or has not delivered in time."""
    TOKEN = auto()
    ANSWERED = auto()
    """Decode's answer is whole, and true."""
    DECODE_FAILED = auto()
    """The same of decode; an answer that is none is one of its failures."""
    MOVED = auto()
    """A worker that drains asks for its long requests to go on elsewhere."""
    GONE = auto()
    """The client closed its connection."""
    EXPIRED = auto()
    """The request's own time is over."""


LIVE = (Phase.SENT, Phase.DELIVERED, Phase.STREAMING)
TABLE: dict[tuple[Phase, Event], Phase] = {
    (Phase.SENT, Event.PREFILLED): Phase.DELIVERED,
    (Phase.SENT, Event.PREFILL_FAILED): Phase.FAILED,
    (Phase.SENT, Event.TOKEN): Phase.STREAMING,
    (Phase.DELIVERED, Event.TOKEN): Phase.STREAMING,
    (Phase.STREAMING, Event.TOKEN): Phase.STREAMING,
    # Decode's word overtook prefill's; and what prefill says of delivered pages is of no interest to anybody.
    (Phase.STREAMING, Event.PREFILLED): Phase.STREAMING,
    (Phase.STREAMING, Event.PREFILL_FAILED): Phase.STREAMING,
    (Phase.DELIVERED, Event.PREFILL_FAILED): Phase.DELIVERED,
}
for _live in LIVE:
    TABLE[_live, Event.ANSWERED] = Phase.DONE
    TABLE[_live, Event.DECODE_FAILED] = Phase.FAILED
    TABLE[_live, Event.MOVED] = Phase.FAILED
    TABLE[_live, Event.GONE] = Phase.ENDED
    TABLE[_live, Event.EXPIRED] = Phase.ENDED


class Impossible(Exception):
    """An event that cannot happen in this phase: a mistake of the router's."""


def step(phase: Phase, event: Event) -> Phase:
    """The phase after this event. Raises Impossible."""
    if phase not in LIVE:
        return phase
    if (phase, event) not in TABLE:
        raise Impossible(f"wanted an event that fits {phase.name}, found {event.name}")
    return TABLE[phase, event]


class Next(StrEnum):
    """What follows a failed attempt."""

    RETRY = "retry"
    """The same request once more: the client has seen nothing of it."""
    RESUME = "resume"
    """On from the tokens that the client has."""
    TELL = "tell"
    """The client is told."""


@dataclass(frozen=True, slots=True)
class Situation:
    """A failed attempt, and what was before it.

    begun       whether the client has anything of the answer
    hindrance   why a stream could not go on elsewhere; "" where it could
    decoded     whether this attempt's decode worker has said a token
    """

    client_to_blame: bool
    moved: bool
    begun: bool
    hindrance: str
    retries: int
    resumes: int
    decoded: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one request: how often it is tried again before decode has said a token, and goes on elsewhere after it."""

    retries: int
    resumes: int


def after(situation: Situation, limits: Limits, budget: bool) -> tuple[Next, str]:
    """What follows, and where the client is told: why nothing else does.

    budget  whether all requests together leave room for one more attempt. A move takes none: nothing has failed.
    """
    if situation.client_to_blame:
        return Next.TELL, "the request is to blame"
    if not (budget or situation.moved):
        return Next.TELL, "too many requests are tried again already"
    if situation.begun and situation.hindrance:
        return Next.TELL, f"cannot go on elsewhere: {situation.hindrance}"
    if situation.begun and situation.decoded:
        if situation.resumes >= limits.resumes and not situation.moved:
            return Next.TELL, f"went on elsewhere {limits.resumes} times"
    elif situation.retries >= limits.retries and not situation.moved:
        return Next.TELL, f"tried {limits.retries + 1} times"
    return Next.RESUME if situation.begun else Next.RETRY, ""

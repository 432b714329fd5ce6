"""Which faults are injected, when and where: every kind at every point, as a list that is the same each time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    KILL_SCHEDULER = "SIGKILL scheduler"
    STOP = "SIGSTOP"
    """Of all processes of the worker or of its scheduler alone, in turn; SIGCONT later."""
    RESET = "TCP reset"
    BLACKHOLE = "blackholed port"
    SLOW = "slow link"
    FULL_POOL = "full KV pool"
    KILL_ROUTER = "killed router"
    KILL_AGENT = "killed agent"
    """The worker's HTTP process, in which the agent lives."""


KILLS = frozenset({Kind.KILL_SCHEDULER, Kind.KILL_ROUTER, Kind.KILL_AGENT})
"""After which a process has to be started again."""


@dataclass(frozen=True)
class Point:
    """When: a part of the time that the first token usually takes, or so many tokens later."""

    name: str
    of_first_token: float
    tokens: int = 0


POINTS = (
    Point("at dispatch", 0.0),
    Point("in the queue", 0.1),
    Point("early in prefill", 0.3),
    Point("in the middle of prefill", 0.5),
    Point("late in prefill", 0.7),
    Point("at the hand-off", 0.9),
    Point("at the first token", 1.0, 1),
    Point("a quarter decoded", 1.0, 8),
    Point("half decoded", 1.0, 16),
    Point("near the end", 1.0, 30),
)


@dataclass(frozen=True)
class Injection:
    number: int
    kind: Kind
    point: Point
    role: str
    """Of the worker that it hits, where it hits a worker."""
    stream: bool
    variant: int
    """Which of a kind's two ways: see `Faults`."""

    @property
    def unit(self) -> dict[str, object]:
        """What identifies it."""
        return {"number": self.number, "kind": self.kind.value, "point": self.point.name}


def injections(wanted: int) -> list[Injection]:
    """So many, kinds and points in turn: any part of the list has all kinds and all points in it as far as it goes."""
    made = []
    for number in range(wanted):
        lap, place = divmod(number, len(Kind))
        kind = list(Kind)[place]
        # A kind meets the next point in each lap: ten laps have every pair of them once.
        point = POINTS[(lap + place) % len(POINTS)]
        again, turn = divmod(lap, len(POINTS))
        role = "decode" if kind is Kind.FULL_POOL else ("prefill", "decode")[(lap + place) % 2]
        made.append(Injection(number, kind, point, role, (turn // 2 + place + again) % 2 == 0, variant=turn // 2 % 2))
    return made

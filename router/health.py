"""Whether a worker is to be trusted with a request: what failed there, what a probe said, what a trial came to.

    HEALTHY ──failed──> SUSPECT ──probe answered──> TRIAL ──a request went well──> HEALTHY
                          ^  └──probe not answered: again, later──┐   │
                          └───────────────────────────────────────┘<──┘ it failed

A suspect gets no requests while there is anybody else; it is probed at once and again and again, so that it is back
soon after its fault is over. Then one request at a time is its trial. Every wait doubles up to a second, and nothing
of this outlives the worker's present life or its first success.
"""

from __future__ import annotations

import math
from enum import Enum

PROBE_S = 0.1
"""Before the first probe that follows one without an answer."""
MAX_PROBE_S = 1.0
TRIAL_S = 0.25
"""Before a worker that answered its probe and failed its trial is probed again."""
MAX_TRIAL_S = 1.0


class Condition(Enum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    TRIAL = "trial"


class Health:
    """Of one worker in one life. Seconds of any steady clock."""

    def __init__(self) -> None:
        self._recover()

    def _recover(self) -> None:
        self.condition = Condition.HEALTHY
        self.probe_at_s = math.inf
        """When it is to be probed next."""
        self._unanswered = 0
        self._failed_trials = 0
        self._on_trial = 0
        """Requests that it has while it is on trial."""

    @property
    def offered(self) -> bool:
        """Whether it may get a request."""
        return self.condition is Condition.HEALTHY or (self.condition is Condition.TRIAL and not self._on_trial)

    def failed(self, now_s: float) -> None:
        """A request went wrong there."""
        if self.condition is Condition.SUSPECT:
            # Another one of those that were sent before: nothing new.
            return
        wait_s = 0.0
        if self.condition is Condition.TRIAL:
            wait_s = min(MAX_TRIAL_S, TRIAL_S * 2**self._failed_trials)
            self._failed_trials += 1
        self.condition, self._on_trial, self._unanswered = Condition.SUSPECT, 0, 0
        self.probe_at_s = now_s + wait_s

    def probed(self, answered: bool, now_s: float) -> None:
        """A probe is over."""
        if self.condition is not Condition.SUSPECT:
            return
        if answered:
            self.condition, self.probe_at_s = Condition.TRIAL, math.inf
            return
        self.probe_at_s = now_s + min(MAX_PROBE_S, PROBE_S * 2**self._unanswered)
        self._unanswered += 1

    def sent(self) -> None:
        """A request goes there."""
        if self.condition is Condition.TRIAL:
            self._on_trial += 1

    def went_well(self) -> None:
        """A request did: whatever was wrong is over."""
        if self.condition is not Condition.HEALTHY:
            self._recover()

    def ended(self) -> None:
        """A request is over, and says nothing of the worker: its client left."""
        if self.condition is Condition.TRIAL:
            self._on_trial = max(0, self._on_trial - 1)

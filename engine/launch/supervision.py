"""What to do about one process, decided from what happened and the time; nothing here acts.

                 ready                      ended, may try again
    starting ───────────> ready ──────────────────────┐
       ^  │ ended, or not ready in time                v
       │  └──────────────────────────────────────> backoff
       └───────────────────────────────────────────────┘ the wait is over
    ended too often, or hopeless: failed        stop wanted: stopping ─ended─> stopped
                                                restart wanted: stopping ─ended─> starting

Every state that waits has a deadline, so a supervisor that calls `tick` when the
deadline has come never waits for ever. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, StrEnum

HOPELESS_EXIT_CODE = 2
"""A process says so when its input is wrong (argparse and typer do): another try would end the same way."""


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    """It ended; it is started again when the wait is over."""
    FAILED = "failed"
    """It ended and is not started again."""
    STOPPING = "stopping"
    STOPPED = "stopped"


ALIVE = frozenset({State.STARTING, State.READY, State.STOPPING})
OVER = frozenset({State.FAILED, State.STOPPED})


class Action(Enum):
    """What the supervisor must do now."""

    START = "start"
    TERMINATE = "ask it to end"
    KILL = "end it and all that it started"


@dataclass(frozen=True)
class Limits:
    """How patient to be. From the cluster file's `launch:` table; the rest is the same for everybody."""

    ready_timeout_s: float
    stop_timeout_s: float
    restarts: int
    restart_window_s: float
    first_backoff_s: float = 0.5
    longest_backoff_s: float = 10.0
    tries_before_ready: int = 2
    """A process that was never ready has most likely a mistake in its configuration: two tries, not all restarts."""
    kill_again_s: float = 2.0
    """A killed process that has not been reported as ended by then is killed again."""


@dataclass(frozen=True)
class Process:
    """All that the decisions depend on."""

    state: State
    since_s: float
    """When it entered its state."""
    deadline_s: float | None
    """When `tick` will decide something; None where nothing is waited for."""
    restarts_at_s: tuple[float, ...] = ()
    """The restarts of the last `restart_window_s` seconds."""
    was_ready: bool = False
    """Whether any of its lives was ready."""
    tries: int = 1
    reason: str = ""
    """Why its last life ended, in words; empty before that."""
    killed: bool = False
    """Whether its end is certain and only has to be reported."""
    again: bool = False
    """Whether it is stopped to be started anew: then its end is no failure."""


Decision = tuple[Process, Action | None]


def begin(now_s: float, limits: Limits) -> Decision:
    """The first start of a process."""
    return Process(State.STARTING, now_s, now_s + limits.ready_timeout_s), Action.START


def ready(process: Process, now_s: float) -> Decision:
    """It can be used. Says nothing new unless it was starting; one that is being killed stays so."""
    if process.state is not State.STARTING or process.killed:
        return process, None
    return replace(process, state=State.READY, since_s=now_s, deadline_s=None, was_ready=True), None


def ended(process: Process, now_s: float, limits: Limits, reason: str, code: int | None = None) -> Decision:
    """It is no more. `code` is its exit code where that is known."""
    if process.state is State.STOPPING and process.again:
        return replace(begin(now_s, limits)[0], restarts_at_s=process.restarts_at_s, was_ready=True), Action.START
    if process.state is State.STOPPING:
        return _enter(process, State.STOPPED, now_s), None
    if process.state not in ALIVE:
        return process, None
    # One that was given up for another reason has that as its reason, not the signal which ended it.
    process = replace(process, reason=process.reason if process.killed else reason, killed=False)
    recent = _recent(process, now_s, limits)
    hopeless = code == HOPELESS_EXIT_CODE and not process.was_ready
    spent = len(recent) >= limits.restarts or (not process.was_ready and process.tries >= limits.tries_before_ready)
    if hopeless or spent:
        return _enter(process, State.FAILED, now_s), None
    wait_s = min(limits.longest_backoff_s, limits.first_backoff_s * 2 ** min(len(recent), 30))
    waiting = replace(_enter(process, State.BACKOFF, now_s), deadline_s=now_s + wait_s, restarts_at_s=recent)
    return waiting, None


def restart(process: Process, now_s: float, limits: Limits) -> Decision:
    """It shall end and begin anew, where it is ready; one that is not is on its way already, or given up."""
    if process.state is not State.READY:
        return process, None
    stopping, action = stop(process, now_s, limits)
    return replace(stopping, again=True), action


def stop(process: Process, now_s: float, limits: Limits) -> Decision:
    """It is wanted no more."""
    if process.again:
        return replace(process, again=False), None
    if process.state in OVER or process.state is State.STOPPING:
        return process, None
    if process.state is State.BACKOFF:
        return _enter(process, State.STOPPED, now_s), None
    stopping = replace(_enter(process, State.STOPPING, now_s), deadline_s=now_s + limits.stop_timeout_s)
    return stopping, Action.TERMINATE


def kill(process: Process, now_s: float, limits: Limits) -> Decision:
    """It is wanted no more, and there is no time to ask."""
    if process.state in OVER:
        return process, None
    if process.state is State.BACKOFF:
        return _enter(process, State.STOPPED, now_s), None
    return _kill(replace(process, state=State.STOPPING, again=False), now_s, limits)


def tick(process: Process, now_s: float, limits: Limits) -> Decision:
    """What the time alone decides. To be called at `deadline_s`; earlier calls decide nothing."""
    if process.deadline_s is None or now_s < process.deadline_s:
        return process, None
    if process.state is State.BACKOFF:
        again = replace(
            process,
            state=State.STARTING,
            since_s=now_s,
            deadline_s=now_s + limits.ready_timeout_s,
            restarts_at_s=(*_recent(process, now_s, limits), now_s),
            tries=process.tries + 1,
        )
        return again, Action.START
    if process.state is State.STARTING and not process.killed:
        reason = f"was not ready after {limits.ready_timeout_s:.0f} s"
        # Waiting as long a second time would help nobody at the first start.
        tries = process.tries if process.was_ready else max(process.tries, limits.tries_before_ready)
        return _kill(replace(process, reason=reason, tries=tries), now_s, limits)
    return _kill(process, now_s, limits)


def _kill(process: Process, now_s: float, limits: Limits) -> Decision:
    return replace(process, killed=True, deadline_s=now_s + limits.kill_again_s), Action.KILL


def _enter(process: Process, state: State, now_s: float) -> Process:
    return replace(process, state=state, since_s=now_s, deadline_s=None)


def _recent(process: Process, now_s: float, limits: Limits) -> tuple[float, ...]:
    return tuple(at_s for at_s in process.restarts_at_s if now_s - at_s < limits.restart_window_s)

"""The decisions about one process: for any order of events, and for the orders that people will see."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.launch import supervision
from engine.launch.supervision import ALIVE, OVER, Action, Limits, Process, State

LIMITS = Limits(ready_timeout_s=30, stop_timeout_s=10, restarts=3, restart_window_s=100)


@dataclass
class World:
    """A process and the kernel's side of it: what really runs, which the decisions only hear of."""

    now_s: float = 0.0
    runs: bool = False
    starts_at_s: list[float] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    process: Process = field(init=False)

    def __post_init__(self) -> None:
        self.take(supervision.begin(self.now_s, LIMITS))

    def take(self, decision: supervision.Decision) -> None:
        self.process, action = decision
        if action is None:
            return
        self.actions.append(action)
        if action is Action.START:
            assert not self.runs, "started while it runs"
            self.runs = True
            self.starts_at_s.append(self.now_s)

    def event(self, kind: str) -> None:
        if kind == "ready" and self.runs:
            self.take(supervision.ready(self.process, self.now_s))
        elif kind == "ended" and self.runs:
            self.runs = False
            self.take(supervision.ended(self.process, self.now_s, LIMITS, "exited with code 1", 1))
        elif kind == "stop":
            self.take(supervision.stop(self.process, self.now_s, LIMITS))
        elif kind == "restart":
            self.take(supervision.restart(self.process, self.now_s, LIMITS))
        elif kind == "kill":
            self.take(supervision.kill(self.process, self.now_s, LIMITS))

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.take(supervision.tick(self.process, self.now_s, LIMITS))


EVENTS = st.lists(
    st.tuples(st.sampled_from(["ready", "ended", "stop", "kill", "restart", "nothing"]), st.floats(0, 40)), max_size=60
)
BEFORE_A_STOP = st.lists(st.tuples(st.sampled_from(["ready", "ended", "nothing"]), st.floats(0, 40)), max_size=60)


@given(EVENTS)
def test_it_is_alive_exactly_while_the_state_says_so(events: list[tuple[str, float]]) -> None:
    world = World()
    for kind, seconds in events:
        world.event(kind)
        world.pass_time(seconds)
        assert world.runs == (world.process.state in ALIVE)


@given(EVENTS)
def test_whatever_waits_has_a_deadline(events: list[tuple[str, float]]) -> None:
    world = World()
    for kind, seconds in events:
        world.event(kind)
        world.pass_time(seconds)
        waits = world.process.state in (State.STARTING, State.BACKOFF, State.STOPPING)
        assert (world.process.deadline_s is not None) == waits
        assert world.process.deadline_s is None or world.process.deadline_s > world.now_s


@given(BEFORE_A_STOP)
def test_restarts_stay_within_the_budget_of_every_window(events: list[tuple[str, float]]) -> None:
    world = World()
    for kind, seconds in events:
        world.event(kind)
        world.pass_time(seconds)
    restarts = world.starts_at_s[1:]
    for at_s in restarts:
        assert sum(at_s - LIMITS.restart_window_s < other <= at_s for other in restarts) <= LIMITS.restarts


@given(EVENTS, st.sampled_from(["stop", "kill"]), EVENTS)
def test_nothing_starts_after_a_stop(
    before: list[tuple[str, float]], stop: str, after: list[tuple[str, float]]
) -> None:
    world = World()
    for kind, seconds in before:
        world.event(kind)
        world.pass_time(seconds)
    world.event(stop)
    starts = len(world.starts_at_s)
    for kind, seconds in after:
        world.event(kind)
        world.pass_time(seconds)
    assert len(world.starts_at_s) == starts


@given(BEFORE_A_STOP)
@settings(max_examples=50)
def test_a_stop_is_followed_by_a_kill_in_time_and_by_the_end(before: list[tuple[str, float]]) -> None:
    world = World()
    for kind, seconds in before:
        world.event(kind)
        world.pass_time(seconds)
    world.event("stop")
    if world.runs:
        world.pass_time(LIMITS.stop_timeout_s)
        assert world.actions[-2:] in ([Action.TERMINATE, Action.KILL], [Action.KILL, Action.KILL])
        world.event("ended")
    assert world.process.state in OVER


@given(EVENTS)
def test_what_is_over_stays_over(events: list[tuple[str, float]]) -> None:
    world = World()
    over: Process | None = None
    for kind, seconds in events:
        world.event(kind)
        world.pass_time(seconds)
        assert over is None or world.process is over
        over = world.process if world.process.state in OVER else None


def test_a_crash_is_waited_for_longer_each_time_until_the_budget_is_spent() -> None:
    world = World()
    waits_s = []
    for _ in range(LIMITS.restarts):
        world.event("ready")
        world.event("ended")
        assert world.process.deadline_s is not None
        waits_s.append(world.process.deadline_s - world.now_s)
        world.pass_time(waits_s[-1])
        assert world.process.state is State.STARTING
    world.event("ready")
    world.event("ended")

    assert waits_s == [0.5, 1.0, 2.0]
    assert world.process.state is State.FAILED


def test_old_restarts_are_forgiven() -> None:
    world = World()
    for _ in range(10):
        world.event("ready")
        world.pass_time(LIMITS.restart_window_s)
        world.event("ended")
        assert world.process.deadline_s == world.now_s + 0.5
        world.pass_time(0.5)


def test_one_that_was_never_ready_gets_a_second_try_and_no_third() -> None:
    world = World()
    states = []
    for _ in range(2):
        world.event("ended")
        world.pass_time(0.5)
        states.append(world.process.state)
    assert states == [State.STARTING, State.FAILED]


def test_wrong_input_is_not_tried_again() -> None:
    process, _ = supervision.begin(0, LIMITS)
    process, _ = supervision.ended(process, 1, LIMITS, "exited with code 2", 2)
    assert process.state is State.FAILED
    assert process.reason == "exited with code 2"


def test_one_that_is_not_ready_in_time_is_killed_and_that_is_the_reason() -> None:
    world = World()
    world.pass_time(LIMITS.ready_timeout_s)
    assert world.actions == [Action.START, Action.KILL]
    world.event("ready")  # too late: it is being killed
    world.event("ended")
    assert world.process.state is State.FAILED
    assert world.process.reason == "was not ready after 30 s"


def test_one_that_was_ready_once_may_be_late_after_a_restart_and_is_tried_again() -> None:
    world = World()
    world.event("ready")
    world.event("ended")
    world.pass_time(0.5)
    world.pass_time(LIMITS.ready_timeout_s)
    world.event("ended")
    assert world.process.state is State.BACKOFF


def states(*events: str) -> list[State]:
    """After each of these."""
    world, found = World(), list[State]()
    for event in events:
        world.event(event)
        found.append(world.process.state)
    return found


def test_a_restart_ends_it_and_starts_it_at_once_and_counts_for_nothing() -> None:
    times = 2 * LIMITS.restarts
    assert states("ready", *["restart", "ended", "ready"] * times) == [
        State.READY,
        *[State.STOPPING, State.STARTING, State.READY] * times,
    ]


def test_a_stop_during_a_restart_is_a_stop() -> None:
    assert states("ready", "restart", "stop", "ended")[-1] is State.STOPPED


def test_one_that_does_not_end_for_its_restart_is_killed_and_started() -> None:
    world = World()
    world.event("ready")
    world.event("restart")
    world.pass_time(LIMITS.stop_timeout_s)
    assert world.actions[-1] is Action.KILL
    world.event("ended")

    assert world.process.state is State.STARTING

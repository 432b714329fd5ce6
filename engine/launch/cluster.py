"""A running cluster: starts what a plan says, watches it, restarts what ends, stops all of it together.

    thread "supervise"                       other threads
      queue <── Began, Ended ─────────────── starters
            <── Seen ─────────────────────── a watcher for each router
            <── Stop ─────────────────────── whoever calls stop()
      decide (engine.launch.supervision), act, publish a View, tell events

One thread owns all of the state, so nothing in it is locked. Use from Python:

    with Cluster.start(config, state_dir) as cluster:
        cluster.wait_ready()
        ask(cluster.url)
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from engine.config import ClusterConfig
from engine.launch import supervision
from engine.launch.births import Began, Birth, Ended, Imported, Report, Starter
from engine.launch.control import Control
from engine.launch.errors import BadInput, LaunchFailed
from engine.launch.fork import ForkStarter
from engine.launch.lifeline import Identity, describe_exit, kill_group
from engine.launch.logs import last_lines, telling_line
from engine.launch.plan import ROUTER, Plan, make_plan, renew_ports
from engine.launch.ports import PortPicker
from engine.launch.probe import CALM_S, EAGER_S, Seen, SeenWorker, Watcher
from engine.launch.program import ProgramName
from engine.launch.spawn import SpawnStarter, launch_command
from engine.launch.state import ClusterRecord, ProcessRecord, StateFolder
from engine.launch.supervision import OVER, Action, Limits, Process, State
from engine.model import choose_model
from engine.spec import ZYGOTE_MODEL_VARIABLE, WorkerSpec

_STEP_S = 0.25
"""The supervisor looks at the time at least this often."""
_SWEEP_S = 5.0
"""How long the kernel may take to end what was killed."""
_SHOWN_LINES = 12
_ZYGOTE = "zygote"


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    """Something could not be recovered; all of it was stopped."""


EventKind = Literal["progress", "problem", "ready"]
"""ready: the whole cluster can be used for the first time."""


@dataclass(frozen=True)
class Event:
    """Something that people should know."""

    name: str
    """The process, or the cluster's name."""
    text: str
    kind: EventKind = "progress"


@dataclass(frozen=True)
class ProcessView:
    """One process at one moment."""

    name: str
    role: str
    state: str
    pid: int | None
    host: str
    port: int
    since_s: float
    """When it entered its state, on the monotonic clock."""
    restarts: int
    log_file: Path
    note: str


@dataclass(frozen=True)
class View:
    """The cluster at one moment."""

    phase: Phase
    began_s: float
    processes: tuple[ProcessView, ...]
    problem: str = ""
    """Why it failed."""


class Cluster:
    """A handle on a cluster that a thread of this process supervises. Make one with `start`."""

    def __init__(
        self, plan: Plan, program: ProgramName, folder: StateFolder, picker: PortPicker, on_event: OnEvent
    ) -> None:
        self.plan = plan
        self.url = plan.url
        self._folder = folder
        self._changed = threading.Condition()
        self._supervisor = _Supervisor(plan, program, folder, picker, on_event, self._publish)
        self._view = self._supervisor.view()
        self._cleanup = ExitStack()
        self._thread = threading.Thread(target=self._supervise, name="supervise", daemon=True)

    @classmethod
    def start(
        cls,
        config: ClusterConfig,
        state_dir: Path,
        model: str | None = None,
        on_event: OnEvent | None = None,
        program: ProgramName = "sglang",
    ) -> Self:
        """Begins to start everything and returns.

        state_dir  the cluster's own folder, made if it is not there
        model      a known model's name or a checkpoint's folder, in place of the file's
        on_event   called from the supervising thread; must not block

        Raises BadInput where a port is in use or the model is not here, LaunchFailed where the cluster runs already.
        """
        served = choose_model(config.model.path, config.model.served_name, model)
        folder = StateFolder(state_dir)
        with ExitStack() as stack:
            stack.enter_context(folder.locked())
            folders = folder.prepare()
            stack.callback(folder.clear, folders.run)
            picker = PortPicker(time.time_ns(), config.chosen_ports)
            plan = make_plan(config, served, folders, picker)
            cluster = cls(plan, program, folder, picker, on_event or _tell_nobody)
            cluster._cleanup = stack.pop_all()
        cluster._thread.start()
        return cluster

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def view(self) -> View:
        return self._view

    @property
    def workers(self) -> dict[str, int]:
        """Name -> pid of the workers that run now."""
        return {one.name: one.pid for one in self._view.processes if one.role != ROUTER and one.pid is not None}

    @property
    def router_pid(self) -> int | None:
        """The first router's."""
        return next(one.pid for one in self._view.processes if one.name == ROUTER)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Until a client can use it. Without a timeout it lasts at most as long as `launch:` lets the start last.

        Raises LaunchFailed, saying why, where it cannot be started or was stopped before.
        """
        if not self._wait(lambda view: view.phase is not Phase.STARTING, timeout_s):
            raise LaunchFailed(f"not ready after {timeout_s:.0f} s: {_unready(self._view)}")
        if self._view.phase is not Phase.READY:
            raise LaunchFailed(self._view.problem or "it was stopped before it was ready")

    def wait_over(self, timeout_s: float | None = None) -> bool:
        """Whether all of it has ended and everything is cleared within the time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stops everything and waits for it: `launch.stop_timeout_s` and a little at most. May be called again."""
        self.ask_stop()
        bound_s = self.plan.config.launch.stop_timeout_s + 3 * _SWEEP_S
        if not self.wait_over(bound_s):
            self.kill()
            self.wait_over(bound_s)

    def ask_stop(self) -> None:
        """Returns at once."""
        self._supervisor.tell(_Stop())

    def restart(self, name: str) -> None:
        """One process of it, which ends and begins anew; returns at once. Raises BadInput for a name of nobody."""
        names = [one.name for one in self._view.processes]
        if name not in names:
            raise BadInput(f"process: wanted one of {', '.join(sorted(names))}, found {name!r}")
        self._supervisor.tell(_Restart(name))

    def kill(self) -> None:
        """Everything, now. Returns at once."""
        self._supervisor.tell(_Stop(kill=True))

    def _supervise(self) -> None:
        with self._cleanup:
            control = Control(self._folder.path, self.restart)
            try:
                self._supervisor.run()
            finally:
                control.close()

    def _publish(self, view: View) -> None:
        with self._changed:
            self._view = view
            self._changed.notify_all()

    def _wait(self, fits: Callable[[View], bool], timeout_s: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: fits(self._view), timeout_s)


OnEvent = Callable[[Event], None]


def _tell_nobody(event: Event) -> None:
    """Where nobody listens."""


def _unready(view: View) -> str:
    return ", ".join(f"{one.name} is {one.state}" for one in view.processes if one.state != State.READY)


@dataclass(frozen=True)
class _Stop:
    kill: bool = False


@dataclass(frozen=True)
class _Restart:
    name: str


_Message = Report | Seen | _Stop | _Restart


@dataclass
class _Managed:
    """One process of the plan, over all its lives."""

    name: str
    role: str
    host: str
    port: int
    process: Process
    log_file: Path
    life: int = 0
    restarts: int = 0
    pid: int | None = None
    identity: Identity | None = None
    began_ns: int = 0
    """Nanoseconds since 1970 when this life was asked for."""
    seen: dict[str, SeenWorker | None] = field(default_factory=dict)
    """Of a worker: what each router says of this life of it, None where it does not know it."""
    note: str = ""
    unswept: list[int] = field(default_factory=list)


class _Supervisor:
    """Everything that the supervising thread owns."""

    def __init__(
        self,
        plan: Plan,
        program: ProgramName,
        folder: StateFolder,
        picker: PortPicker,
        on_event: OnEvent,
        publish: Callable[[View], None],
    ) -> None:
        self._plan = plan
        self._program = program
        self._folder = folder
        self._picker = picker
        self._on_event = on_event
        self._publish = publish
        launch = plan.config.launch
        self._limits = Limits(launch.ready_timeout_s, launch.stop_timeout_s, launch.restarts, launch.restart_window_s)
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._began_s = time.monotonic()
        self._phase = Phase.STARTING
        self._problem = ""
        self._imported = False
        self._routers = {router.name: router for router in plan.routers}
        self._workers = {worker.name: worker for worker in plan.workers}
        self._managed = {name: self._manage(name) for name in (*self._routers, *self._workers)}
        self._starters = self._make_starters()
        self._last_view = self.view()

    def tell(self, message: _Message) -> None:
        """From any thread."""
        self._inbox.put(message)

    def run(self) -> None:
        """Until everything is over."""
        watchers = [
            Watcher(router.name, url, router.section.api_key_file, self.tell)
            for router, url in zip(self._plan.routers, self._plan.urls, strict=True)
        ]
        try:
            now_s = time.monotonic()
            for managed in self._managed.values():
                self._decided(managed, *supervision.begin(now_s, self._limits))
            while any(managed.process.state not in OVER for managed in self._managed.values()):
                waiting = any(managed.process.state is State.STARTING for managed in self._managed.values())
                for watcher in watchers:
                    watcher.every_s = EAGER_S if waiting else CALM_S
                self._show()
                self._receive()
                self._tick()
        except BaseException as error:
            self._problem = f"the launcher itself failed: {error!r}"
            raise
        finally:
            for watcher in watchers:
                watcher.close()
            for starter in self._starters.values():
                starter.close()
            self._finish()

    def view(self) -> View:
        processes = tuple(
            ProcessView(
                name=one.name,
                role=one.role,
                state=_shown_state(one),
                pid=one.pid,
                host=one.host,
                port=one.port,
                since_s=one.process.since_s,
                restarts=one.restarts,
                log_file=one.log_file,
                note=one.note,
            )
            for one in self._managed.values()
        )
        return View(self._phase, self._began_s, processes, self._problem)

    def _manage(self, name: str) -> _Managed:
        told = self._workers[name] if name in self._workers else self._routers[name].section
        return _Managed(
            name=name,
            role=told.role if isinstance(told, WorkerSpec) else ROUTER,
            host=told.host,
            port=told.port,
            process=Process(State.STARTING, self._began_s, None),
            log_file=self._plan.folders.log_file(name),
        )

    def _make_starters(self) -> dict[str, Starter]:
        """By the name of the process."""

        def router_command(birth: Birth) -> list[str]:
            return launch_command("router", "--spec", birth.spec_file, "--program", self._program)

        def worker_command(birth: Birth) -> list[str]:
            return launch_command("worker", "--spec", birth.spec_file, "--program", self._program)

        workers: Starter
        if self._plan.config.forks:
            log_file = self._plan.folders.log_file(_ZYGOTE)
            environment = {**self._plan.config.environment, ZYGOTE_MODEL_VARIABLE: self._plan.workers[0].model_path}
            workers = ForkStarter(self._program, environment, log_file, self.tell)
        else:
            workers = SpawnStarter(worker_command, self.tell)
        router = SpawnStarter(router_command, self.tell)
        return {**dict.fromkeys(self._routers, router), **dict.fromkeys(self._workers, workers)}

    def _receive(self) -> None:
        """Waits for a message, then takes all that have come."""
        timeout_s: float | None = _STEP_S
        while True:
            try:
                message = self._inbox.get(timeout=timeout_s) if timeout_s else self._inbox.get_nowait()
            except queue.Empty:
                return
            timeout_s = None
            self._handle(message)

    def _handle(self, message: _Message) -> None:
        match message:
            case Imported(seconds):
                self._imported = True
                self._say(_ZYGOTE, f"imported SGLang once for all workers in {seconds:.1f} s")
            case Began():
                self._began(message)
            case Ended():
                self._ended(message)
            case Seen():
                self._saw(message)
            case _Stop(kill):
                self._stop(kill)
            case _Restart(name):
                managed = self._managed[name]
                self._decided(managed, *supervision.restart(managed.process, time.monotonic(), self._limits))

    def _began(self, report: Began) -> None:
        managed = self._managed[report.name]
        if report.life == managed.life:
            managed.pid, managed.identity, managed.note = report.pid, Identity.of(report.pid), ""
            if managed.process.state is State.STOPPING:
                # It was asked to stop before there was anything to ask.
                self._act(managed, Action.KILL if managed.process.killed else Action.TERMINATE)

    def _ended(self, report: Ended) -> None:
        managed = self._managed[report.name]
        if report.life != managed.life:
            return
        now_s = time.monotonic()
        lived_s = now_s - managed.process.since_s
        was = managed.process
        if managed.pid is not None:
            managed.unswept = kill_group(managed.pid, _SWEEP_S)
        managed.pid = managed.identity = None
        managed.seen.clear()
        how = report.note or describe_exit(report.code)
        if was.again:
            left = f", but {_left(managed)}" if managed.unswept else ""
            self._say(managed.name, f"stopped, to begin anew{left}")
            self._decided(managed, *supervision.ended(was, now_s, self._limits, how, report.code))
            return
        self._decided(managed, *supervision.ended(was, now_s, self._limits, how, report.code))
        if managed.process.state is State.STOPPED:
            self._say(managed.name, "stopped" + (f", but {_left(managed)}" if managed.unswept else ""))
            return
        why = "" if report.note else telling_line(managed.log_file)
        managed.note = managed.process.reason + (f": {why}" if why else "")
        text = f"{managed.process.reason} after {lived_s:.1f} s{f'; last words: {why}' if why else ''}"
        if managed.process.state is State.BACKOFF:
            wait_s = (managed.process.deadline_s or now_s) - now_s
            nth = len(managed.process.restarts_at_s) + 1
            text += f"; starting it again in {wait_s:.1f} s ({nth} of {self._limits.restarts} allowed)"
        self._say(managed.name, text, "problem")
        if managed.unswept:
            self._say(managed.name, _left(managed), "problem")

    def _saw(self, seen: Seen) -> None:
        now_s = time.monotonic()
        for managed in self._managed.values():
            if managed.pid is None or seen.at_s < managed.process.since_s:
                continue
            usable = seen.healthy and managed.name == seen.router
            if managed.role != ROUTER and seen.healthy:
                one = seen.workers.get(managed.name)
                managed.seen[seen.router] = one if one and one.epoch >= managed.began_ns else None
                usable = len(managed.seen) == len(self._routers) and _seen_state(managed) == "ready"
            if usable and managed.process.state is State.STARTING:
                took_s = now_s - managed.process.since_s
                self._decided(managed, *supervision.ready(managed.process, now_s))
                managed.note = ""
                self._say(managed.name, f"ready after {took_s:.1f} s")

    def _stop(self, kill: bool) -> None:
        now_s = time.monotonic()
        if self._phase in (Phase.STARTING, Phase.READY):
            self._phase = Phase.STOPPING
            self._say(self._plan.config.name, "stopping")
        decide = supervision.kill if kill else supervision.stop
        for managed in self._managed.values():
            self._decided(managed, *decide(managed.process, now_s, self._limits))

    def _tick(self) -> None:
        now_s = time.monotonic()
        for managed in self._managed.values():
            self._decided(managed, *supervision.tick(managed.process, now_s, self._limits))
        failed = [one for one in self._managed.values() if one.process.state is State.FAILED]
        if failed and not self._problem:
            self._problem = self._explain(failed[0])
            self._stop(kill=False)
        if self._phase is Phase.STARTING and all(one.process.state is State.READY for one in self._managed.values()):
            self._phase = Phase.READY
            self._show()
            self._say(self._plan.config.name, f"ready after {now_s - self._began_s:.1f} s", "ready")

    def _decided(self, managed: _Managed, process: Process, action: Action | None) -> None:
        managed.process = process
        if action is not None:
            self._act(managed, action)

    def _act(self, managed: _Managed, action: Action) -> None:
        match action:
            case Action.START:
                self._start(managed)
            case Action.TERMINATE:
                if managed.identity is None:
                    self._starters[managed.name].interrupt()
                else:
                    # Its leader only: what it started is its own to end, and looks like a crash if it ends first.
                    managed.identity.signal(signal.SIGTERM)
            case Action.KILL:
                if managed.pid is None:
                    self._starters[managed.name].interrupt()
                else:
                    if managed.identity is not None:
                        # A fork that has only just begun leads no group of its own yet.
                        managed.identity.signal(signal.SIGKILL)
                    managed.unswept = kill_group(managed.pid, _SWEEP_S)

    def _start(self, managed: _Managed) -> None:
        managed.restarts += managed.life > 0
        managed.life += 1
        managed.began_ns = time.time_ns()
        spec_file = self._plan.folders.spec_file(managed.name)
        environment: dict[str, str] = {}
        if managed.name in self._routers:
            spec_file.write_text(self._routers[managed.name].model_dump_json(indent=2))
        else:
            worker = self._fresh_spec(managed)
            worker.write(spec_file)
            environment = worker.environment
        birth = Birth(
            name=managed.name,
            life=managed.life,
            spec_file=str(spec_file),
            log_file=str(managed.log_file),
            environment=environment,
        )
        self._say(managed.name, "starting" if managed.life == 1 else "starting again")
        if managed.role != ROUTER and self._plan.config.forks and not self._imported:
            managed.note = "SGLang is being imported, once for all workers"
        self._starters[managed.name].start(birth)

    def _fresh_spec(self, managed: _Managed) -> WorkerSpec:
        """With ports that are free now, and an empty folder."""
        worker = self._workers[managed.name]
        if managed.name not in self._plan.fixed_ports:
            worker = self._workers[managed.name] = renew_ports(worker, self._picker)
        managed.port = worker.port
        run_dir = Path(worker.run_dir)
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(mode=0o700, parents=True)
        return worker

    def _explain(self, managed: _Managed) -> str:
        tail = "".join(f"\n  {line}" for line in last_lines(managed.log_file, _SHOWN_LINES))
        tries = f" {managed.life} times" if managed.life > 1 else ""
        lines = f"; its last lines:{tail}" if tail else ""
        return f"{managed.name}{tries} {managed.note or managed.process.reason}; log: {managed.log_file}{lines}"

    def _say(self, name: str, text: str, kind: EventKind = "progress") -> None:
        self._on_event(Event(name, text, kind))

    def _show(self) -> None:
        """Publishes and writes what runs, if that has changed."""
        view = self.view()
        if view == self._last_view:
            return
        self._last_view = view
        self._folder.write(self._record(view))
        self._publish(view)

    def _finish(self) -> None:
        self._phase = Phase.FAILED if self._problem else Phase.STOPPED
        self._publish(self.view())

    def _record(self, view: View) -> ClusterRecord:
        launcher = Identity.of(os.getpid())
        assert launcher is not None, "this process runs"
        launch = self._plan.config.launch
        key_file = self._plan.router.section.api_key_file
        return ClusterRecord(
            name=self._plan.config.name,
            phase=view.phase,
            launcher_pid=launcher.pid,
            launcher_started_ticks=launcher.started_ticks,
            stop_timeout_s=launch.stop_timeout_s,
            ready_timeout_s=launch.ready_timeout_s,
            url=self._plan.url,
            urls=dict(zip(self._routers, self._plan.urls, strict=True)),
            model=self._plan.router.model,
            api_key_file=str(key_file) if key_file else "",
            run_dir=str(self._plan.folders.run),
            processes=[_process_record(one) for one in self._managed.values()],
        )


def _process_record(managed: _Managed) -> ProcessRecord:
    identity = managed.identity
    return ProcessRecord(
        name=managed.name,
        role=managed.role,
        state=_shown_state(managed),
        pid=identity.pid if identity else 0,
        started_ticks=identity.started_ticks if identity else 0,
        host=managed.host,
        port=managed.port,
        restarts=managed.restarts,
        log=str(managed.log_file),
        note=managed.note,
    )


def _shown_state(managed: _Managed) -> str:
    """The supervisor's word, unless a router sees a worker differently that was ready once."""
    state = managed.process.state
    if state is State.READY and managed.role != ROUTER:
        return _seen_state(managed)
    return state.value


def _seen_state(managed: _Managed) -> str:
    """What the routers say of a worker: ready where all do, else the first other word."""
    states = [one.state if one else "lost" for one in managed.seen.values()]
    return next((state for state in states if state != "ready"), "ready" if states else "lost")


def _left(managed: _Managed) -> str:
    return f"processes {', '.join(map(str, managed.unswept))} do not end although they were killed"

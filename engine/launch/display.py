"""What people see of a cluster: a table that stays in place on a terminal, one plain line for each change elsewhere."""

from __future__ import annotations

import queue
import shlex
import time
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from engine.launch.cluster import Cluster, Event, Phase, View
from engine.launch.plan import ROUTER, Folders, Plan
from engine.launch.state import ClusterRecord

_COLOURS = {
    "ready": "green",
    "starting": "yellow",
    "backoff": "yellow",
    "stopping": "yellow",
    "failed": "red",
    "lost": "red",
    "suspect": "red",
    "hung": "red",
    "draining": "yellow",
}
_REFRESH_S = 0.25


def follow(cluster: Cluster, events: queue.SimpleQueue[Event], console: Console) -> None:
    """Shows the cluster until everything is over."""
    if console.is_terminal:
        _follow_live(cluster, events, console)
    else:
        _follow_plain(cluster, events, console)


def plan_tables(plan: Plan) -> RenderableType:
    """Each process that would be started, with all it would be told."""
    overview = _table("name", "role", "address", "hand-off", "events", "replay", "log")
    for router in plan.routers:
        at = f"{router.section.host}:{router.section.port}"
        overview.add_row(router.name, ROUTER, at, "", "", "", _log(plan.folders, router.name))
    for worker in plan.workers:
        ports = (str(port or "") for port in (worker.handoff_port, worker.events_port, worker.replay_port))
        log = _log(plan.folders, worker.name)
        overview.add_row(worker.name, worker.role, f"{worker.host}:{worker.port}", *ports, log)
    told = _table("SGLang's flags and environment of")
    told.columns[0].no_wrap = True
    told.add_column("", overflow="fold")
    for worker in plan.workers:
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in worker.environment.items())
        told.add_row(worker.name, escape(f"{shlex.join(worker.engine_args)}\n{variables}"))
    start = "forked from one import of SGLang" if plan.config.forks else "each started by itself"
    transfer = plan.config.transfer
    about = [
        f"model    {plan.router.model} in {plan.router.model_path}",
        f"workers  {start}; role, ports, events and hand-off are added by the worker itself",
        f"pages    handed over by {', '.join(transfer.transports)}",
        *(_gossip_ports(plan) if len(plan.routers) > 1 else ()),
        *(_nixl_warning(transfer.nixl_devices) if "nixl" in transfer.transports else ()),
        f"logs     {plan.folders.log_file('x').parent}",
        "ports    free now; `up` looks again, except for the router's and where port_base is set",
    ]
    return Group(overview, Text(), told, Text(), *(Text(line, overflow="fold") for line in about))


def record_table(record: ClusterRecord) -> Table:
    """What `mainstem status` knows of each process."""
    table = _table("name", "role", "state", "pid", "address", "restarts", "note")
    for one in record.processes:
        pid = str(one.pid or "")
        table.add_row(
            one.name, one.role, _state(one.state), pid, f"{one.host}:{one.port}", str(one.restarts), escape(one.note)
        )
    return table


def addresses(cluster: Cluster) -> list[str]:
    """Where to go, one line each."""
    plan = cluster.plan
    others = [f"also       {url}/v1      {name}" for name, url in _others(plan)]
    return [
        f"API        {cluster.url}/v1      model {plan.router.model}",
        *others,
        f"dashboard  {cluster.url}/",
        f"metrics    {cluster.url}/metrics",
        f"logs       {plan.folders.log_file('x').parent}",
    ]


def _others(plan: Plan) -> list[tuple[str, str]]:
    """Name and address of the routers after the first."""
    return [(router.name, url) for router, url in zip(plan.routers, plan.urls, strict=True)][1:]


def _gossip_ports(plan: Plan) -> list[str]:
    ports = ", ".join(f"{router.name} on {router.gossip_port}" for router in plan.routers)
    return [f"gossip   between routers: {ports}"]


def _nixl_warning(devices: Sequence[str]) -> list[str]:
    return [
        f"nixl     listens on {', '.join(devices)}, where no key protects it: "
        "whoever reaches its port can write any memory of the worker"
    ]


def _follow_plain(cluster: Cluster, events: queue.SimpleQueue[Event], console: Console) -> None:
    while not cluster.wait_over(_REFRESH_S):
        _print_events(events, cluster, console)
    _print_events(events, cluster, console)


def _print_events(events: queue.SimpleQueue[Event], cluster: Cluster, console: Console) -> None:
    for event in _taken(events):
        after_s = time.monotonic() - cluster.view.began_s
        _print_lines([f"{after_s:7.1f} s  {event.name}: {event.text}"], console)
        if event.kind == "ready":
            _print_lines(addresses(cluster), console)


def _follow_live(cluster: Cluster, events: queue.SimpleQueue[Event], console: Console) -> None:
    with Live(console=console, refresh_per_second=1 / _REFRESH_S, transient=False) as live:
        while not cluster.wait_over(_REFRESH_S):
            _print_problems(events, live.console)
            live.update(_live_view(cluster, cluster.view))
        _print_problems(events, live.console)
        live.update(_live_view(cluster, cluster.view))


def _print_problems(events: queue.SimpleQueue[Event], console: Console) -> None:
    for event in _taken(events):
        if event.kind == "problem":
            console.print(Text.assemble((event.name, "bold red"), f" {event.text}"))


def _live_view(cluster: Cluster, view: View) -> RenderableType:
    now_s = time.monotonic()
    table = _table("name", "role", "state", "pid", "port", "for", "restarts", "note")
    for one in view.processes:
        lasted = _duration(now_s - one.since_s)
        pid = "" if one.pid is None else str(one.pid)
        table.add_row(
            one.name, one.role, _state(one.state), pid, str(one.port), lasted, str(one.restarts), escape(one.note)
        )
    name = cluster.plan.config.name
    elapsed = _duration(now_s - view.began_s)
    match view.phase:
        case Phase.STARTING:
            below = [f"starting {name}, {elapsed} so far; Ctrl-C stops"]
        case Phase.READY:
            below = [*addresses(cluster), f"{name} runs, {elapsed}; Ctrl-C stops it"]
        case Phase.STOPPING:
            below = [f"stopping {name}; Ctrl-C again kills it at once"]
        case _:
            below = [f"{name} {view.phase}"]
    return Group(table, *map(Text, below))


def _taken(events: queue.SimpleQueue[Event]) -> Iterable[Event]:
    while not events.empty():
        yield events.get()


def _print_lines(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        # As it is: no wrapping in a file, no markup out of a log line.
        console.print(Text(line), soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _state(state: str) -> str:
    colour = _COLOURS.get(state, "default")
    return f"[{colour}]{escape(state)}[/{colour}]"


def _log(folders: Folders, name: str) -> str:
    return escape(folders.log_file(name).name)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

"""What will be started for a cluster file: every process with its ports, flags and files, before any of it runs.

    ClusterConfig + model folder + free ports ──> Plan = RouterSpec x N, WorkerSpec x M

Workers register with every router, at `Plan.urls`; people use the same addresses.
"""

from __future__ import annotations

import importlib.util
import ipaddress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.config import ClusterConfig, WorkerGroup
from engine.launch.errors import BadInput
from engine.launch.flags import arguments
from engine.launch.ports import PortPicker, is_free, why_not_free
from engine.model import ServedModel
from engine.spec import WorkerSpec
from router.config import RouterSpec
from transfer.nixl_packages import NIXL_PACKAGES

ROUTER = "router"
"""The first router's name among the processes of a cluster, and the role of all routers."""
_OURS = {"SGL_FORCE_SHUTDOWN": "1"}
"""Every worker's: asked to end, SGLang would otherwise wait for its requests, for as long as they take."""


@dataclass(frozen=True)
class Folders:
    """Where a cluster keeps its files."""

    state: Path
    """Logs, specs, key, state: kept after the end, for whoever wants to know what happened."""
    run: Path
    """Unix sockets: a short path, as the kernel takes 107 bytes. Removed at the end."""

    @property
    def key_file(self) -> Path:
        return self.state / "key"

    def log_file(self, name: str) -> Path:
        return self.state / "logs" / f"{name}.log"

    def spec_file(self, name: str) -> Path:
        return self.state / "specs" / f"{name}.json"

    def run_dir(self, name: str) -> Path:
        return self.run / name


@dataclass(frozen=True)
class Plan:
    """Everything that `mainstem up` starts."""

    config: ClusterConfig
    folders: Folders
    routers: tuple[RouterSpec, ...]
    workers: tuple[WorkerSpec, ...]
    fixed_ports: frozenset[str]
    """Names of the workers whose ports the file sets."""

    @property
    def router(self) -> RouterSpec:
        """The first router."""
        return self.routers[0]

    @property
    def url(self) -> str:
        """The first router's."""
        return self.urls[0]

    @property
    def urls(self) -> tuple[str, ...]:
        """Every router's address, the first one first."""
        return tuple(map(_url, self.routers))


def make_plan(config: ClusterConfig, model: ServedModel, folders: Folders, picker: PortPicker) -> Plan:
    """Chooses the ports. Raises BadInput where one that the file sets is in use, a host is not of this machine,
    or nixl is wanted and not installed.

    A router.port of 0, which only callers in Python and --port can ask for, takes free ones.
    """
    if "nixl" in config.transfer.transports and not any(map(_is_installed, NIXL_PACKAGES)):
        wanted = f"transfer.transports: nixl wants one of the packages {', '.join(NIXL_PACKAGES)}, found none"
        raise BadInput(f"{wanted}: install mainstem[nixl]")
    routers = _routers(config, model, folders, picker)
    template = WorkerSpec(
        name="",
        role="both",
        host="",
        port=0,
        events_port=0,
        replay_port=0,
        model_path=str(model.path),
        served_model=model.name,
        page_tokens=config.page_tokens,
        routers=tuple(map(_url, routers)),
        key_file=str(folders.key_file),
        run_dir="",
        transports=config.transfer.transports,
        handoff_timeout_s=config.transfer.timeout_s,
        silence_s=config.transfer.silence_s,
        tcp_lanes=config.transfer.tcp_lanes,
        ahead=config.transfer.ahead,
        nixl_devices=config.transfer.nixl_devices,
        renew_s=config.transfer.renew_s,
        audit_s=config.transfer.audit_s,
    )
    workers: list[WorkerSpec] = []
    fixed: set[str] = set()
    for index, group in enumerate(config.workers):
        for number in range(group.count):
            name = f"{group.role}-{sum(worker.role == group.role for worker in workers)}"
            ports = _group_ports(index, group, number, picker)
            fixed |= {name} if group.port_base is not None else set()
            flags = {"page-size": config.page_tokens, **config.engine, **group.engine}
            named = msgspec.structs.replace(
                template,
                name=name,
                role=group.role,
                host=group.host,
                advertise_host=group.advertise_host,
                advertise_base=group.advertise_base + 4 * number if group.advertise_base is not None else 0,
                engine_args=arguments(flags),
                environment={**_OURS, **config.environment, **group.environment},
                run_dir=str(folders.run_dir(name)),
            )
            workers.append(_with_ports(named, ports))
    return Plan(config, folders, routers, tuple(workers), frozenset(fixed))


def renew_ports(worker: WorkerSpec, picker: PortPicker) -> WorkerSpec:
    """The same worker, with other ports where one of its own has been taken since."""
    ports = (worker.port, worker.handoff_port, worker.events_port, worker.replay_port)
    if all(port == 0 or is_free(worker.host, port) for port in ports):
        return worker
    return _with_ports(worker, [picker.pick(worker.host) for _ in ports])


def http_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _routers(config: ClusterConfig, model: ServedModel, folders: Folders, picker: PortPicker) -> tuple[RouterSpec, ...]:
    host, replicas = config.router.host, config.router.replicas
    if config.router.port == 0:
        ports = [picker.pick(host) for _ in range(replicas)]
    else:
        ports = list(config.router.ports)
        for port in ports:
            _want_free("router", "port", host, port)
    gossip = [picker.pick(host) for _ in range(replicas)] if replicas > 1 else [0]
    told = [f"tcp://{http_url(_reachable(host), port).removeprefix('http://')}" for port in gossip]
    return tuple(
        RouterSpec(
            section=config.router.model_copy(update={"port": port}),
            model=model.name,
            model_path=model.path,
            key_file=folders.key_file,
            cluster=config.name,
            name=f"{ROUTER}-{number}" if number else ROUTER,
            gossip_port=gossip[number],
            peers=tuple(address for other, address in enumerate(told) if other != number),
        )
        for number, port in enumerate(ports)
    )


def _url(router: RouterSpec) -> str:
    return http_url(_reachable(router.section.host), router.section.port)


def _is_installed(module: str) -> bool:
    """Found without importing it: that takes long."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:
        # What Python raises for a module that this process was told to do without.
        return False


def _with_ports(worker: WorkerSpec, ports: list[int]) -> WorkerSpec:
    http, handoff, events, replay = ports
    return msgspec.structs.replace(
        worker,
        port=http,
        handoff_port=handoff if worker.role == "prefill" else 0,
        events_port=events,
        replay_port=replay,
    )


def _group_ports(index: int, group: WorkerGroup, number: int, picker: PortPicker) -> list[int]:
    place = f"workers[{index}]"
    if group.port_base is None:
        try:
            return [picker.pick(group.host) for _ in range(4)]
        except OSError as error:
            raise BadInput(f"{place}.host: wanted an address of this machine, found {group.host!r}: {error}") from None
    first = group.port_base + 4 * number
    for port in range(first, first + 4):
        _want_free(place, "port_base", group.host, port)
    return list(range(first, first + 4))


def _want_free(place: str, key: str, host: str, port: int) -> None:
    try:
        obstacle = why_not_free(host, port)
    except OSError as error:
        raise BadInput(f"{place}.host: wanted an address of this machine, found {host!r}: {error}") from None
    if obstacle:
        raise BadInput(f"{place}.{key}: wanted a free port, {port} on {host} is {obstacle}")


def _reachable(host: str) -> str:
    """The address to connect to where a server listens on `host`: every address means this machine's own here."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"

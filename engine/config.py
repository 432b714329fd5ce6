"""The cluster file: one YAML file that says all of a cluster.

    name, model      what is served, and under which name
    router           the HTTP front                       (router.config.RouterSection)
    engine           SGLang's own flags, for all workers
    workers          groups of workers; each may add flags of its own
    transfer         how KV pages travel
    launch           how processes are started, watched and stopped

Everything is checked when it is read, and each mistake is one line that names its
place. Paths in the file count from the file's folder. What a key is called here
is what every page and message calls it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.launch.errors import BadInput
from engine.launch.explain import explain, show
from engine.launch.flags import FlagValue, known_flags, mistake
from router.config import RouterSection, is_loopback
from transfer.memory import REACHING, Memory

Seconds = Annotated[float, Field(gt=0)]
Flags = dict[str, FlagValue]
Variables = dict[str, str]
Device = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$")]

DEFAULT_PAGE_TOKENS = 16
LOOPBACK_DEVICE = "lo"
RANK_FLAGS = ("tp-size", "tensor-parallel-size", "pp-size", "pipeline-parallel-size")
"""SGLang's flags that put several ranks into one worker; those of data parallelism are the launcher's anyway."""
_STRICT = ConfigDict(extra="forbid", frozen=True)


class ModelSection(BaseModel):
    """`model:` — the checkpoint that every worker loads and whose tokenizer the router uses."""

    model_config = _STRICT

    path: str
    """A name that `mainstem model list` shows, or a folder with a Hugging Face checkpoint."""
    served_name: str | None = None
    """The name clients ask for. Default: the folder's name."""


class WorkerGroup(BaseModel):
    """One entry of `workers:` — workers that are alike, named prefill-0, prefill-1 and so on."""

    model_config = _STRICT

    role: Literal["prefill", "decode", "both"]
    """prefill computes prompts, decode generates; both does all of it, without a hand-off."""
    count: Annotated[int, Field(ge=1, le=512, strict=True)] = 1
    host: str = "127.0.0.1"
    """Address that the workers' ports listen on. One of this machine."""
    port_base: Annotated[int | None, Field(ge=1024, le=65_000, strict=True)] = None
    """First of four ports in a row for each worker (HTTP, hand-off, events, replay). Default: free ones are chosen."""
    advertise_host: str = ""
    """Where routers and other workers reach the workers, where that is not `host`: something forwards the ports."""
    advertise_base: Annotated[int | None, Field(ge=1024, le=65_000, strict=True)] = None
    """First of four ports in a row there for each worker, in the order of `port_base`. Default: its own ports."""
    engine: Flags = {}
    """SGLang flags for this group; they replace those of the same name in the cluster's `engine:`."""
    environment: Variables = {}
    """Environment variables for this group, over the cluster's. Started by fork, a worker cannot change what SGLang
    reads while it is imported: set that in the cluster's `environment:`."""

    @field_validator("environment", mode="before")
    @classmethod
    def _plain_text(cls, value: object) -> object:
        return _variables(value)


class TransferSection(BaseModel):
    """`transfer:` — how KV pages get from prefill to decode."""

    model_config = _STRICT

    transports: Annotated[tuple[Literal["nvlink", "shm", "tcp", "nixl"], ...], Field(min_length=1)] = ("shm", "tcp")
    """What a hand-off may use, the preferred one first. Pages of a CPU: shm on one host, tcp, nixl; of GPUs: nvlink on
    one host, nixl."""
    tcp_lanes: Annotated[int, Field(ge=1, le=64, strict=True)] = 2
    """Connections to each peer over which tcp moves pages."""
    nixl_devices: Annotated[tuple[Device, ...], Field(min_length=1)] = (LOOPBACK_DEVICE,)
    """Network devices that nixl uses, as UCX names them: eth0, or mlx5_0:1 for a port of an RDMA card."""
    trusted_devices: tuple[Device, ...] = ()
    """Network devices that only trusted machines reach. nixl uses no others, but for loopback."""
    ahead: Literal["never", "pass", "layers"] = "pass"
    """When nvlink writes pages: never before SGLang sends them; or when the GPU has computed their forward pass, beside
    the CPU's looking at it; or all of their layers but the last while that one is computed, which slows it down by
    about as much as is won (measured, see transfer/README.md)."""
    timeout_s: Seconds = 60.0
    """A hand-off that has not ended this long after its pages were granted fails."""
    silence_s: Annotated[float, Field(ge=1)] = 2.5
    """A worker that says nothing to its peer in a hand-off for so long is lost to it; signs of life go out twice a
    second."""
    renew_s: Seconds = 1.0
    """Time between two registrations of a worker, which are its heartbeat."""
    audit_s: Seconds = 5.0
    """Time between two audits of a worker: it says what it holds of a sample of pages, and routers compare."""


class LaunchSection(BaseModel):
    """`launch:` — how processes are started, watched and stopped."""

    model_config = _STRICT

    start: Literal["auto", "fork", "spawn"] = "auto"
    """fork: SGLang is imported once and each worker forked from that, which is quick but only right without a GPU.
    spawn: each worker is a process of its own from the beginning. auto: fork where engine.device is cpu."""
    ready_timeout_s: Seconds = 300.0
    """A process that is not ready this long after its start is given up."""
    stop_timeout_s: Seconds = 10.0
    """A process that has not ended this long after it was asked to is killed."""
    restarts: Annotated[int, Field(ge=0, strict=True)] = 5
    """A process that ends more often than this within `restart_window_s` cannot be recovered: everything is stopped."""
    restart_window_s: Seconds = 300.0


class ClusterConfig(BaseModel):
    """A whole cluster file."""

    model_config = _STRICT

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    """Names the cluster in messages and its folder on disk. Lower case letters, digits and dashes."""
    model: ModelSection
    router: RouterSection = RouterSection()
    engine: Flags = {}
    """SGLang's own flags, verbatim, for every worker: long names without the dashes; true = the bare flag,
    false = leave it out, a list = several values. `page-size` also tells the router the size of a page."""
    environment: Variables = {}
    """Environment variables of every worker."""
    workers: Annotated[tuple[WorkerGroup, ...], Field(min_length=1)]
    transfer: TransferSection = TransferSection()
    launch: LaunchSection = LaunchSection()

    @field_validator("environment", mode="before")
    @classmethod
    def _plain_text(cls, value: object) -> object:
        return _variables(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        checks = (
            self._roles,
            self._page_size,
            self._ranks,
            self._start,
            self._port_ranges,
            self._memory,
            self._nixl_devices,
        )
        for check in checks:
            if problem := check():
                raise ValueError(problem)
        return self

    @property
    def page_tokens(self) -> int:
        """Tokens in a page, for the workers and for the router."""
        size = self.engine.get("page-size", DEFAULT_PAGE_TOKENS)
        assert isinstance(size, int), "checked when the file was read"
        return size

    @property
    def forks(self) -> bool:
        """Whether workers are forked from one import of SGLang."""
        return self.launch.start == "fork" or (self.launch.start == "auto" and self.engine.get("device") == "cpu")

    @property
    def chosen_ports(self) -> frozenset[int]:
        """The ports that the file itself gives away."""
        return frozenset(self.router.ports).union(*map(group_ports, self.workers))

    def with_router_port(self, port: int) -> Self:
        """The same cluster with its routers elsewhere; 0 takes free ports when it is started.

        Raises BadInput where a port is a worker's, or there are no ports left for all routers.
        """
        router = self.router.model_copy(update={"port": port})
        if router.ports[-1] > 65_535:
            raise BadInput(f"router.port: wanted {router.replicas} ports up to 65535, found {port} as the first one")
        for index, group in enumerate(self.workers):
            if port and (taken := set(ports := group_ports(group)).intersection(router.ports)):
                why = f"workers[{index}].port_base takes {ports[0]} to {ports[-1]}"
                raise BadInput(f"router.port: wanted a port that no worker has, found {min(taken)}: {why}")
        return self.model_copy(update={"router": router})

    def _roles(self) -> str | None:
        roles = {group.role for group in self.workers}
        if "both" in roles or roles == {"prefill", "decode"}:
            return None
        missing = "decode" if "decode" not in roles else "prefill"
        return f"workers: wanted prefill and decode workers, or role both; found no {missing} worker"

    def _page_size(self) -> str | None:
        size = self.engine.get("page-size", DEFAULT_PAGE_TOKENS)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            return f"engine.page-size: wanted an integer of at least 1, found {show(size)}"
        for index, group in enumerate(self.workers):
            if "page-size" in group.engine:
                return (
                    f"workers[{index}].engine.page-size: must be the same for all workers, set it in engine.page-size"
                )
        return None

    def _ranks(self) -> str | None:
        """The hand-off is between single ranks: each has all of every page."""
        places = [("engine", self.engine, {group.role for group in self.workers})]
        places += [(f"workers[{index}].engine", group.engine, {group.role}) for index, group in enumerate(self.workers)]
        for place, flags, roles in places:
            for flag in RANK_FLAGS:
                if flags.get(flag, 1) != 1 and roles != {"both"}:
                    return (
                        f"{place}.{flag}: wanted 1 with the roles prefill and decode, "
                        f"found {show(flags[flag])}: a hand-off between several ranks is not supported"
                    )
        return None

    def _memory(self) -> str | None:
        """Pages on a GPU are moved by other transports than those in a CPU's memory."""
        for index, group in enumerate(self.workers):
            device = group.engine.get("device", self.engine.get("device"))
            if group.role == "both" or device not in ("cpu", "cuda"):
                # SGLang finds the device itself where none is named; the worker then says the same.
                continue
            memory: Memory = "DRAM" if device == "cpu" else "VRAM"
            where = f"in a {'CPU' if memory == 'DRAM' else 'GPU'}'s memory"
            for place, name in enumerate(self.transfer.transports):
                if name not in REACHING[memory]:
                    wanted = " or ".join(REACHING[memory])
                    return (
                        f"transfer.transports[{place}]: wanted {wanted}, as workers[{index}] keeps its pages {where}, "
                        f"found {show(name)}"
                    )
        return None

    def _nixl_devices(self) -> str | None:
        if "nixl" not in self.transfer.transports or {group.role for group in self.workers} == {"both"}:
            return None
        on_loopback = all(is_loopback(group.host) for group in self.workers)
        safe = {*self.transfer.trusted_devices, *((LOOPBACK_DEVICE,) if on_loopback else ())}
        for index, device in enumerate(self.transfer.nixl_devices):
            if device not in safe:
                return (
                    f"transfer.nixl_devices[{index}]: wanted a device that is in transfer.trusted_devices, "
                    f"found {show(device)}: nixl's data port knows no key, so whoever reaches it "
                    "can write any memory of the worker"
                )
        return None

    def _start(self) -> str | None:
        devices = {group.engine.get("device", self.engine.get("device")) for group in self.workers}
        if not self.forks or devices == {"cpu"}:
            return None
        found = show(next(device for device in devices if device != "cpu"))
        return (
            f"launch.start: fork wants engine.device cpu, found {found}: a process that has used "
            "a GPU cannot be forked; set launch.start to spawn"
        )

    def _port_ranges(self) -> str | None:
        taken = Counter(self.router.ports)
        for index, group in enumerate(self.workers):
            for port in group_ports(group):
                if port > 65_535 or taken[port]:
                    wanted = f"{4 * group.count} free ports in a row up to 65535"
                    return f"workers[{index}].port_base: wanted {wanted}, found that {port} is taken or too high"
                taken[port] += 1
        return None


def group_ports(group: WorkerGroup) -> range:
    """The ports that `port_base` fixes for a group: four for each worker."""
    return range(0) if group.port_base is None else range(group.port_base, group.port_base + 4 * group.count)


def read_cluster(path: Path) -> ClusterConfig:
    """The cluster that `path` describes. Raises BadInput, a line for each mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None
    try:
        return parse_cluster(text, path.parent)
    except BadInput as error:
        raise BadInput(*(f"{path}: {line}" for line in error.lines)) from None


def parse_cluster(text: str, folder: Path) -> ClusterConfig:
    """The cluster that `text` describes; its relative paths count from `folder`. Raises BadInput."""
    tree = _parse_yaml(text)
    try:
        config = ClusterConfig.model_validate(tree)
    except ValidationError as error:
        raise BadInput(*explain(ClusterConfig, error)) from None
    if mistakes := _flag_mistakes(config):
        raise BadInput(*mistakes)
    return _with_absolute_paths(config, folder)


def _parse_yaml(text: str) -> Any:
    loader = None
    try:
        loader = _ClusterLoader(text)
        tree = loader.get_single_data()
    except RecursionError:
        raise BadInput(
            f"line {loader.line + 1 if loader else 1}: wanted fewer levels, found too many to read"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise BadInput(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"wanted YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise BadInput(f"wanted a mapping with name, model and workers, found {show(tree)}")
    return tree


class _ClusterLoader(yaml.SafeLoader):
    """A safe loader that names the line of what PyYAML lets pass, or fails at without saying where.

    A key that stands twice in a mapping: PyYAML would keep the last one. A scalar that looks like a date or a
    number and is none, such as 2024-13-01: PyYAML lets Python's own error through.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, ArithmeticError, AttributeError):
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.rpartition(":")[2]
            problem = f"wanted a valid {kind}, found {show(node.value)}; write it in quotes if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"{key.value}: wanted once, found again (first on line {seen[key.value]})"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _flag_mistakes(config: ClusterConfig) -> list[str]:
    known = known_flags()
    places = [("engine", config.engine)]
    places += [(f"workers[{index}].engine", group.engine) for index, group in enumerate(config.workers)]
    return [
        f"{place}.{flag}: {problem}" for place, flags in places for flag in flags if (problem := mistake(flag, known))
    ]


def _with_absolute_paths(config: ClusterConfig, folder: Path) -> ClusterConfig:
    key_file = config.router.api_key_file
    if key_file is None:
        return config
    path = (folder / key_file.expanduser()).absolute()
    if not path.is_file():
        raise BadInput(f"router.api_key_file: wanted a file, found none at {path}")
    return config.model_copy(update={"router": config.router.model_copy(update={"api_key_file": path})})


def _variables(value: object) -> object:
    """Integers become text, as in `OMP_NUM_THREADS: 1`; true and 1.0 could be meant to be spelled in several ways."""
    if not isinstance(value, dict):
        return value
    for name, one in value.items():
        if isinstance(one, (bool, float)) or one is None:
            raise ValueError(f"{name}: wanted text, found {show(one)}; write it in quotes")
    return {str(name): str(one) if isinstance(one, int) else one for name, one in value.items()}

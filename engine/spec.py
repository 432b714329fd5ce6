"""What one worker is told when it starts: the contract between the launcher and a worker process.

The launcher writes it as JSON, and either runs `mainstem worker --spec FILE` as a
process of its own or forks one that has SGLang imported already. Both end in
`engine.worker.run_worker(spec)`, so nothing but the boot time depends on the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker of a cluster. Ports are chosen by the launcher and free when it looked."""

    name: str
    """Unique in the cluster: prefill-0."""
    role: Literal["prefill", "decode", "both"]
    host: str
    """Address that every port of the worker listens on."""
    port: int
    """SGLang's HTTP server."""
    handoff_port: int = 0
    """A prefill worker's listener for hand-off connections; 0 for other roles."""
    events_port: int
    """The agent's PUB socket."""
    replay_port: int
    """The agent's ROUTER socket."""
    advertise_host: str = ""
    """Where routers and peers reach it, if not at its own address: something forwards the ports. "" for its own."""
    advertise_base: int = 0
    """The first of four ports there, for `port`, `handoff_port`, `events_port` and `replay_port`; 0 for its own."""
    model_path: str
    """Folder of the checkpoint."""
    served_model: str
    """The name clients ask for."""
    page_tokens: int
    engine_args: tuple[str, ...] = ()
    """SGLang's own flags, verbatim, as its command line takes them."""
    environment: dict[str, str] = {}
    routers: tuple[str, ...] = ()
    """Base URLs of the routers to register with."""
    key_file: str
    """The cluster's key (transfer.auth.ClusterKey)."""
    run_dir: str
    """Folder for this worker's sockets and status; the launcher made it."""
    transports: tuple[str, ...] = ("shm", "tcp")
    """Transports that a hand-off may use, in the order of preference."""
    handoff_timeout_s: float = 60.0
    """A hand-off that has not ended this long after its pages were granted fails."""
    silence_s: float = 2.5
    """A peer of a hand-off that is silent for so long is lost."""
    tcp_lanes: int = 2
    """Connections to each peer over which tcp moves pages."""
    nixl_devices: tuple[str, ...] = ("lo",)
    """Network devices that NIXL may use, as UCX names them: whoever reaches one can write this worker's memory."""
    ahead: Literal["never", "pass", "layers"] = "pass"
    """When nvlink writes pages: when SGLang sends them, or when their forward pass is computed, or all of their
    layers but the last while that one is."""
    renew_s: float = 1.0
    """Time between two registrations."""
    audit_s: float = 5.0
    """Time between two audits, which say what the worker holds of a sample of pages."""

    @property
    def reached_at(self) -> tuple[str, int, int, int, int]:
        """Host and ports (HTTP, hand-off, events, replay) that others are told."""
        base = self.advertise_base
        own = (self.port, self.handoff_port, self.events_port, self.replay_port)
        ports = tuple(range(base, base + 4)) if base else own
        return (self.advertise_host or self.host, *ports)  # type: ignore[return-value]  # four of them, in both cases

    @classmethod
    def read(cls, path: Path) -> WorkerSpec:
        """Raises msgspec.ValidationError naming the field, or OSError."""
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self)))


SPEC_VARIABLE = "MAINSTEM_WORKER_SPEC"
"""Environment of a worker's processes: the path of its spec."""
EPOCH_VARIABLE = "MAINSTEM_WORKER_EPOCH"
"""Environment of a worker's processes: nanoseconds since 1970 when this life of it began."""
ZYGOTE_MODEL_VARIABLE = "MAINSTEM_ZYGOTE_MODEL"
"""Environment of a zygote: folder of the checkpoint that all of its workers load."""


def page_socket(spec: WorkerSpec) -> str:
    """ZeroMQ address on which the agent takes page events and ended hand-offs from the scheduler's process."""
    return f"ipc://{spec.run_dir}/pages.ipc"

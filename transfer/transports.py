"""The transports by name, as the cluster file spells them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transfer.memory import REACHING, Memory
from transfer.pool import Pool, SharedAddress
from transfer.shm import ShmTransport
from transfer.tcp import TcpTransport
from transfer.transport import Transport

if TYPE_CHECKING:
    from transfer.nvlink import Layers

NAMES = ("nvlink", "shm", "tcp", "nixl")


def make(
    names: Sequence[str],
    pool: Pool,
    *,
    shared: SharedAddress | None,
    tcp_lanes: int,
    nixl_devices: tuple[str, ...],
    stall_s: float,
    memory: Memory = "DRAM",
    layers: Layers | None = None,
) -> list[Transport]:
    """One of each, over this pool, in this order.

    shared        where this process's pool can be mapped by others; None where it cannot
    tcp_lanes     tcp's connections for each peer
    nixl_devices  network devices that UCX may use and listen on
    stall_s       a peer that takes or sends nothing for so long, in the middle of pages, is lost
    memory        where the pool lies: VRAM is a GPU's
    layers        whose buffers are whose, where pages may leave before all layers are computed; nvlink's alone do

    Raises ValueError for another name, and for one that does not reach this memory; Unreachable for a transport whose
    library is missing.
    """
    made: list[Transport] = []
    reaching = REACHING[memory]
    for name in names:
        if name in NAMES and name not in reaching:
            raise ValueError(f"transports: wanted some of {', '.join(reaching)} for pages in {memory}, found {name}")
        match name:
            case "shm":
                made.append(ShmTransport(pool, shared))
            case "tcp":
                made.append(TcpTransport(pool, lanes=tcp_lanes, stall_s=stall_s))
            case "nvlink":
                # CUDA's bindings, and a driver: only where there is a GPU.
                from transfer.nvlink import NvlinkTransport

                made.append(NvlinkTransport(pool, layers=layers))
            case "nixl":
                # UCX is 230 MB of libraries: not loaded by those that do not use it.
                from transfer.nixl import NixlTransport

                made.append(NixlTransport(pool, devices=nixl_devices, memory=memory))
            case _:
                raise ValueError(f"transports: wanted some of {', '.join(NAMES)}, found {name}")
    return made

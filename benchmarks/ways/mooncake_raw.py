"""Mooncake's transfer engine by hand, over its own way between GPUs of one host ("nvlink_intra").

It opens decode's buffers with CUDA IPC, so memory of cudaMalloc will do, and hands all rows of a call to the driver as
one batch of copies. Its call comes back when they are done; prefill then tells decode by a word in shared memory.
The ends find each other through an address on the loopback; but it listens at a port of every interface while a cell
is measured, which no setting of its own prevents.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.ways import nixl_raw
from benchmarks.ways.addresses import addresses
from benchmarks.ways.ends import HandOffFailed
from benchmarks.ways.told import tell, wait_until_told
from transfer.gpu_memory import GpuMemory
from transfer.landed_ring import RingAddress, RingReader, RingWriter
from transfer.plan import Pages

PROTOCOL = "nvlink_intra"
HOST = "127.0.0.1"
_ENVIRONMENT = {"MC_INTRANODE_NVLINK": "1", "MC_LOG_LEVEL": "WARNING"}
"""Without the first it takes another transport, whatever its protocol is said to be."""


@dataclass(frozen=True)
class Described:
    """Decode's side, for prefill."""

    name: str
    """By which the engines find each other: host and port."""
    pointers: list[int]
    """Of each buffer."""
    ring: RingAddress


def missing() -> str | None:
    """Why it cannot be measured here; None where it can."""
    return None if find_spec("mooncake") is not None else "wanted mooncake installed"


class MooncakePrefill:
    def __init__(self, memory: GpuMemory, decode: Described) -> None:
        self._memory = memory
        self._decode = decode
        self._ring = RingWriter(decode.ring)
        self._engine = _engine(memory)

    def describe(self) -> None:
        return None

    def send(self, room: int, source: Pages, destination: Pages) -> float:
        began_s = time.monotonic()
        page_bytes = self._memory.layout.page_bytes
        here = addresses(self._memory.pointers, page_bytes, source)
        there = addresses(self._decode.pointers, page_bytes, destination)
        lengths = np.repeat(page_bytes, len(source))
        answer = self._engine.batch_transfer_sync_write(
            self._decode.name, here.ravel().tolist(), there.ravel().tolist(), lengths.tolist()
        )
        if answer != 0:
            raise HandOffFailed(f"mooncake: batch_transfer_sync_write: wanted 0, found {answer}; its reason is above")
        tell(self._ring)
        return began_s

    def close(self) -> None:
        _forget_buffers(self._engine, self._memory)
        del self._engine


class MooncakeDecode:
    def __init__(self, memory: GpuMemory) -> None:
        self.pool = memory.pool
        self._memory = memory
        self._engine = _engine(memory)
        self._ring = RingReader()

    def describe(self) -> Described:
        return Described(f"{HOST}:{self._engine.get_rpc_port()}", self._memory.pointers, self._ring.address)

    def join(self, answer: None) -> None:
        pass

    def expect(self, room: int, destination: Pages) -> None:
        pass

    def wait(self, room: int) -> float:
        return wait_until_told(self._ring)

    def close(self) -> None:
        _forget_buffers(self._engine, self._memory)
        del self._engine
        self._ring.close()


def _engine(memory: GpuMemory) -> Any:
    """One that knows every buffer. Raises HandOffFailed."""
    try:
        # Its library wants CUDA's runtime, which lies where the loader does not look.
        importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("cudart")
        module = importlib.import_module("mooncake.engine")
    except (ImportError, RuntimeError) as error:
        raise HandOffFailed(f"mooncake: {error}") from error
    if not getattr(module, "SUPPORT_INTRA_NVLINK", False):
        raise HandOffFailed(f"mooncake: built without {PROTOCOL}")
    with nixl_raw.environment(_ENVIRONMENT):
        engine = module.TransferEngine()
        answer = engine.initialize(HOST, "P2PHANDSHAKE", PROTOCOL, "")
    if answer != 0:
        raise HandOffFailed(f"mooncake: initialize with {PROTOCOL}: wanted 0, found {answer}; its reason is above")
    for pointer, page_bytes in zip(memory.pointers, memory.layout.page_bytes, strict=True):
        answer = engine.register_memory(pointer, memory.layout.pages * page_bytes)
        if answer != 0:
            raise HandOffFailed(f"mooncake: register_memory: wanted 0, found {answer}; its reason is above")
    return engine


def _forget_buffers(engine: Any, memory: GpuMemory) -> None:
    for pointer in memory.pointers:
        engine.unregister_memory(pointer)

"""Pages over NIXL, which is UCX in a wheel: the writer's network card, or its kernel, puts them in place.

One NIXL agent for each peer, on both sides. A writer that was frozen, or of which nobody knows
whether it still lives, cannot be told to stop; closing the agent that it writes through is the
fence: its connections end, its keys are void, and no other peer notices.

Which ways UCX may take follows from that. Nothing that writes into another process from outside
(cma, sysv, posix, cuda_ipc): closing this end would not end it. Only what passes through this
agent: TCP, or the queue pairs of an RDMA device.

NIXL's own messages are not used. Completion is told over the hand-off connection, which is
authenticated; UCX's ports are not. Whoever reaches one may write into this process, so
`devices` must lie in a network that only the cluster reaches. Listening is on those alone.

UCX moves nothing unless it is polled. The writer polls while it writes, the landing while a tag
is coming, both in a thread of the agent's own, which sleeps otherwise.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import secrets
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from transfer.layout import PoolLayout
from transfer.memory import Memory
from transfer.nixl_packages import NIXL_PACKAGES
from transfer.plan import Pages, check_lengths, check_range
from transfer.pool import Pool
from transfer.transport import SLICE_BYTES, Ahead, Lanes, RouteLost, Unreachable, Wire
from transfer.undecodable import UNDECODABLE

log = logging.getLogger(__name__)

POLL_S = 30e-6
"""Between two looks at a transfer that is under way. NIXL offers nothing to wait on."""
SLICE_S = 10e-3
"""Polled at a stretch; then the agent's thread looks what else there is to do."""
_ADDRESSES = 1 << 64
_MAX_INDEX = (1 << 31) - 1
"""NIXL counts descriptors in 32 bits."""

P = ParamSpec("P")
T = TypeVar("T")


class _Description(msgspec.Struct, frozen=True, array_like=True):
    """What a writer needs to know of a landing. Plain numbers: NIXL's own form of a list is a pickle."""

    agent: bytes
    """NIXL's metadata: the agent's name, where its UCX listens, the keys of its memory."""
    memory: Memory
    device: int
    """The GPU's number in the landing's process; 0 for DRAM."""
    pages: int
    page_bytes: tuple[int, ...]
    bases: tuple[int, ...]
    """Address of each buffer, in the landing's process."""


class NixlTransport:
    """devices  network devices that UCX uses and listens on: "lo", "eth0"; RDMA ones with their port, "mlx5_0:1"
    memory   where the pool lies
    write_s  a write that is not in place after so long ends its route

    UCX takes its devices from the environment, so all transports of one process have the same, and
    one that finds others there reaches nobody. Raises Unreachable where NIXL is not installed,
    ValueError for no devices.
    """

    name = "nixl"

    def __init__(self, pool: Pool, *, devices: tuple[str, ...], memory: Memory = "DRAM", write_s: float = 30.0) -> None:
        self._environment = {
            "UCX_NET_DEVICES": ",".join(devices),
            "UCX_TLS": ucx_transports(devices, gpu=memory == "VRAM" or _has_nvidia_gpu()),
        }
        self._library = _load_library()
        self._pool = pool
        self._memory: Memory = memory
        self._write_s = write_s

    async def land(self, wire: Wire) -> NixlLanding:
        agent, metadata = await self._open()
        return NixlLanding(self._pool, self._memory, agent, metadata, wire.broken)

    async def connect(self, description: bytes, layout: PoolLayout, lanes: Lanes) -> NixlRoute:
        """As the contract says. The agent's metadata goes to NIXL as it came: its sender holds the cluster's key."""
        there = _checked(description, layout, self._pool.layout)
        agent, _metadata = await self._open()
        await _or_unreachable(agent, agent.reach, there)
        return NixlRoute(agent, self._pool.layout, layout, self._write_s)

    async def _open(self) -> tuple[_Agent, bytes]:
        for name, wanted in self._environment.items():
            # For good: UCX reads both whenever an agent is made, and agents are made in threads.
            found = os.environ.setdefault(name, wanted)
            if found != wanted:
                raise Unreachable(f"nixl: {name}: wanted {wanted}, found {found} in the environment")
        agent = _Agent(self._library, self._pool, self._memory)
        return agent, await _or_unreachable(agent, agent.open)


class NixlLanding:
    """Decode's end. UCX writes wherever the writer says: what is expected decides only when it is polled."""

    def __init__(
        self, pool: Pool, memory: Memory, agent: _Agent, metadata: bytes, broken: Callable[[str], None]
    ) -> None:
        self._description = _Description(
            metadata,
            memory,
            _device_of(pool, memory),
            pool.layout.pages,
            pool.layout.page_bytes,
            tuple(buffer.ctypes.data for buffer in pool.buffers),
        )
        self._agent = agent
        self._broken = broken
        self._expected: set[int] = set()
        self._coming: set[int] = set()
        """Read by the agent's thread too."""
        self._disconnected = False

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(self._description)

    def expect(self, tag: int, pages: Pages) -> None:
        if not self._disconnected:
            self._expected.add(tag)

    def coming(self, tag: int) -> None:
        if tag in self._expected and tag not in self._coming:
            self._coming.add(tag)
            self._agent.submit(self._progress, tag)

    def in_place(self, tag: int) -> bool:
        """Always, but on a connection that is over: a writer says that it wrote once UCX has flushed."""
        if self._disconnected:
            return False
        self._forget(tag)
        return True

    async def landed(self, tag: int) -> None:
        if self._disconnected:
            raise RouteLost("nixl: disconnected")
        self._forget(tag)

    async def fence(self, tag: int) -> None:
        """Returns at once: a writer that says that it stopped has no write of this tag under way."""
        self._forget(tag)

    async def disconnect(self) -> None:
        self._disconnected = True
        self._expected.clear()
        self._coming.clear()
        await _ended(self._agent)

    def _forget(self, tag: int) -> None:
        self._expected.discard(tag)
        self._coming.discard(tag)

    def _progress(self, tag: int) -> None:
        """On the agent's thread, again and again while this tag is coming."""
        until_s = time.monotonic() + SLICE_S
        try:
            while tag in self._coming and time.monotonic() < until_s:
                self._agent.poll()
                time.sleep(POLL_S)
        except RouteLost as error:
            self._broken(str(error))
            return
        if tag in self._coming:
            self._agent.submit(self._progress, tag)


class NixlRoute:
    """Prefill's end."""

    landing_is_polled = True
    slice_bytes = SLICE_BYTES
    ahead: Ahead | None = None

    def __init__(self, agent: _Agent, mine: PoolLayout, theirs: PoolLayout, write_s: float) -> None:
        self._agent = agent
        self._mine = mine
        self._theirs = theirs
        self._write_s = write_s
        self._lost: str | None = None

    async def write(self, tag: int, first: int, source: Pages, destination: Pages) -> None:
        check_lengths(source, destination)
        here, there = _descriptors(source, self._mine), _descriptors(destination, self._theirs)
        self._check()
        if len(source) == 0:
            return
        until_s = time.monotonic() + self._write_s
        try:
            in_place = await self._agent.do(self._agent.begin, here, there)
            while not in_place:
                self._check()
                if time.monotonic() > until_s:
                    raise RouteLost(f"nixl: not written within {self._write_s:g} s")
                in_place = await self._agent.do(self._agent.advance)
        except BaseException as error:
            # Also a cancelled write: what it began may still be on its way, until the agent is gone.
            self._lose(str(error) or "nixl: a write was cancelled")
            raise

    async def settled(self) -> None:
        pass

    async def disconnect(self) -> None:
        self._lose("nixl: disconnected")
        await _ended(self._agent)

    def _check(self) -> None:
        if self._lost is not None:
            raise RouteLost(self._lost)

    def _lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
            self._agent.end()


class _Agent:
    """One NIXL agent and its thread. NIXL is called on that thread alone, and nowhere while the loop waits.

    A thread each, so that a peer which is slow to come or go delays no other's pages.

    Only text leaves an error of NIXL's. Its traceback would hold the agent, and an agent that
    something holds is not closed.
    """

    def __init__(self, library: _Library, pool: Pool, memory: Memory) -> None:
        self._library = library
        self._pool = pool
        self._memory = memory
        self._thread = ThreadPoolExecutor(1, "nixl")
        self._end: Future[None] | None = None
        self._agent: Any = None
        self._prepared: list[Any] = []
        self._transfer: Any = None

    # For the loop.

    async def do(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Runs `work` on the agent's thread. Raises what it raises."""
        return await asyncio.wrap_future(self._thread.submit(work, *arguments, **named))

    def submit(self, work: Callable[P, None], *arguments: P.args, **named: P.kwargs) -> None:
        """Runs `work` on the agent's thread soon."""
        self._thread.submit(work, *arguments, **named)

    def end(self) -> Future[None]:
        """Closes the agent, after what its thread does right now. The same future for every call."""
        if self._end is None:
            self._end = self._thread.submit(self._close)
        return self._end

    # On the thread. All raise RouteLost.

    def open(self) -> bytes:
        """Makes the agent, which may read and write the whole pool. Returns the metadata by which a peer reaches it."""
        try:
            self._agent = self._library.agent(
                secrets.token_hex(8), self._library.config(enable_prog_thread=False, backends=[])
            )
        except self._library.errors as error:
            reason = _text(error)
        else:
            try:
                self._call("create_backend", "UCX", {"ucx_error_handling_mode": "peer"})
            except RouteLost as error:
                raise RouteLost(f"{error} (UCX on {os.environ['UCX_NET_DEVICES']})") from error
            device = _device_of(self._pool, self._memory)
            regions = [(buffer.ctypes.data, buffer.nbytes, device) for buffer in self._pool.buffers]
            self._call("register_memory", np.array(regions, np.uint64), self._memory)
            return bytes(self._call("get_agent_metadata"))
        raise RouteLost(reason)

    def reach(self, there: _Description) -> None:
        """Prepares the lists that `begin` picks from: every page of both sides, in one row for each buffer."""
        peer = self._call("add_remote_agent", there.agent)
        bases = [buffer.ctypes.data for buffer in self._pool.buffers]
        layout = self._pool.layout
        for name, memory, device, starts, pages in (
            ("", self._memory, _device_of(self._pool, self._memory), bases, layout.pages),
            (peer, there.memory, there.device, there.bases, there.pages),
        ):
            rows = [(start, size, device, size, pages) for start, size in zip(starts, layout.page_bytes, strict=True)]
            self._prepared.append(self._call("prep_xfer_dlist", name, np.array(rows, np.uint64), memory))

    def begin(self, here: npt.NDArray[np.int32], there: npt.NDArray[np.int32]) -> bool:
        """Starts a write of these descriptors of the prepared lists. True: it is in place already."""
        self._transfer = self._call("make_prepped_xfer", "WRITE", self._prepared[0], here, self._prepared[1], there)
        return self._over(self._call("transfer", self._transfer))

    def advance(self) -> bool:
        """Polls for a slice of time. True: the write is in place."""
        until_s = time.monotonic() + SLICE_S
        while time.monotonic() < until_s:
            if self._over(self._call("check_xfer_state", self._transfer)):
                return True
            time.sleep(POLL_S)
        return False

    def poll(self) -> None:
        """Lets UCX work. Messages that somebody sent are dropped: nobody here sends any."""
        self._call("get_new_notifs")

    def _over(self, state: str) -> bool:
        if state == "ERR":
            raise RouteLost("nixl: the transfer failed")
        if state == "DONE":
            self._release(self._transfer)
            self._transfer = None
        return state == "DONE"

    def _close(self) -> None:
        held, self._prepared = [self._transfer, *self._prepared], []
        self._transfer = None
        while held:
            self._release(held.pop())
        self._thread.shutdown(wait=False)
        if self._agent is not None:
            core = weakref.ref(self._agent.agent)
            self._agent = None
            assert core() is None, "something still holds the NIXL agent, which is a fence only once it is gone"

    def _release(self, handle: Any) -> None:
        if handle is None:
            return
        try:
            handle.release()
        except self._library.errors as error:
            log.warning("nixl: handle not released: %s", _text(error))

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return getattr(self._agent, method)(*arguments)
        except self._library.errors as error:
            reason = _text(error)
        del arguments
        raise RouteLost(reason)


async def _or_unreachable(agent: _Agent, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Does it on the agent's thread. An agent that comes to nothing is closed by then."""
    try:
        return await agent.do(work, *arguments, **named)
    except RouteLost as error:
        await _ended(agent)
        raise Unreachable(str(error)) from error
    except asyncio.CancelledError:
        agent.end()
        raise


async def _ended(agent: _Agent) -> None:
    # Shielded: whoever is cancelled while waiting must not cancel the closing.
    await asyncio.shield(asyncio.wrap_future(agent.end()))


def ucx_transports(devices: Sequence[str], *, gpu: bool) -> str:
    """UCX_TLS for these devices: TCP for a network interface, RDMA for a device that is named with its port.

    gpu  NIXL refuses a host with an NVIDIA GPU unless UCX can tell its memory apart, which takes cuda_copy

    Raises ValueError for no device, and for a name that would be two in UCX's list.
    """
    if not devices or any(not device or "," in device for device in devices):
        raise ValueError(f"devices: wanted one name or more, without commas, found {tuple(devices)!r}")
    names = []
    if any(":" in device for device in devices):
        names += ["rc", "ud", "dc"]
    if any(":" not in device for device in devices):
        names.append("tcp")
    return ",".join([*names, "cuda_copy"] if gpu else names)


def _has_nvidia_gpu() -> bool:
    """As NIXL looks for them: on the PCI bus."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith(("0x0300", "0x0302")):
            return True
    return False


def _device_of(pool: Pool, memory: Memory) -> int:
    """Number of the GPU on which the pool lies; 0 for DRAM. Raises RouteLost where it lies on none."""
    if memory == "DRAM":
        return 0
    # CUDA's bindings, and a driver: only where there is a GPU.
    from transfer.cuda import CudaFailed, Device

    try:
        return Device.of(pool.buffers[0].ctypes.data).number
    except CudaFailed as error:
        raise RouteLost(f"nixl: {error}") from error


def _descriptors(pages: Pages, layout: PoolLayout) -> npt.NDArray[np.int32]:
    """Their indices in a prepared list, buffer by buffer, as NIXL joins neighbours of one buffer. Raises ValueError."""
    check_range(pages, layout.pages)
    buffers = len(layout.page_bytes)
    if buffers * layout.pages > _MAX_INDEX:
        raise ValueError(f"pages: wanted at most {_MAX_INDEX} over all buffers, found {buffers * layout.pages}")
    starts = np.arange(buffers, dtype=np.int32) * np.int32(layout.pages)
    return np.ascontiguousarray((starts[:, None] + pages.astype(np.int32)[None, :]).ravel())


def _checked(description: bytes, layout: PoolLayout, mine: PoolLayout) -> _Description:
    """The description, once it fits the peer's layout, and that fits this side's. Raises Unreachable."""
    try:
        there = msgspec.msgpack.decode(description, type=_Description)
    except UNDECODABLE as error:
        raise Unreachable(f"nixl: {error}") from error
    for field, wanted, found in (
        ("page_bytes", mine.page_bytes, layout.page_bytes),
        ("page_bytes", layout.page_bytes, there.page_bytes),
        ("pages", layout.pages, there.pages),
        ("bases", len(layout.page_bytes), len(there.bases)),
        ("device", max(there.device, 0), there.device),
    ):
        if wanted != found:
            raise Unreachable(f"nixl: {field}: wanted {wanted}, found {found}")
    for base, page_bytes in zip(there.bases, there.page_bytes, strict=True):
        if not 0 < base <= _ADDRESSES - there.pages * page_bytes:
            raise Unreachable(f"nixl: bases: wanted addresses of {there.pages} pages each, found {base:#x}")
    return there


@dataclass(frozen=True)
class _Library:
    """What is used of NIXL. It ships no types."""

    agent: Any
    config: Any
    errors: tuple[type[Exception], ...]


def _load_library() -> _Library:
    """Only here, as UCX is 230 MB of libraries. Raises Unreachable."""
    raise_exceptions = logging.raiseExceptions
    try:
        for name in NIXL_PACKAGES:
            try:
                module, bindings = importlib.import_module(name), importlib.import_module(f"{name}._bindings")
            except ModuleNotFoundError:
                continue
            except ImportError as error:
                raise Unreachable(f"nixl: {error}") from error
            kinds = [kind for kind in vars(bindings).values() if isinstance(kind, type) and issubclass(kind, Exception)]
            if "NIXL_LOG_LEVEL" not in os.environ:
                # It reports every agent on stdout.
                logging.getLogger("nixl").setLevel(logging.WARNING)
            return _Library(module.nixl_agent, module.nixl_agent_config, (*kinds, RuntimeError))
    finally:
        # Importing NIXL turns off the reports of everybody's broken log calls.
        logging.raiseExceptions = raise_exceptions
    raise Unreachable("nixl: not installed; it comes with the extra mainstem[nixl]")


def _text(error: Exception) -> str:
    return f"nixl: {type(error).__name__}: {error}".splitlines()[0]

"""NIXL by hand, as its own examples use it: no session, no authentication, and both sides spin.

It is the measure of what `transfer.nixl` and `transfer.tcp` add to, or save of, NIXL's TCP.
"""

from __future__ import annotations

import importlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.ways.cell import Cell
from benchmarks.ways.ends import WAIT_S, HandOffFailed
from benchmarks.ways.memory import Bytes, over
from transfer.plan import Pages

PACKAGES = ("nixl_cu13", "nixl_cu12")
_ENVIRONMENT = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo", "NIXL_LOG_LEVEL": "WARN"}
_DONE = b"done"

Described = tuple[bytes, int]
"""The agent's metadata and the address of its pool's first byte."""


def package() -> str | None:
    """The name under which NIXL can be imported here; None where it is not installed."""
    return next((name for name in PACKAGES if find_spec(name) is not None), None)


class NixlRawPrefill:
    def __init__(self, cell: Cell, memory: Bytes, peer: Described) -> None:
        self._agent, self._description = _agent(cell, memory)
        self._pages = cell.layout.pages
        self._page_bytes = cell.page_bytes
        name = self._agent.add_remote_agent(peer[0])
        self._local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", self._rows(self._description[1]), "DRAM")
        self._remote = self._agent.prep_xfer_dlist(name, self._rows(peer[1]), "DRAM")

    def describe(self) -> Described:
        return self._description

    def send(self, room: int, source: Pages, destination: Pages) -> float:
        began_s = time.monotonic()
        transfer = self._agent.make_prepped_xfer("WRITE", self._local, source, self._remote, destination, _DONE)
        carry_out(self._agent, transfer)
        return began_s

    def close(self) -> None:
        self._local.release()
        self._remote.release()
        del self._agent

    def _rows(self, base: int) -> npt.NDArray[np.uint64]:
        """(address, bytes, device) of every page, shape (pages, 3)."""
        rows = np.zeros((self._pages, 3), np.uint64)
        rows[:, 0] = np.uint64(base) + np.arange(self._pages, dtype=np.uint64) * np.uint64(self._page_bytes)
        rows[:, 1] = self._page_bytes
        return rows


class NixlRawDecode:
    def __init__(self, cell: Cell, memory: Bytes) -> None:
        self.pool = over(memory, cell)
        self._agent, self._description = _agent(cell, memory)

    def describe(self) -> Described:
        return self._description

    def join(self, answer: Described) -> None:
        self._agent.add_remote_agent(answer[0])

    def expect(self, room: int, destination: Pages) -> None:
        pass

    def wait(self, room: int) -> float:
        return wait_for_message(self._agent)

    def close(self) -> None:
        del self._agent


def carry_out(agent: Any, transfer: Any) -> None:
    """Spins until it is done. Raises HandOffFailed."""
    deadline_s = time.monotonic() + WAIT_S
    state = agent.transfer(transfer)
    while state == "PROC":
        if time.monotonic() > deadline_s:
            raise HandOffFailed(f"nixl-raw: not over after {WAIT_S:g} s")
        state = agent.check_xfer_state(transfer)
    if state != "DONE":
        raise HandOffFailed(f"nixl-raw: wanted DONE, found {state}")
    transfer.release()


def wait_for_message(agent: Any) -> float:
    """Spins until the peer's word is here. Returns when that was, in monotonic seconds. Raises HandOffFailed."""
    deadline_s = time.monotonic() + WAIT_S
    while not agent.get_new_notifs():
        if time.monotonic() > deadline_s:
            raise HandOffFailed(f"nixl-raw: not over after {WAIT_S:g} s")
    return time.monotonic()


def _agent(cell: Cell, memory: Bytes) -> tuple[Any, Described]:
    """One agent without a thread of its own, with the cell's pool registered."""
    name = package()
    assert name is not None, "only measured where it is installed"
    with environment(_ENVIRONMENT):
        api = importlib.import_module(f"{name}._api")
        config = api.nixl_agent_config(enable_prog_thread=False, backends=[])
        agent = api.nixl_agent(secrets.token_hex(8), config)
        agent.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
    (buffer,) = over(memory, cell).buffers
    base = buffer.ctypes.data
    agent.register_memory([(base, buffer.nbytes, 0, "")], "DRAM")
    return agent, (agent.get_agent_metadata(), base)


@contextmanager
def environment(wanted: dict[str, str]) -> Iterator[None]:
    """UCX reads its settings where an agent is made; nobody else's are changed."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

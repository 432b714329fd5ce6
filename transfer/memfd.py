"""Memory that another process of this host can open, and that its owner cannot pull away under its feet.

A memfd has no name, no size limit but memory, and is gone with the last process that maps it, also
after kill -9. Its size is sealed: a peer that made it smaller later would kill whoever writes to
the mapping. Paths come from peers, so nothing but a sealed memfd is opened for them.
"""

from __future__ import annotations

import fcntl
import os
import re

_PATH = re.compile(r"/proc/\d+/fd/\d+")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class NoMemory(Exception):
    """The path leads to no memory of a process of this host."""


def create(name: str, size_bytes: int) -> int:
    """A descriptor of zeroed memory; `name` is what /proc shows."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def path_of(descriptor: int) -> str:
    """Where a process of the same user and host finds this descriptor."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def open_at(path: str, size_bytes: int) -> int:
    """A descriptor of another process's memory, for reading and writing. Raises NoMemory."""
    if not _PATH.fullmatch(path):
        raise NoMemory(f"{path:.80}: wanted /proc/PROCESS/fd/NUMBER")
    try:
        # A pipe or a terminal must not make this wait.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise NoMemory(f"{path}: {error.strerror}") from error
    try:
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        found_bytes = os.fstat(descriptor).st_size
    except OSError:
        sealed, found_bytes = False, 0
    if not sealed or found_bytes != size_bytes:
        os.close(descriptor)
        found = f"{found_bytes} bytes" if sealed else "something else"
        raise NoMemory(f"{path}: wanted {size_bytes} bytes of sealed memory, found {found}")
    return descriptor

"""Free ports, chosen where nobody else is given one by chance.

The kernel hands out ports for outgoing connections from its ephemeral range. A
worker binds half a minute after its ports were chosen, so a port of that range
could be somebody's outgoing connection by then. Hence these come from below it.
"""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

LOWEST_PORT = 15_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. Raises OSError where `host` is no address of this machine."""
    return _obstacle(host, port) is None


def why_not_free(host: str, port: int) -> str:
    """What keeps a server from listening there, as "in use by NAME (pid N)"; empty where nothing does.

    Raises OSError where `host` is no address of this machine.
    """
    match _obstacle(host, port):
        case None:
            return ""
        case errno.EACCES:
            return "not allowed for this user"
        case _:
            return f"in use{listener_of(port)}"


def _obstacle(host: str, port: int) -> int | None:
    """The error number that a server would get."""
    family, address = _resolve(host, port)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do, so that a port whose last connections are in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return error.errno
            raise
    return None


class PortPicker:
    """Hands out ports that are free now, none twice.

    seed      keeps two launchers from trying the same ones first
    reserved  ports that are free now but promised to somebody
    """

    def __init__(self, seed: int, reserved: Collection[int]) -> None:
        highest = _ephemeral_start()
        candidates = list(range(LOWEST_PORT, highest)) if highest > LOWEST_PORT + 1000 else list(range(15_000, 60_000))
        random.Random(seed).shuffle(candidates)
        self._candidates: Iterator[int] = iter([port for port in candidates if port not in reserved])

    def pick(self, host: str) -> int:
        """Raises OSError where none is left."""
        for port in self._candidates:
            if is_free(host, port):
                return port
        raise OSError(f"no free port on {host}")


def listener_of(port: int) -> str:
    """Who listens there, as " by NAME (pid N)"; empty where this user may not see it."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""


def _ephemeral_start() -> int:
    try:
        return int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError):
        return 32_768


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, (str(address[0]), int(address[1]))

"""The router process: bind, serve, stop.

A mistake in what it was told is one line on stderr and exit code 2. SIGTERM and SIGINT
end it within STOP_S, with exit code 0: streams of the dashboard end at once, requests get the rest of it.
"""

from __future__ import annotations

import errno
import gc
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from router.app import Router, create_app
from router.config import RouterSpec

STOP_S = 4
"""Time that requests in flight get to end when the router is told to stop."""
BACKLOG = 2048


class Server(uvicorn.Server):
    """Serves one router."""

    def __init__(self, router: Router) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(router),
                loop="uvloop",
                http="httptools",
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=STOP_S,
            )
        )
        self._router = router

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._router.closing.set()
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, so that asyncio knows it for TCP and lets no answer wait for an acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError:
        bound.close()
        raise
    return bound


def run(spec: RouterSpec) -> None:
    """Serves until a signal comes. Exits with 2 where it cannot begin."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    section = spec.section
    for number in (signal.SIGTERM, signal.SIGINT):
        # Before the server takes them over, and after it has ended, when it raises them again.
        signal.signal(number, _leave)
    try:
        router = Router(spec)
    except (OSError, ValueError) as error:
        _refuse(str(error))
    try:
        bound = listen(section.host, section.port)
    except OSError as error:
        found = "one in use" if error.errno == errno.EADDRINUSE else error.strerror
        _refuse(f"router.port: wanted a free port on {section.host}, found {found}: {section.port}")
    server = Server(router)
    # What is there now stays: a garbage collector that looks at it stops all requests meanwhile.
    gc.collect()
    gc.freeze()
    with bound:
        server.run(sockets=[bound])


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _refuse(reason: str) -> None:
    print(f"mainstem router: {reason}", file=sys.stderr)
    raise SystemExit(2)

"""Connections that decode workers dialled beside their hand-off connections, until a route takes them."""

from __future__ import annotations

import socket
from collections.abc import Callable

MAX_PARKED = 1024
"""More are closed at once: a decode worker needs a handful, and takes them within the handshake."""


class ParkedLanes:
    """Lanes by the token under which they were announced. For one thread."""

    def __init__(self, keep_s: float, clock: Callable[[], float]) -> None:
        """keep_s: a lane that no route has taken after so long is closed"""
        self._keep_s = keep_s
        self._clock = clock
        self._parked: list[tuple[bytes, socket.socket, float]] = []

    def park(self, token: bytes, lane: socket.socket) -> None:
        if len(self._parked) >= MAX_PARKED:
            lane.close()
            return
        self._parked.append((token, lane, self._clock()))

    def take(self, token: bytes) -> list[socket.socket]:
        """Those announced with this token, in the order in which they came; empty where there are none."""
        taken = [lane for announced, lane, _ in self._parked if announced == token]
        self._parked = [one for one in self._parked if one[0] != token]
        return taken

    def sweep(self) -> None:
        """Closes those that nobody has come for."""
        now_s = self._clock()
        for _, lane, since_s in self._parked:
            if now_s - since_s > self._keep_s:
                lane.close()
        self._parked = [one for one in self._parked if now_s - one[2] <= self._keep_s]

    def close(self) -> None:
        for _, lane, _ in self._parked:
            lane.close()
        self._parked = []

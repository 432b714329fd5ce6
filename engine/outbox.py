"""What the agent is to know leaves the scheduler process here: appended on any thread, sent from one of its own.

    scheduler's thread         put(page event)  ──┐
                                                  ├──> lists  ──>  sender thread  ──>  ipc://…  agent
    hand-off receiver's thread  ended(hand-off) ──┤
    scheduler's thread         moved()            ──┘

A burst becomes one message, and a page event is on its way within a few milliseconds,
whenever SGLang itself would have published it (it waits for the next batch, on
decode for the fortieth).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from transfer.ended import Ended
from transfer.wire import PageEvent, Pools

COALESCE_S = 0.002
"""How long the first event of a burst waits for others."""
MOVED_S = 0.25
"""How often at most the scheduler says that it moves."""
LINGER_MS = 1000
"""How long a closed outbox waits for an agent to take the last events."""


class Burst(msgspec.Struct, frozen=True, array_like=True):
    """What happened within a moment."""

    events: list[PageEvent]
    """In the order in which they happened."""
    ended: list[Ended]
    moved: Pools | None = None
    """Where the scheduler's own thread has got on: what it had to give just then."""


encode_burst = msgspec.msgpack.Encoder().encode
decode_burst = msgspec.msgpack.Decoder(Burst).decode


class Outbox:
    """Sends to the agent's socket; the socket's queue has no limit, so nothing is dropped and nothing blocks."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._events: list[PageEvent] = []
        self._ended: list[Ended] = []
        self._moved: Pools | None = None
        self._moved_s = -math.inf
        self._lock = threading.Lock()
        self._filled = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, event: PageEvent) -> None:
        with self._lock:
            self._events.append(event)
        self._filled.set()

    def ended(self, handoff: Ended) -> None:
        with self._lock:
            self._ended.append(handoff)
        self._filled.set()

    def moved(self, look: Callable[[], Pools]) -> None:
        """The scheduler begins another step. Cheap: it is called in each.

        look  what it has to give; called at most every MOVED_S
        """
        now_s = time.monotonic()
        if now_s - self._moved_s >= MOVED_S:
            self._moved, self._moved_s = look(), now_s
            self._filled.set()

    def close(self) -> None:
        """Sends what is left, as far as the agent takes it, and ends the thread."""
        self._closed = True
        self._filled.set()
        self._thread.join()

    def _run(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        socket.set_hwm(0)
        socket.linger = LINGER_MS
        with socket:
            socket.connect(self._address)
            while True:
                self._filled.wait()
                time.sleep(COALESCE_S)
                self._filled.clear()
                with self._lock:
                    burst = Burst(self._events, self._ended, self._moved)
                    self._events, self._ended, self._moved = [], [], None
                if burst.events or burst.ended or burst.moved is not None:
                    socket.send(encode_burst(burst))
                if self._closed:
                    return

"""Page events leave the scheduler process here: appended on its thread, sent from another.

    scheduler's thread   put(event)  ──>  list  ──>  sender thread  ──>  ipc://…  agent

A burst becomes one message, and an event is on its way within a few milliseconds,
whenever SGLang itself would have published it (it waits for the next batch, on
decode for the fortieth).
"""

from __future__ import annotations

import threading
import time

import msgspec
import zmq

from transfer.wire import PageEvent

COALESCE_S = 0.002
"""How long the first event of a burst waits for others."""
LINGER_MS = 1000
"""How long a closed outbox waits for an agent to take the last events."""

encode_events = msgspec.msgpack.Encoder().encode
decode_events = msgspec.msgpack.Decoder(list[PageEvent]).decode


class Outbox:
    """Sends to the agent's socket; the socket's queue has no limit, so nothing is dropped and nothing blocks."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._events: list[PageEvent] = []
        self._lock = threading.Lock()
        self._filled = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="page-events", daemon=True)
        self._thread.start()

    def put(self, event: PageEvent) -> None:
        with self._lock:
            self._events.append(event)
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
                    events, self._events = self._events, []
                if events:
                    socket.send(encode_events(events))
                if self._closed:
                    return

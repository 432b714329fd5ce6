"""Ask a running router, over HTTP and with a deadline, what it knows.

A worker counts as ready when the *routers* say so: then a client can use it.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from router.api_keys import ApiKeys

DEADLINE_S = 2.0
EAGER_S = 0.2
"""Between two looks while somebody waits for a process."""
CALM_S = 1.0
"""Between two looks while all is well: a look costs the router a little."""


@dataclass(frozen=True)
class SeenWorker:
    """One worker as the router lists it."""

    state: str
    epoch: int
    """Nanoseconds since 1970 when this life of the worker began."""
    mode: str


@dataclass(frozen=True)
class Seen:
    """One look at the router."""

    at_s: float
    """When it was begun, on the monotonic clock."""
    healthy: bool
    workers: dict[str, SeenWorker]
    detail: dict[str, Any]
    """All of /api/state; empty where there was no answer."""
    problem: str = ""
    router: str = ""
    """The name of the router that was looked at, where a watcher looked."""


def look(url: str, api_key_file: Path | None = None) -> Seen:
    """Never raises for what the router does or fails to do."""
    at_s = time.monotonic()
    try:
        headers = {"authorization": f"Bearer {ApiKeys.read(api_key_file).first}"} if api_key_file else {}
        status, _ = _get(url, "/health", headers)
        if status != 200:
            return Seen(at_s, False, {}, {}, f"/health answered {status}")
        status, body = _get(url, "/api/state", headers)
        detail = json.loads(body) if status == 200 else {}
        workers = {one["name"]: _seen(one) for one in detail.get("workers", [])}
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        return Seen(at_s, False, {}, {}, str(error) or type(error).__name__)
    return Seen(at_s, True, workers, detail, "" if status == 200 else f"/api/state answered {status}")


class Watcher:
    """Looks again and again from a thread of its own, so that a slow answer delays nobody."""

    def __init__(self, router: str, url: str, api_key_file: Path | None, tell: Callable[[Seen], None]) -> None:
        self.every_s = EAGER_S
        """Time between two looks; may be set at any time."""
        self._router = router
        self._url = url
        self._api_key_file = api_key_file
        self._tell = tell
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"watch-{router}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(4 * DEADLINE_S)

    def _watch(self) -> None:
        while not self._over.wait(self.every_s):
            self._tell(replace(look(self._url, self._api_key_file), router=self._router))


def _seen(worker: dict[str, Any]) -> SeenWorker:
    return SeenWorker(str(worker["state"]), int(worker.get("epoch", 0)), str(worker.get("mode", "")))


def _get(url: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=DEADLINE_S)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()

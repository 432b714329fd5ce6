"""Taking a worker out of service without a client noticing, and restarting all of them like that, one after the other.

drain   no new requests ── short ones end ── the others go on elsewhere ── nothing is left
restart drain, stop, start, wait until every router uses it
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from engine.launch.control import ask_restart
from engine.launch.errors import BadInput, LaunchFailed
from engine.launch.probe import DEADLINE_S, look
from transfer.auth import SIGNATURE_HEADER, ClusterKey
from transfer.wire import Drain

LOOK_S = 0.2
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Routers:
    """The routers of a running cluster, as a command of another process reaches them.

    urls  by name
    """

    urls: Mapping[str, str]
    key: ClusterKey
    api_key_file: Path | None = None

    def ask(self, wish: Drain) -> None:
        """Tells every router. Raises BadInput where none knows the worker, LaunchFailed where none answers."""
        body, unknown, told = msgspec.json.encode(wish), "", False
        for name, url in self.urls.items():
            try:
                status, said = self._post(url, body)
            except (OSError, http.client.HTTPException):
                continue
            if status == 404:
                unknown = str(msgspec.json.decode(said)["error"]["message"])
            elif status != 200:
                raise LaunchFailed(f"{name}: HTTP {status} {said[:200]!r}")
            else:
                told = True
        if unknown and not told:
            raise BadInput(unknown)
        if not told:
            raise LaunchFailed("no router answers")

    def drains(self, worker: str) -> bool:
        """Whether every router says that it gets nothing new."""
        said = self._said(worker)
        return said is not None and all(one["state"] != "ready" for one in said)

    def is_back(self, worker: str, before: set[int]) -> bool:
        """Whether every router uses another life of it."""
        said = self._said(worker)
        return bool(said) and all(one["state"] == "ready" and one["epoch"] not in before for one in said or ())

    def epochs(self, worker: str) -> set[int]:
        return {int(one["epoch"]) for one in self._said(worker) or ()}

    def left(self, worker: str) -> int | None:
        """Requests that it has, over all routers; None where one of them does not answer."""
        said = self._said(worker)
        return None if said is None else sum(int(one["inflight_requests"]) for one in said)

    def workers(self) -> list[str]:
        """All of them, decode first: its streams can go on elsewhere while every cache is warm."""
        found: dict[str, str] = {}
        for url in self.urls.values():
            for one in look(url, self.api_key_file).detail.get("workers", []):
                found[str(one["name"])] = str(one["role"])
        return sorted(found, key=lambda name: (found[name] != "decode", name))

    def _said(self, worker: str) -> list[dict[str, Any]] | None:
        """What each router says of it; None where one of them does not answer: then nothing is known."""
        seen = [look(url, self.api_key_file) for url in self.urls.values()]
        if not all(one.healthy and one.detail for one in seen):
            return None
        return [said for one in seen for said in one.detail["workers"] if said["name"] == worker]

    def _post(self, url: str, body: bytes) -> tuple[int, bytes]:
        place = urlsplit(url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=DEADLINE_S)
        headers = {SIGNATURE_HEADER: self.key.sign(body, time.time()), "content-type": "application/json"}
        try:
            connection.request("POST", "/internal/drain", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def drain(routers: Routers, worker: str, *, within_s: float, timeout_s: float, tell: Tell) -> None:
    """Returns when the worker has nothing left to do.

    within_s   requests that have not ended by then go on elsewhere
    timeout_s  after that: for those that cannot

    Raises LaunchFailed where something is left then; it drains on.
    """
    routers.ask(Drain(worker=worker))
    _wait(lambda: routers.drains(worker), DEADLINE_S * 4, f"{worker} does not drain")
    tell(f"{worker}: drains, {routers.left(worker)} requests left")
    if not _holds(lambda: routers.left(worker) == 0, within_s):
        tell(f"{worker}: {routers.left(worker)} requests go on elsewhere, where they can")
        routers.ask(Drain(worker=worker, move=True))
        _wait(
            lambda: routers.left(worker) == 0,
            timeout_s,
            f"{worker} still has requests that cannot go on elsewhere; it takes no new ones",
        )
    tell(f"{worker}: idle")


def restart(
    routers: Routers, folder: Path, worker: str, *, within_s: float, timeout_s: float, ready_s: float, tell: Tell
) -> None:
    """Drains it, starts it anew, waits until every router uses it. Raises LaunchFailed, BadInput."""
    began_s, before = time.monotonic(), routers.epochs(worker)
    drain(routers, worker, within_s=within_s, timeout_s=timeout_s, tell=tell)
    ask_restart(folder, worker)

    _wait(lambda: routers.is_back(worker, before), ready_s, f"{worker} is not ready again after {ready_s:.0f} s")
    tell(f"{worker}: back after {time.monotonic() - began_s:.1f} s")


def _wait(holds: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    if not _holds(holds, timeout_s):
        raise LaunchFailed(otherwise)


def _holds(holds: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(LOOK_S)
    return True

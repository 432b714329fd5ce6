"""Processes that stand in for the router and for SGLang's workers, to try the launcher without either.

They are real processes with real sockets: the router takes registrations and lists
the workers as the real one does, a worker listens on its port and registers until
it ends. What a worker should do wrong is said in its environment:

    STAND_IN_EXIT=CODE        end with this code as soon as it starts
    STAND_IN_MUTE=1           never register, so never become ready
    STAND_IN_DEAF=1           ignore SIGTERM
    STAND_IN_CHILD=1          start a child that ignores SIGTERM, as a scheduler would outlive its server
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from engine.spec import WorkerSpec

if TYPE_CHECKING:
    from router.config import RouterSpec

RENEW_S = 0.2


def import_engine() -> None:
    """Stands for half a minute of imports."""


def run_router(spec: RouterSpec) -> None:
    """Serves GET /health and /api/state, POST /internal/register and /internal/drain until SIGTERM."""
    workers: dict[str, dict[str, Any]] = {}
    draining: dict[str, int] = {}
    """Epochs of the workers that shall drain: the real ones say so themselves."""

    class Handler(_Quiet):
        def do_GET(self) -> None:
            known = {"/health": {}, "/api/state": {"workers": list(workers.values())}}
            self.answer(200 if self.path in known else 404, known.get(self.path, {}))

        def do_POST(self) -> None:
            said = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/internal/drain":
                known = workers.get(said["worker"])
                if known is not None:
                    draining[said["worker"]] = known["epoch"] if said["drain"] else 0
                    known["state"] = "draining" if said["drain"] else "ready"
                message = "worker: wanted one of this cluster's"
                self.answer(404 if known is None else 200, {} if known else {"error": {"message": message}})
                return
            drains = draining.get(said["name"]) == said["epoch"]
            workers[said["name"]] = {**said, **({"state": "draining"} if drains else {})}
            self.answer(200, {})

    _serve_until_terminated(ThreadingHTTPServer((spec.section.host, spec.section.port), Handler))


def run_worker(spec: WorkerSpec) -> None:
    """Listens on its port and registers until SIGTERM, or does wrong as its environment says."""
    if code := os.environ.get("STAND_IN_EXIT"):
        print(f"RuntimeError: told to end with code {code}", file=sys.stderr)
        sys.exit(int(code))
    if os.environ.get("STAND_IN_CHILD"):
        # Python waits for it when it ends by itself, as for SGLang's processes.
        child = multiprocessing.get_context("fork").Process(target=_outlive)
        child.start()
        Path(spec.run_dir, "child.pid").write_text(str(child.pid))
    if not os.environ.get("STAND_IN_MUTE"):
        threading.Thread(target=_register_for_ever, args=(spec, time.time_ns()), daemon=True).start()
    server = ThreadingHTTPServer((spec.host, spec.port), _Quiet)
    if os.environ.get("STAND_IN_DEAF"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        server.serve_forever()
    _serve_until_terminated(server)


class _Quiet(BaseHTTPRequestHandler):
    def answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: looks of the launcher are no news."""


def _outlive() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def _serve_until_terminated(server: ThreadingHTTPServer) -> None:
    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    with server:
        server.serve_forever(poll_interval=0.05)


def _register_for_ever(spec: WorkerSpec, epoch: int) -> None:
    body = json.dumps(
        {
            "name": spec.name,
            "role": spec.role,
            "state": "ready",
            "mode": "exact",
            "epoch": epoch,
            "inflight_requests": 0,
        }
    )
    while True:
        for router in spec.routers:
            _post(router, body)
        time.sleep(RENEW_S)


def _post(router: str, body: str) -> None:
    place = urlsplit(router)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=2)
    try:
        connection.request("POST", "/internal/register", body)
        connection.getresponse().read()
    except OSError:
        pass  # It may not listen yet, or be on its way back; the next turn tries again.
    finally:
        connection.close()

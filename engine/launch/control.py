"""How another `mainstem` command asks a running launcher for something: a line to a socket in the cluster's folder.

    restart decode-0      ──>  ok decode-0
    restart nobody        ──>  error worker: wanted one of decode-0, prefill-0, found 'nobody'

Who may open the folder may ask; there is no other key.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.launch.errors import BadInput, LaunchFailed

ANSWER_S = 5.0
_LINE_BYTES = 512
_NAME = "control"


class Control:
    """Answers until closed.

    restart  asked with a process's name; raises BadInput
    """

    def __init__(self, folder: Path, restart: Callable[[str], None]) -> None:
        self._path = folder / _NAME
        self._restart = restart
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        with _short(self._path) as path:
            self._socket.bind(path)
        self._path.chmod(0o600)
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        # Only this wakes a thread that waits in accept.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(ANSWER_S)
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(ANSWER_S)
                connection.sendall(self._answer(_line(connection)).encode() + b"\n")

    def _answer(self, line: str) -> str:
        verb, _, name = line.partition(" ")
        if verb != "restart":
            return f"error command: wanted restart, found {verb!r}"
        try:
            self._restart(name)
        except BadInput as error:
            return f"error {error}"
        return f"ok {name}"


def ask_restart(folder: Path, name: str) -> None:
    """Asks the launcher of this folder to start a process anew. Raises LaunchFailed, BadInput."""
    try:
        with socket.socket(socket.AF_UNIX) as connection, _short(folder / _NAME) as path:
            connection.settimeout(ANSWER_S)
            connection.connect(path)
            connection.sendall(f"restart {name}\n".encode())
            answer = _line(connection)
    except OSError as error:
        raise LaunchFailed(f"{folder.name}: its launcher does not answer: {error}") from None
    kind, _, text = answer.partition(" ")
    if kind != "ok":
        raise BadInput(text)


def _line(connection: socket.socket) -> str:
    raw = b""
    while not raw.endswith(b"\n") and len(raw) < _LINE_BYTES:
        piece = connection.recv(_LINE_BYTES)
        if not piece:
            break
        raw += piece
    return raw.decode(errors="replace").strip()


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of this path that fits the hundred bytes which a socket's address may have."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)

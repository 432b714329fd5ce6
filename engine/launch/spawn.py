"""Start each process from the beginning: `python -m engine.launch …` in a session of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import engine
from engine.launch.births import Began, Birth, Ended, Reporter
from engine.launch.lifeline import kill_group

_CLOSE_S = 5.0


def launch_command(*words: str) -> list[str]:
    """The command line of one of our processes; it ends when the process that calls this ends."""
    # -P: a folder named router where the user stands must not be taken for ours.
    return [sys.executable, "-P", "-m", "engine.launch", *words, "--parent", str(os.getpid())]


def child_environment(added: Mapping[str, str]) -> dict[str, str]:
    """The launcher's environment and `added`, with this very source tree importable."""
    root = str(Path(engine.__file__).parent.parent)
    environment = {**os.environ, **added}
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    return environment


class SpawnStarter:
    """`command` gives the command line of a birth."""

    def __init__(self, command: Callable[[Birth], list[str]], report: Reporter) -> None:
        self._command = command
        self._report = report
        self._alive: dict[tuple[str, int], subprocess.Popen[bytes]] = {}

    def start(self, birth: Birth) -> None:
        key = (birth.name, birth.life)
        try:
            with open(birth.log_file, "ab") as log:
                process = subprocess.Popen(
                    self._command(birth),
                    env=child_environment(birth.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self._report(Ended(*key, 1, f"could not be started: {error}"))
            return
        self._alive[key] = process
        self._report(Began(*key, process.pid))
        threading.Thread(target=self._reap, args=(key, process), name=f"reap-{birth.name}", daemon=True).start()

    def interrupt(self) -> None:
        """Nothing delays a birth here."""

    def close(self) -> None:
        for process in list(self._alive.values()):
            kill_group(process.pid, _CLOSE_S)

    def _reap(self, key: tuple[str, int], process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        self._alive.pop(key, None)
        self._report(Ended(*key, code))

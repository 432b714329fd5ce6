"""The contract between the supervisor and whatever brings processes to life.

    supervisor ── Birth ──> Starter        asks, does not wait
    supervisor <── Began, then Ended ──    reported from another thread, exactly one Ended for each Birth

`life` counts the births of a name, so that a late report of a former life is known as such.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec


class Birth(msgspec.Struct, frozen=True, kw_only=True):
    """One process to start."""

    name: str
    life: int
    spec_file: str
    log_file: str
    """Its stdout and stderr are appended here."""
    environment: dict[str, str] = {}
    """Added to the launcher's own."""


class Imported(msgspec.Struct, frozen=True, tag="imported"):
    """What all workers share has been imported; from now on they start quickly."""

    seconds: float


class Began(msgspec.Struct, frozen=True, tag="began"):
    """It runs, as the leader of a session of its own."""

    name: str
    life: int
    pid: int


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """It is no more. `code` as subprocess has it: negative for a signal."""

    name: str
    life: int
    code: int
    note: str = ""
    """Why, where the starter knows better than the process's log."""


Report = Imported | Began | Ended
Reporter = Callable[[Report], None]
"""Called from any thread; must not block."""


class Starter(Protocol):
    def start(self, birth: Birth) -> None:
        """Must be called by a thread that outlives the process: the kernel ends the process together with it."""
        ...

    def interrupt(self) -> None:
        """Gives up whatever delays births that have not begun; they are reported as ended, or begin at once."""
        ...

    def close(self) -> None:
        """Ends what it needed for starting. Processes that still live are ended too, and not reported."""
        ...

"""By which one thread tells another that there is something to look at. The other waits for it as for a file."""

from __future__ import annotations

import os
from contextlib import suppress


class Bell:
    """Rung any number of times, it is heard once. It is as long as its process."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ring(self) -> None:
        """From any thread. Never waits."""
        os.eventfd_write(self._descriptor, 1)

    def fileno(self) -> int:
        """Readable once it has been rung."""
        return self._descriptor

    def silence(self) -> bool:
        """Whether it was rung since the last time."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._descriptor)
            return True
        return False

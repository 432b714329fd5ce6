"""Progress of work in stages: a moving line with the elapsed time on a terminal, one plain line a stage elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text


class Doing:
    """`tell` names the stage. Used as a context manager, which clears the moving line at the end."""

    def __init__(self, what: str, console: Console) -> None:
        self._what = what
        self._console = console
        self._began_s = time.monotonic()
        self._stage = ""
        self._spinner = Spinner("dots")
        self._live = Live(get_renderable=self._line, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def tell(self, stage: str) -> None:
        self._stage = stage
        if not self._console.is_terminal:
            self._console.print(Text(f"{self._what}: {stage} ({self._elapsed_s():.0f} s)"), soft_wrap=True)

    def _line(self) -> RenderableType:
        self._spinner.update(text=Text(f"{self._what}: {self._stage}, {self._elapsed_s():.0f} s"))
        return self._spinner if self._stage else Text("")

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

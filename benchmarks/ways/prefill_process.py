"""The prefill process of the hand-off benchmark, and how the decode process drives it.

A pipe carries what to do, never what is timed. The process ends with the pipe, so with its
parent, whatever ended that.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.ways.ends import WAIT_S, HandOffFailed, PrefillEnds

_END_S = 5.0


@dataclass(frozen=True)
class Open:
    """One way and cell, until Close."""

    way: str
    cell: Any
    """How many pages of which size: a Cell, or a GpuCell."""
    lanes: int
    seed: int
    description: Any


@dataclass(frozen=True)
class Send:
    """The pages of one repetition; None: every page of the pool, to warm up."""

    room: int
    repetition: int | None


@dataclass(frozen=True)
class Close:
    pass


@dataclass(frozen=True)
class Spent:
    """What prefill measured since the warming up."""

    began_s: list[float]
    """Of each repetition, in monotonic seconds."""
    cpu_s: float


class PrefillProcess:
    """The decode process's view of it. Raises HandOffFailed where the process does not answer."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def open(self, request: Open) -> Any:
        """What prefill's end says of itself."""
        self.tell(request)
        return self._answer()

    def tell(self, message: Open | Send | Close) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise HandOffFailed("the prefill process is gone; its error is above") from error

    def close(self) -> Spent:
        self.tell(Close())
        spent: Spent = self._answer()
        return spent

    def _answer(self) -> Any:
        try:
            if not self._connection.poll(WAIT_S):
                raise HandOffFailed(f"no answer of the prefill process within {WAIT_S:g} s")
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise HandOffFailed("the prefill process is gone; its error is above") from error


@contextmanager
def running_prefill(make_ends: Callable[[int], PrefillEnds], argument: int) -> Iterator[PrefillProcess]:
    """A process that makes its ends from this argument, gone afterwards whatever happens."""
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=_serve, args=(there, make_ends, argument), name="prefill", daemon=True)
    process.start()
    there.close()
    try:
        yield PrefillProcess(here)
    finally:
        here.close()
        process.join(_END_S)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(connection: Connection, make_ends: Callable[[int], PrefillEnds], argument: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The pipe ends first, and then this process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ends = make_ends(argument)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            _measure(connection, connection.recv(), ends)


def _measure(connection: Connection, request: Open, ends: PrefillEnds) -> None:
    """One way and cell. Raises EOFError or BrokenPipeError when the decode process is done, or gone."""
    cell = request.cell
    chosen = [cell.choose(request.seed, number) for number in range(cell.repetitions)]
    end = ends.end(request.way, cell, request.lanes, request.description)
    began_s: list[float] = []
    cpu_before_s = 0.0
    try:
        connection.send(end.describe())
        while isinstance(message := connection.recv(), Send):
            if message.repetition is None:
                end.send(message.room, *cell.everywhere())
                continue
            if message.repetition == 0:
                cpu_before_s = time.process_time()
            began_s.append(end.send(message.room, *chosen[message.repetition]))
        spent = Spent(began_s, time.process_time() - cpu_before_s)
    finally:
        end.close()
    connection.send(spent)

"""A worker is gone in the middle of a hand-off: how long until the other one knows.

Two processes, real signals, the deadlines that ship. SIGKILL is a crash: the kernel ends the
connection. SIGSTOP is a worker that hangs, or a host that is gone: only silence says so. `idle`
is a room whose pages are granted and not sent yet, `writing` one in the middle of its pages.
The survivor knows when its room has failed or waits for its fence, with a reason.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report
from benchmarks.bench_cluster import run_main
from benchmarks.unfinished import Unfinished, continue_argument
from benchmarks.ways.cell import AUX, Cell
from benchmarks.ways.ends import WAIT_S, HandOffFailed
from benchmarks.ways.memory import over, shared_memory
from benchmarks.ways.product import HOST, make_receiver, make_sender
from benchmarks.ways.registry import missing
from transfer.receiver import Receiver
from transfer.sender import Sender
from transfer.session import ReceiverState, SenderState

TRANSPORTS = ("shm", "tcp", "nixl")
SIGNALS = ("SIGKILL", "SIGSTOP")
SIDES = ("prefill", "decode")
MOMENTS = ("idle", "writing")
WANTED_S = {"SIGKILL": 0.5, "SIGSTOP": 3.0}
TRIES = 5
ROOM = 1
LANES = 2
LONG = Cell(2048, 131072)
"""256 MiB into memory that nobody has touched: tens of milliseconds on any transport."""
FIRST_DELAY_S = 0.01
"""From the call that sends to the signal, in the middle of the writing; halved where the hand-off was faster."""
IDLE_S = 0.2
_LOOK_S = 0.001
_LOADED_ONCE = ["benchmarks.ways.product", "benchmarks.bench_cluster"]
"""What every worker needs, so that it is there at once."""


@dataclass(frozen=True)
class Case:
    transport: str
    signal: str
    victim: str
    moment: str

    def __str__(self) -> str:
        return f"{self.transport} {self.signal} {self.victim} {self.moment}"


class Known(NamedTuple):
    """What the survivor found, and when, in monotonic seconds."""

    at_s: float
    state: str
    reason: str


def main() -> int:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="one try of each case")
    parser.add_argument("--tries", type=int, default=TRIES, help=f"of each case (default {TRIES})")
    continue_argument(parser)
    options = parser.parse_args()
    tries = 1 if options.quick else options.tries
    unfinished = Unfinished(options.unfinished)
    results = []
    for case in cases():
        try:
            found = [unfinished.once({**vars(case), "try": number}, partial(lose, case)) for number in range(tries)]
        except HandOffFailed as error:
            report.progress(f"handoff_loss: {case}: {error}")
            return 1
        results.append(summary(case, found))
        report.progress(f"  {case}: {results[-1]['s_p50']} s, at worst {results[-1]['s_worst']} s")
    worst_s = {name: max(one["s_worst"] for one in results if one["signal"] == name) for name in SIGNALS}
    result = {
        "tries": tries,
        "results": results,
        "worst_s": worst_s,
        "wanted_s": WANTED_S,
        "within": all(worst_s[name] < WANTED_S[name] for name in SIGNALS),
    }
    columns = ("transport", "signal", "victim", "moment", "s_p50", "s_worst")
    report.publish(result, columns, [[one[column] for column in columns] for one in results], options.json)
    return 0


def cases() -> Iterator[Case]:
    for transport in TRANSPORTS:
        if reason := missing(transport):
            report.progress(f"  {transport} left out: {reason}")
            continue
        for what in itertools.product(SIGNALS, SIDES, MOMENTS):
            yield Case(transport, *what)


def summary(case: Case, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    took_s = [one["s"] for one in found]
    return {
        **vars(case),
        "s_p50": round(statistics.median(took_s), 3),
        "s_worst": round(max(took_s), 3),
        "reason": found[0]["reason"],
    }


def lose(case: Case) -> dict[str, Any]:
    """One try. Raises HandOffFailed where there was no hand-off to lose."""
    delay_s = FIRST_DELAY_S
    while True:
        took_s, known = _lose(case, delay_s)
        if known.state != "DONE":
            return {"s": round(took_s, 4), "state": known.state, "reason": known.reason}
        delay_s /= 2
        if delay_s < 1e-4:
            raise HandOffFailed("every hand-off was done before its worker was lost")


def _lose(case: Case, delay_s: float) -> tuple[float, Known]:
    with _process(_prefill, case) as (prefill_process, prefill):
        port = _answer(prefill)
        with _process(_decode, case, port) as (decode_process, decode):
            _answer(prefill)  # The pages are granted.
            if case.moment == "writing":
                prefill.send("send")
                _answer(prefill)
                time.sleep(delay_s)
            else:
                time.sleep(IDLE_S)
            victim, survivor = (prefill_process, decode) if case.victim == "prefill" else (decode_process, prefill)
            assert victim.pid is not None, "a process that answered has a number"
            began_s = time.monotonic()
            os.kill(victim.pid, getattr(signal, case.signal))
            known: Known = _answer(survivor)
            return known.at_s - began_s, known


@contextmanager
def _process(work: Callable[..., None], case: Case, *arguments: int) -> Iterator[tuple[BaseProcess, Connection]]:
    """One worker; gone afterwards, also where it is frozen."""
    # Forked from a process that has everything loaded, which also waits for the dead.
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(_LOADED_ONCE)
    here, there = forking.Pipe()
    process = forking.Process(target=work, args=(there, case, *arguments), daemon=True)
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()
        here.close()


def _answer(connection: Connection) -> Any:
    try:
        if not connection.poll(WAIT_S):
            raise HandOffFailed(f"no answer within {WAIT_S:g} s")
        return connection.recv()
    except (EOFError, OSError) as error:
        raise HandOffFailed("a worker is gone; its error is above") from error


# The workers' processes.


def _prefill(connection: Connection, case: Case) -> None:
    _begin()
    sender = make_sender(case.transport, over(np.zeros(_memory_bytes(), np.uint8), LONG), LANES)
    connection.send(sender.listen(HOST, 0))
    sender.offer(ROOM)
    _until(lambda: sender.state(ROOM) is SenderState.GRANTED)
    connection.send("granted")
    if case.moment == "writing":
        connection.recv()
        connection.send("sending")
        sender.send(ROOM, LONG.choose(0, 0)[0], AUX)
    connection.send(_watch(sender, (SenderState.FAILED, SenderState.DONE)))
    connection.poll(WAIT_S)


def _decode(connection: Connection, case: Case, port: int) -> None:
    _begin()
    memory, address = shared_memory(_memory_bytes())
    pool = over(memory, LONG)
    receiver = make_receiver(case.transport, pool, address if case.transport == "shm" else None, LANES)
    receiver.open(ROOM, HOST, port)
    _until(lambda: receiver.state(ROOM) is not ReceiverState.CONNECTING)
    receiver.grant(ROOM, LONG.choose(0, 0)[1], 0, 0)
    connection.send(_watch(receiver, (ReceiverState.FENCING, ReceiverState.FAILED, ReceiverState.DONE)))
    connection.poll(WAIT_S)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Whoever started this process ends it.
    logging.getLogger("transfer").setLevel(logging.ERROR)


def _memory_bytes() -> int:
    return LONG.layout.pages * LONG.page_bytes


def _watch(side: Sender | Receiver, ends: Sequence[SenderState | ReceiverState]) -> Known:
    _until(lambda: side.state(ROOM) in ends)
    return Known(time.monotonic(), side.state(ROOM).name, side.reason(ROOM))


def _until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise HandOffFailed(f"did not happen within {WAIT_S:g} s")
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    sys.exit(run_main(main))

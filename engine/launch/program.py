"""What the launcher runs, behind one small contract with two kinds: real SGLang, and a stand-in for tests.

Nothing is imported before a kind is asked for: `mainstem --help` must not wait for torch.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from engine.launch.errors import BadInput
from engine.launch.supervision import HOPELESS_EXIT_CODE
from engine.spec import WorkerSpec

if TYPE_CHECKING:
    from router.config import RouterSpec  # Needs pydantic, which workers do without.

ProgramName = Literal["sglang", "stand-in"]


@dataclass(frozen=True)
class Program:
    """Each function runs in a process of its own, and returns when that has done its work."""

    import_engine: Callable[[], None]
    """Imports what workers need and is slow to import, without starting a thread: workers are forked after it."""
    run_worker: Callable[[WorkerSpec], None]
    run_router: Callable[[RouterSpec], None]


def program_named(name: str) -> Program:
    """Raises BadInput for a name that is none."""
    if name not in get_args(ProgramName):
        raise BadInput(f"--program: wanted one of {', '.join(get_args(ProgramName))}, found {name!r}")
    return _sglang() if name == "sglang" else _stand_in()


def run_to_end(work: Callable[[], None]) -> int:
    """Runs `work` and gives the exit code that the process should end with; what went wrong is on stderr."""
    try:
        work()
        code = 0
    except SystemExit as wanted:
        code = wanted.code if isinstance(wanted.code, int) else 0 if wanted.code is None else 1
        if isinstance(wanted.code, str):
            print(wanted.code, file=sys.stderr)
    except ImportError:
        traceback.print_exc()
        code = HOPELESS_EXIT_CODE
    except BaseException:  # The process ends here in any case; the launcher shows the last lines of its log.
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _sglang() -> Program:
    def import_engine() -> None:
        from engine.sglang_zygote import import_engine

        import_engine()

    def run_worker(spec: WorkerSpec) -> None:
        from engine.worker import run_worker

        run_worker(spec)

    def run_router(spec: RouterSpec) -> None:
        from router.server import run

        run(spec)

    return Program(import_engine, run_worker, run_router)


def _stand_in() -> Program:
    from engine.launch import stand_in

    return Program(stand_in.import_engine, stand_in.run_worker, stand_in.run_router)

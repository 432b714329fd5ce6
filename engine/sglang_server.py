"""SGLang's own server in a role, started with what the launcher owns and the user's flags."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable

from sglang.srt.entrypoints.http_server import launch_server
from sglang.srt.server_args import prepare_server_args

from engine.sglang_load import load, run_scheduler_process
from engine.sglang_plugin import BACKEND
from engine.spec import WorkerSpec

ROLE_MODE = {"prefill": "prefill", "decode": "decode", "both": "null"}
"""Our roles, and SGLang's disaggregation modes."""


def arguments(spec: WorkerSpec) -> list[str]:
    """SGLang's command line for this worker. The user's flags come first: what the launcher owns wins."""
    owned = {
        "model-path": spec.model_path,
        "served-model-name": spec.served_model,
        "host": spec.host,
        "port": spec.port,
        "page-size": spec.page_tokens,
        "disaggregation-mode": ROLE_MODE[spec.role],
    }
    if spec.role != "both":
        owned["disaggregation-transfer-backend"] = BACKEND
    if spec.role == "prefill":
        owned["disaggregation-bootstrap-port"] = spec.handoff_port
    flags = [text for name, value in owned.items() for text in (f"--{name}", str(value))]
    return [*spec.engine_args, *flags]


def serve(spec: WorkerSpec, ready: Callable[[], None]) -> None:
    """Runs the server until it ends. `ready` is called, on some thread, once it takes requests."""
    load()
    launch_server(
        prepare_server_args(arguments(spec)), run_scheduler_process_func=run_scheduler_process, launch_callback=ready
    )


def keep_forking() -> None:
    """Makes SGLang fork its processes, where it asks for fresh ones. For a process that has imported everything.

    Only on a CPU: a process that has initialized CUDA must not be forked.
    """
    original = multiprocessing.set_start_method

    def fork_instead(method: str | None, force: bool = False) -> None:
        original("fork", force=True)

    multiprocessing.set_start_method = fork_instead


def log_settings(spec: WorkerSpec) -> str:
    """The environment and flags of this worker, as one line for its log."""
    return json.dumps({"worker": spec.name, "pid": os.getpid(), "arguments": arguments(spec)})

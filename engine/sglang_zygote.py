"""Everything that a worker imports, imported once: what the launcher's zygote does before it forks.

Importing SGLang takes half a minute of CPU time in each of a worker's three
processes. Forked from one process that has done it, they share it.
"""

from __future__ import annotations

import importlib
import threading

HEAVY_MODULES = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    # Imports every model's code, also in a process that serves one of them: 8 s of CPU time for each scheduler.
    "sglang.srt.models.registry",
    "transformers",
)
"""What a worker's HTTP server, scheduler and detokenizer import, at once or later."""


def import_engine() -> None:
    """Imports SGLang and loads the plug-in. Raises RuntimeError where that leaves CUDA initialized.

    Threads that the imports start do not live on in a forked child; nothing of ours relies on one.
    """
    for module in HEAVY_MODULES:
        importlib.import_module(module)
    import torch
    from sglang.srt.plugins import load_plugins

    from engine import sglang_server

    load_plugins()
    if torch.cuda.is_initialized():
        raise RuntimeError("launch.start: wanted fork on a machine where nothing uses CUDA, found CUDA initialized")
    sglang_server.keep_forking()


def running_threads() -> list[str]:
    """Names of this process's Python threads: for the log of a zygote."""
    return [thread.name for thread in threading.enumerate()]

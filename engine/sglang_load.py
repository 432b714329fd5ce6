"""Has SGLang load its plug-ins, and ours also where nothing is installed that tells of it.

SGLang finds plug-ins by the entry points of installed packages. A project that is only on PYTHONPATH has none, so the
processes of a worker begin here: `load` in its HTTP server, `run_scheduler_process` in its scheduler.
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from typing import Any

from sglang.srt.managers.scheduler import run_scheduler_process as scheduler_process
from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, load_plugins

from engine import sglang_plugin


def load() -> None:
    """As early as possible in each process. A second call does nothing."""
    _register_ours()
    load_plugins()


def run_scheduler_process(*arguments: Any, **named: Any) -> Any:
    """SGLang's own, with the plug-ins loaded in the process that it is started in."""
    load()
    return scheduler_process(*arguments, **named)


@functools.cache
def _register_ours() -> None:
    ours = f"{sglang_plugin.__name__}:{sglang_plugin.register.__name__}"
    if all(point.value != ours for point in entry_points(group=GENERAL_PLUGINS_GROUP)):
        sglang_plugin.register()

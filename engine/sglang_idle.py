"""A scheduler with nothing to compute sleeps until something happens: a request comes, or a hand-off has moved.

SGLang's loop looks again at once, and again. On a CPU that takes a core from the worker that it waits for. On a GPU's
host it takes the interpreter from the courier's thread, which serves the very hand-off that is waited for: that one
lets go of the interpreter with each system call, and gets it back SWITCH_S later, if the scheduler does not sleep.
"""

from __future__ import annotations

import sys
from typing import Any

import zmq
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

SWITCH_S = 2e-5
"""After so long a thread that wants the interpreter gets it. Python's own 5 ms, some dozen times in a hand-off, would
be most of what disaggregation adds to a first token."""
LOOK_MS = 5
"""A scheduler with requests looks at least so often: for what no bell is rung for, such as a grammar that is ready."""
IDLE_LOOK_MS = 100
"""One without any: often enough to say that it moves (engine.outbox.MOVED_S)."""


class IdleHook:
    """Acts where a worker's KV manager has a bell, which one of ours has."""

    def __init__(self) -> None:
        self._poller: zmq.Poller | None = None

    def register(self) -> None:
        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.on_idle", self.wait, HookType.AFTER)

    def wait(self, _nothing: None, scheduler: Any) -> None:
        queue = scheduler.disagg_prefill_bootstrap_queue or scheduler.disagg_decode_prealloc_queue
        bell = None if queue is None else getattr(queue.kv_manager, "bell", None)
        if bell is None:
            return
        if self._poller is None:
            sys.setswitchinterval(SWITCH_S)
            self._poller = zmq.Poller()
            channels = scheduler.ipc_channels
            for source in (channels.recv_from_tokenizer, channels.recv_from_rpc, bell):
                self._poller.register(source, zmq.POLLIN)
        self._poller.poll(IDLE_LOOK_MS if scheduler.is_fully_idle() else LOOK_MS)
        bell.silence()

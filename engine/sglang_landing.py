"""Decode grants no page into which a step that is under way may still write.

With its overlap, SGLang puts the next step into the GPU's stream before it looks at the result of the last one. A
request that turns out to be finished is in that step too, which writes one token more of it into a page that is free by
then. To SGLang's own work that does no harm: it comes behind, in the same stream. A peer does not wait for this stream,
and prefill that has computed a prompt already writes a fraction of a millisecond after it is told which pages are free.
So pages are granted once that step is over, where anybody in it has finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


@dataclass(frozen=True)
class EventMark:
    """An event of torch's on the stream that computes (transfer.mark.Mark)."""

    event: Any

    def reached(self) -> bool:
        return bool(self.event.query())


class LandingHook:
    """Acts where a worker's KV manager has `stale_step`, which one of ours has."""

    def register(self) -> None:
        queue = "sglang.srt.disaggregation.decode.DecodePreallocQueue."
        HookRegistry.register(queue + "pop_preallocated", self.about_to_grant, HookType.BEFORE)

    def about_to_grant(self, queue: Any, *_arguments: Any, **_named: Any) -> None:
        manager = queue.kv_manager
        if hasattr(manager, "stale_step"):
            manager.stale_step = stale_step(queue.scheduler) if queue.queue else None


def stale_step(scheduler: Any) -> EventMark | None:
    """The end of the step that is under way, where it computes a request whose pages are free already."""
    step = scheduler.last_batch
    if not scheduler.enable_overlap or torch.device(scheduler.device).type == "cpu" or step is None:
        return None
    if not any(request.finished() or request.is_retracted for request in step.reqs):
        return None
    event = torch.get_device_module(scheduler.device).Event()
    event.record(scheduler.forward_stream)
    return EventMark(event)

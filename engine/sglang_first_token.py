"""A decode worker says a request's first token when it has come, not when it has built the batch that goes on with it.

The token comes with the pages. SGLang 0.5.16 first builds a batch for the request, which for a long prompt takes some
milliseconds, and says it then. A token after which the request is over is said by SGLang, as it knows why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType


class FirstTokenHooks:
    """Act in a worker whose KV manager has a receiver, which a decode worker of ours has."""

    def __init__(self) -> None:
        self._prebuilt = False
        """Whether SGLang is saying the first tokens of such a batch."""

    def register(self) -> None:
        queue = "sglang.srt.disaggregation.decode.DecodeTransferQueue."
        components = "sglang.srt.managers.scheduler_components."
        processor = components + "batch_result_processor.SchedulerBatchResultProcessor."
        streamer = components + "output_streamer.SchedulerOutputStreamer."
        HookRegistry.register(queue + "pop_transferred", self.transferred, HookType.AFTER)
        HookRegistry.register(processor + "process_batch_result_prebuilt", self.prebuilt, HookType.AROUND)
        HookRegistry.register(streamer + "stream_output", self.stream_output, HookType.AROUND)

    def transferred(self, requests: Sequence[Any], queue: Any, *_later: Any, **_more: Any) -> None:
        """These requests have their pages, and a token each."""
        if getattr(queue.scheduler.disagg_decode_prealloc_queue.kv_manager, "receiver", None) is None:
            return
        if ready := [request for request in requests if _goes_on(request)]:
            for request in ready:
                # As SGLang notes it a moment later: it says how long a request has waited with each event.
                request.time_stats.set_forward_entry_time()
            queue.scheduler.output_streamer.stream_output(ready, False)

    def prebuilt(self, original: Any, processor: Any, batch: Any) -> None:
        self._prebuilt = True
        try:
            original(processor, batch)
        finally:
            self._prebuilt = False

    def stream_output(self, original: Any, streamer: Any, requests: Any, *arguments: Any, **named: Any) -> None:
        """Leaves out those of which everything is said already."""
        if self._prebuilt:
            requests = [one for one in requests if one.finished() or one.send_token_offset < len(one.output_ids)]
        original(streamer, requests, *arguments, **named)


def _goes_on(request: Any) -> bool:
    """Whether its token is the first of more, and no more than a token has to be said."""
    plain = request.grammar is None and not request.return_logprob and not request.return_hidden_states
    if not (request.stream and plain and len(request.output_ids) == 1):
        return False
    request.update_finish_state()
    return not request.finished()

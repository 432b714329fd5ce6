"""Who streams says a first token when it has it: prefill when it is computed, decode when it has come with the pages.

SGLang 0.5.16 says it later. Prefill waits until the pages are handed over, and a router that does not want to wait for
that asks it for a stream. And with its overlap it looks at a pass when it has launched the next one: that takes tens of
milliseconds, and for long prompts begins when the pass is over, as to plan the next one waits for the GPU.
Decode first builds a batch for the request, which for a long prompt takes some milliseconds.
A token after which the request is over is said by SGLang, as it knows why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine.sglang_detokenize import straight_streamer


class FirstTokenHooks:
    """Act in a decode worker whose KV manager has a receiver, as ours has; on prefill's requests with a sender of ours,
    which has `slots_changed`."""

    def __init__(self) -> None:
        self._prebuilt = False
        """Whether SGLang is saying the first tokens of such a batch."""
        self._said: Any = None
        """The result of a pass whose first tokens were said before SGLang looks at it."""
        self._straight: Any = None
        """What says them."""

    def register(self) -> None:
        queue = "sglang.srt.disaggregation.decode.DecodeTransferQueue."
        components = "sglang.srt.managers.scheduler_components."
        processor = components + "batch_result_processor.SchedulerBatchResultProcessor."
        streamer = components + "output_streamer.SchedulerOutputStreamer."
        HookRegistry.register(queue + "pop_transferred", self.transferred, HookType.AFTER)
        HookRegistry.register(processor + "process_batch_result_prebuilt", self.prebuilt, HookType.AROUND)
        HookRegistry.register(streamer + "stream_output", self.stream_output, HookType.AROUND)
        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", self.before_pass, HookType.BEFORE)

    def before_pass(self, scheduler: Any, batch: Any, *_arguments: Any, **_named: Any) -> None:
        """Prefill is about to launch a pass: what the GPU has of the one before is said now."""
        prefills = scheduler.disagg_prefill_bootstrap_queue is not None and batch.forward_mode.is_extend()
        if not (prefills and scheduler.enable_overlap and scheduler.result_queue):
            return
        before, result = scheduler.result_queue[-1]
        if result.copy_done is not None and result.copy_done.query():
            self.computed(scheduler, before, result)
            self._said = result

    def computed(self, scheduler: Any, batch: Any, result: Any) -> None:
        """Prefill has the result of a pass, and SGLang has not looked at it yet: it will send pages first."""
        said, self._said = self._said, None
        if said is result:
            return
        streams = [place for place, request in enumerate(batch.reqs) if _is_streamed(request)]
        if not streams:
            return
        if result.copy_done is not None:
            result.copy_done.synchronize()
        made = result.next_token_ids.tolist()
        ready = [batch.reqs[place] for place in streams if _begins(batch.reqs[place], made[place])]
        if ready:
            if self._straight is None:
                self._straight = straight_streamer(scheduler)
            self._straight.stream_output(ready, False)
        for request in ready:
            # SGLang will put it there.
            request.output_ids.pop()

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


def _is_streamed(request: Any) -> bool:
    """Whether it is prefill's of ours, somebody waits for its token, and this was its last chunk."""
    ours = hasattr(request.disagg_kv_sender, "slots_changed")
    over = request.to_finish or request.finished()
    return ours and request.stream and request.inflight_middle_chunks <= 0 and not over


def _begins(request: Any, token: int) -> bool:
    """`_goes_on` with this token, which it has then; else it is as it was."""
    # SGLang lets prefill make one token. How many the client wants is known to who asked prefill for a stream.
    sampling, limit = request.sampling_params, request.sampling_params.max_new_tokens
    request.output_ids.append(token)
    sampling.max_new_tokens = limit + 1
    goes_on = _goes_on(request)
    sampling.max_new_tokens = limit
    if goes_on:
        return True
    request.output_ids.pop()
    # What prefill's requests end with is up to SGLang.
    request.finished_reason = request.finished_len = None
    return False


def _goes_on(request: Any) -> bool:
    """Whether its token is the first of more, and no more than a token has to be said."""
    plain = request.grammar is None and not request.return_logprob and not request.return_hidden_states
    if not (request.stream and plain and len(request.output_ids) == 1):
        return False
    request.update_finish_state()
    return not request.finished()

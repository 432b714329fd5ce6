"""SGLang's HTTP server reads a request's JSON by msgspec, as all of its streams stand still while it does.

Python's parser takes some tenths of a millisecond for a prompt of thousands of token ids. What msgspec does not take,
or would take otherwise, goes to it.

A decode worker takes in a long prompt, of which the JSON is the least part, behind a step's tokens (`BetweenSteps`):
prefill has yet to compute it, unless most of it is cached there.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from starlette.requests import ClientDisconnect

from engine.between_steps import BetweenSteps
from engine.spec import SPEC_VARIABLE

LONG_BYTES = 16 * 1024
"""A body that takes a millisecond to take in."""


def register() -> None:
    """Called once in each process, before SGLang's hooks are applied."""
    hook = JsonHook(BetweenSteps())
    HookRegistry.register("starlette.requests.Request.json", hook.read, HookType.AROUND)
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager."
    HookRegistry.register(manager + "_handle_batch_output", hook.output, HookType.AROUND)


class JsonHook:
    """Of one process."""

    def __init__(self, between: BetweenSteps) -> None:
        self._between = between

    async def output(self, original: Any, manager: Any, received: Any) -> None:
        """A step's tokens, which its requests pass on from here. On a decode worker, as others' prompts are urgent."""
        await original(manager, received)
        if manager.server_args.disaggregation_mode == "decode":
            # Not of those in this message, which may be one that has failed.
            self._between.stepped(goes_on=any(state.output_ids for state in manager.rid_to_state.values()))

    async def read(self, original: Any, request: Any) -> Any:
        """What FastAPI takes for the body; starlette keeps it under this name."""
        if SPEC_VARIABLE not in os.environ:
            return await original(request)
        if not hasattr(request, "_json"):
            raw = await request.body()
            if len(raw) > LONG_BYTES and await self._between.place() and await request.is_disconnected():
                # SGLang knows nothing of it yet, so an abort that came meanwhile found nothing to abort.
                raise ClientDisconnect
            try:
                request._json = msgspec.json.decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError):
                # Python's also takes NaN, numbers beyond a double's, half a surrogate pair, other encodings; and it is
                # the one that says what is wrong.
                return await original(request)
        return request._json

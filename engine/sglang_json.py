"""SGLang's HTTP server reads a request's JSON by msgspec, as all of its streams stand still while it does.

Python's parser takes some tenths of a millisecond for a prompt of thousands of token ids. What msgspec does not take,
or would take otherwise, goes to it.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine.spec import SPEC_VARIABLE


def register() -> None:
    """Called once in each process, before SGLang's hooks are applied."""
    HookRegistry.register("starlette.requests.Request.json", read, HookType.AROUND)


async def read(original: Any, request: Any) -> Any:
    """What FastAPI takes for the body; starlette keeps it under this name."""
    if SPEC_VARIABLE not in os.environ:
        return await original(request)
    if not hasattr(request, "_json"):
        try:
            request._json = msgspec.json.decode(await request.body())
        except (msgspec.DecodeError, UnicodeDecodeError):
            # Python's also takes NaN, numbers beyond a double's, half a surrogate pair, other encodings; and it is the
            # one that says what is wrong.
            return await original(request)
    return request._json

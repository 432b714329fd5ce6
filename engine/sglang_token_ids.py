"""Marks the events of SGLang's OpenAI streams with their tokens: `engine.token_marks`, where SGLang makes the events.

In a chat, one step of the engine makes any number of events, in `_generate_stream_content`; in a completion it makes
one, so there the step is noted as it passes from `generate_request` into the stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine.token_marks import MORE, Marks, Whole

Chunks = AsyncGenerator[str, None]


def register() -> None:
    """Called once in each process, before SGLang's hooks are applied."""
    ids = TokenIds()
    openai = "sglang.srt.entrypoints.openai."
    for target, hook in (
        (openai + "serving_chat.OpenAIServingChat._generate_chat_stream", ids.chat),
        (openai + "serving_chat.OpenAIServingChat._generate_stream_content", ids.content),
        (openai + "serving_completions.OpenAIServingCompletion._generate_completion_stream", ids.completion),
        ("sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request", ids.steps),
    ):
        HookRegistry.register(target, hook, HookType.AROUND)


class TokenIds:
    """The hooks, and the marks of every stream that runs in this process."""

    def __init__(self) -> None:
        self._whole: Whole | None = None
        self._streams: dict[str, Marks] = {}
        """By request id."""
        self._steps: dict[str, str] = {}
        """By request id, the mark of the last step, made together with the step's text: a moment later, SGLang may have
        put more tokens into the same list."""

    async def chat(self, original: Any, serving: Any, adapted: Any, request: Any, raw: Any) -> Chunks:
        async with (
            self._marked(serving, adapted, request),
            aclosing(original(serving, adapted, request, raw)) as chunks,
        ):
            async for chunk in chunks:
                yield chunk

    async def content(self, original: Any, serving: Any, *, content: Any, **more: Any) -> Chunks:
        """What one step says: its last event has the tokens, those before have more to come."""
        made: Callable[[], Chunks] = lambda: original(serving, content=content, **more)  # noqa: E731
        rid = content["meta_info"]["id"]
        marks, mark = self._streams.get(rid), self._steps.get(rid, MORE)
        if marks is None:
            async for chunk in made():
                yield chunk
            return
        last = ""
        async for chunk in made():
            if last:
                yield MORE + last
            last = chunk
        if last:
            marks.told()
            yield mark + last

    async def completion(self, original: Any, serving: Any, adapted: Any, request: Any, raw: Any) -> Chunks:
        async with (
            self._marked(serving, adapted, request),
            aclosing(original(serving, adapted, request, raw)) as chunks,
        ):
            async for chunk in chunks:
                mark = self._steps.pop(adapted.rid, "") if isinstance(adapted.rid, str) else ""
                if mark:
                    self._streams[adapted.rid].told()
                yield mark + chunk

    async def steps(self, original: Any, manager: Any, obj: Any, request: Any = None) -> AsyncGenerator[Any, None]:
        async with aclosing(original(manager, obj, request)) as steps:
            async for step in steps:
                rid = str(step["meta_info"]["id"]) if isinstance(step, dict) and "meta_info" in step else ""
                marks = self._streams.get(rid)
                if marks is not None:
                    finished = step["meta_info"].get("finish_reason") is not None
                    self._steps[rid] = marks.reached(step["output_ids"], finished)
                yield step

    @asynccontextmanager
    async def _marked(self, serving: Any, adapted: Any, request: Any) -> AsyncIterator[None]:
        """While this stream runs, its steps are marked."""
        marks = self._marks(serving, adapted, request)
        if marks is None:
            yield
            return
        self._streams[adapted.rid] = marks
        try:
            yield
        finally:
            self._streams.pop(adapted.rid, None)
            self._steps.pop(adapted.rid, None)

    def _marks(self, serving: Any, adapted: Any, request: Any) -> Marks | None:
        """None for a stream whose events cannot be marked: of several answers, or without a tokenizer."""
        manager = serving.tokenizer_manager
        several = not isinstance(adapted.rid, str) or (request.n or 1) != 1
        if several or manager.tokenizer is None or manager.server_args.incremental_streaming_output:
            return None
        if self._whole is None:
            self._whole = Whole(manager.tokenizer.decode)
        return Marks(self._whole)

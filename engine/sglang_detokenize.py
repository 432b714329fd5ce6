"""A first token's text is made in the HTTP server's process: on its way to who waits for it there is one process less.

    scheduler ── step's tokens ──> detokenizer ── text ──> HTTP server       as SGLang 0.5.16 has it
        └─────── first token ────────────────────────────────^              which makes its text here

By SGLang's own detokenizer, which forgets the request again: what the scheduler says of it later, why it has ended,
goes the usual way and has no text any more. So this is for what prefill says, which is one token. Should the HTTP
server stand still until that has come too, it may read it first, as there are two senders: then decode says the token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.io_struct import BatchTokenIDOutput
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def register() -> None:
    """Called once in each process, before SGLang's hooks are applied."""
    hook, manager = DetokenizeHook(), "sglang.srt.managers.tokenizer_manager.TokenizerManager."
    HookRegistry.register(manager + "init_tokenizer_and_processor", hook.made, HookType.AFTER)
    HookRegistry.register(manager + "_handle_batch_output", hook.output, HookType.AROUND)


def straight_streamer(scheduler: Any) -> Any:
    """What says a scheduler's tokens to its HTTP server itself; as SGLang has it where there are several of those, or
    nobody makes texts of tokens."""
    server_args, streamer = scheduler.server_args, scheduler.output_streamer
    if server_args.tokenizer_worker_num != 1 or server_args.skip_tokenizer_init:
        return streamer
    return dataclasses.replace(streamer, send_to_detokenizer=scheduler.ipc_channels.send_to_tokenizer)


class DetokenizeHook:
    """Acts in the HTTP server of a prefill worker, on tokens that come without their text: nobody but us sends them."""

    def __init__(self) -> None:
        self._detokenizer: _Detokenizer | None = None

    def made(self, _nothing: None, manager: Any) -> None:
        """Not when the first token comes: to count a tokenizer's words takes ten milliseconds."""
        if manager.server_args.disaggregation_mode == "prefill" and manager.tokenizer is not None:
            self._detokenizer = _Detokenizer(manager)

    async def output(self, original: Any, manager: Any, received: Any) -> None:
        if isinstance(received, BatchTokenIDOutput) and self._detokenizer is not None:
            received = self._detokenizer.text_of(received)
        await original(manager, received)


class _Detokenizer(DetokenizerManager):  # type: ignore[misc]
    """SGLang's, without a process and sockets of its own."""

    def __init__(self, manager: Any) -> None:
        self.tokenizer = manager.tokenizer
        try:
            self.vocab_size: int | None = len(manager.tokenizer)
        except TypeError:
            self.vocab_size = getattr(manager.tokenizer, "vocab_size", None)
        self.disable_tokenizer_batch_decode = manager.server_args.disable_tokenizer_batch_decode
        self.is_tool_call_parser_gpt_oss = manager.server_args.tool_call_parser == "gpt-oss"
        self.decode_status: dict[str, Any] = {}

    def text_of(self, tokens: BatchTokenIDOutput) -> Any:
        try:
            return self.handle_batch_token_id_out(tokens)
        finally:
            self.decode_status.clear()

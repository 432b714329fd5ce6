"""Which pages a request has, asked of the GPU without waiting for what it computes.

SGLang keeps its table of slots on the GPU, and writes to it in the stream in which it schedules. With its overlap that
stream waits for the forward pass that was put in last: whoever asks there for one request's slots waits for another
request's pass. So they are asked for in a stream of their own, behind what was written when that was.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from transfer.plan import Pages


@dataclass(frozen=True)
class SlotsRead:
    """Pages that the GPU has been told to say."""

    _pages: torch.Tensor
    """Of int32 or int64, in memory of the host."""
    _said: Any
    """The event from which on they are there; None: they are."""

    def pages(self) -> Pages:
        """Waits until the GPU comes to it."""
        if self._said is not None:
            self._said.synchronize()
        pages: Pages = self._pages.to(torch.int32).numpy()
        return pages


class SlotReader:
    """For the scheduler's thread."""

    @cached_property
    def _stream(self) -> Any:
        # Not of the ordinary ones: torch has few of them, and gives the same one to several.
        return torch.cuda.Stream(priority=-1)

    def aside(self) -> AbstractContextManager[None]:
        """In its block nothing waits for what the schedule's stream waits for: only for what is known to be written."""
        stream: AbstractContextManager[None] = torch.cuda.stream(self._stream)
        return stream

    def written(self, table: torch.Tensor) -> Any:
        """An event: what has been put into the current stream to write to this table of slots. None on a CPU."""
        return torch.cuda.current_stream().record_event() if table.is_cuda else None

    def read(self, slots: torch.Tensor, page_tokens: int, written: Any) -> SlotsRead:
        """Asks for the pages of these slots, as they are once the GPU has come to `written`. Does not wait."""
        if written is None:
            return SlotsRead(slots[::page_tokens] // page_tokens, None)
        self._stream.wait_event(written)
        with self.aside():
            found = slots[::page_tokens] // page_tokens
            pages = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            pages.copy_(found, non_blocking=True)
            said = torch.cuda.Event()
            said.record(self._stream)
        return SlotsRead(pages, said)

"""How a KV pool lies in memory, so that two workers can tell whether their pages fit.

A pool is a list of buffers (K of every layer, then V of every layer; or one a
layer for MLA). Page p of a buffer is `page_bytes` long and starts at p * page_bytes.

    buffer 0   | page 0 | page 1 | page 2 | …          SGLang keeps page 0 as padding
    buffer 1   | page 0 | page 1 | page 2 | …
"""

from __future__ import annotations

import msgspec


class PoolLayout(msgspec.Struct, frozen=True, array_like=True):
    """Everything that must be equal on both sides of a hand-off, and the number of pages, which need not be."""

    model: str
    dtype: str
    page_tokens: int
    page_bytes: tuple[int, ...]
    """Bytes of one page, a number for each buffer."""
    aux_row_bytes: tuple[int, ...]
    """Bytes of one request's row in each auxiliary buffer (first token, log-probabilities, counters)."""
    pages: int
    """Pages in each buffer; indices run from 0 to pages - 1."""

    @property
    def bytes_per_page(self) -> int:
        """Over all buffers."""
        return sum(self.page_bytes)

    def mismatch(self, other: PoolLayout) -> str | None:
        """The first difference that makes pages of `other` useless here, spelled out; None where they fit."""
        for name in ("model", "dtype", "page_tokens", "page_bytes", "aux_row_bytes"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: wanted {_short(mine)}, found {_short(theirs)}"
        return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"

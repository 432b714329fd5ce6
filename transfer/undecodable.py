"""What msgspec raises for bytes that are no message of ours: everything that a stranger's bytes can cause."""

from __future__ import annotations

import msgspec

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""The last two are for text that is none, and for lists in lists in lists."""

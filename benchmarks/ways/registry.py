"""The ways by name, and how their ends are made."""

from __future__ import annotations

from typing import Any

from benchmarks.ways import nixl_raw
from benchmarks.ways.cell import Cell
from benchmarks.ways.ends import DecodeEnd, PrefillEnd
from benchmarks.ways.memory import DecodeMemory, over, pattern
from benchmarks.ways.product import ProductDecode, ProductPrefill, StagedDecode
from benchmarks.ways.sockets import SocketsDecode, SocketsPrefill

WAYS = {
    "shm": "the product: prefill writes into the memory that decode reads",
    "shm-staged": "the same into a staging area, and one more copy out of it",
    "tcp": "the product over sockets",
    "sockets": "a connection and a thread for each request, page by page",
    "nixl": "the product over NIXL, TCP",
    "nixl-raw": "NIXL by hand, TCP, both sides spinning",
}
_OF_NIXL = ("nixl", "nixl-raw")


def missing(way: str) -> str | None:
    """Why this way cannot be measured here; None where it can."""
    if way in _OF_NIXL and nixl_raw.package() is None:
        return f"wanted one of {', '.join(nixl_raw.PACKAGES)} installed"
    return None


class PrefillWays:
    """Prefill's ends, over memory of this size. Made in the prefill process."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory = pattern(memory_bytes)

    def end(self, way: str, cell: Cell, lanes: int, description: Any) -> PrefillEnd:
        """description: what decode's end said of itself"""
        match way:
            case "shm" | "tcp" | "nixl":
                return ProductPrefill(way, over(self._memory, cell), lanes)
            case "shm-staged":
                return ProductPrefill("shm", over(self._memory, cell), lanes)
            case "sockets":
                return SocketsPrefill(cell, self._memory, description)
            case "nixl-raw":
                return nixl_raw.NixlRawPrefill(cell, self._memory, description)
            case _:
                raise ValueError(f"way: wanted one of {', '.join(WAYS)}, found {way}")


def decode_end(way: str, cell: Cell, memory: DecodeMemory, lanes: int) -> DecodeEnd:
    match way:
        case "shm" | "tcp" | "nixl":
            return ProductDecode(way, over(memory.shared, cell), memory.address if way == "shm" else None, lanes)
        case "shm-staged":
            return StagedDecode(cell, memory)
        case "sockets":
            return SocketsDecode(cell, memory.shared)
        case "nixl-raw":
            return nixl_raw.NixlRawDecode(cell, memory.shared)
        case _:
            raise ValueError(f"way: wanted one of {', '.join(WAYS)}, found {way}")

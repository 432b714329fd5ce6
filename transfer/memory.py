"""Where pages lie, and which transports reach them there."""

from __future__ import annotations

from typing import Literal

Memory = Literal["DRAM", "VRAM"]
"""A CPU's, or a GPU's; in NIXL's words."""

REACHING: dict[Memory, tuple[str, ...]] = {"DRAM": ("shm", "tcp", "nixl"), "VRAM": ("nvlink", "nixl")}
"""Transports by name, for pages in this memory."""

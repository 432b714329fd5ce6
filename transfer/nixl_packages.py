"""The wheels that NIXL comes in. Apart from the transport, for those that only ask whether one is there."""

from __future__ import annotations

NIXL_PACKAGES = ("nixl_cu13", "nixl_cu12")
"""For two versions of CUDA; without a GPU either will do."""

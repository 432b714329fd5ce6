"""Decode's end of the transport nvlink in a process of its own, for a test that kills it: prints where it is."""

from __future__ import annotations

import asyncio
import base64
import sys
import time
from typing import Any

from transfer.cuda import Device
from transfer.gpu_memory import GpuMemory
from transfer.layout import PoolLayout
from transfer.nvlink import NvlinkTransport


class NoWire:
    async def dial(self, token: bytes) -> Any:
        raise AssertionError("nvlink wants no more connections")

    def broken(self, reason: str) -> None:
        raise AssertionError(reason)


def main(device: int, pages: int, page_bytes: int, buffers: int = 16) -> None:
    memory = GpuMemory(Device(device), PoolLayout("m", "bfloat16", 16, (page_bytes,) * buffers, (), pages))
    landing = asyncio.run(NvlinkTransport(memory.pool).land(NoWire()))
    print(base64.b64encode(landing.describe()).decode(), flush=True)
    while True:
        # It reads what has landed, so that its writer never waits.
        landing.in_place(1)
        time.sleep(0.001)


if __name__ == "__main__":
    main(*(int(one) for one in sys.argv[1:]))

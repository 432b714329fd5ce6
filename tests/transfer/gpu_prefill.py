"""Prefill's end of the transport nvlink in a process of its own, for tests that kill it. One line of JSON a command.

{"pages": 64, "page_bytes": [4096]}          -> {"ready": true}
{"connect": "base64", "pages": 71}           -> {"connected": true}
{"write": [tag, [source], [destination]]}    -> {"written": true}
{"settle": true}                             -> {"settled": true}
{"flood": [tag, [source], [destination]]}    -> {"flooding": true}, and writes for ever
{"alive": true}                              -> {"sum": of its first page, computed on its GPU}
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from typing import Any

import numpy as np

from transfer.cuda import Device
from transfer.gpu_memory import GpuMemory
from transfer.layout import PoolLayout
from transfer.nvlink import NvlinkTransport
from transfer.transport import RouteLost, Unreachable


class NoLanes:
    def take(self, token: bytes) -> list[Any]:
        return []


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def main(device_number: int) -> None:
    device = Device(device_number)
    first = json.loads(sys.stdin.readline())
    layout = PoolLayout("m", "bfloat16", 16, tuple(first["page_bytes"]), (), first["pages"])
    memory = GpuMemory(device, layout)
    memory.pattern()
    transport = NvlinkTransport(memory.pool)
    say(ready=True)
    route: Any = None
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        try:
            if "connect" in command:
                theirs = PoolLayout("m", "bfloat16", 16, layout.page_bytes, (), command["pages"])
                route = await transport.connect(base64.b64decode(command["connect"]), theirs, NoLanes())
                say(connected=True)
            elif "write" in command or "flood" in command:
                tag, source, destination = command.get("write") or command["flood"]
                here, there = np.array(source, np.int32), np.array(destination, np.int32)
                if "flood" in command:
                    say(flooding=True)
                    while True:
                        await route.write(tag, 0, here, there)
                        await asyncio.sleep(0)
                await route.write(tag, 0, here, there)
                say(written=True)
            elif "settle" in command:
                await route.settled()
                say(settled=True)
            else:
                device.use()
                say(sum=int(memory.read()[0][0].sum()))
        except (RouteLost, Unreachable) as error:
            say(lost=str(error))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

"""What it costs a forward pass that its pages leave meanwhile, and what is left to wait for when it is over.

No SGLang: the matrix products and the attention of a model of Llama-3.1-8B's dimensions, on random numbers, 8,192
tokens in one pass, layer after layer. Its pages, 128 at random in each of 64 buffers, go to the other GPU by the
product's own transport `nvlink`, or by the copy engines.

    nothing           the pass alone
    pass              all pages when it is over
    last N            all other layers' pages while the last N layers are computed, and theirs when it is over
    each              each layer's pages as soon as it is computed
    each, by engines  the same by the GPU's copy engines

`pass` is the time until all is computed, `all` until everything is there as well.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import numpy as np

from benchmarks import machine, report
from benchmarks.bench_cluster import run_main
from benchmarks.gpu_cluster import gpu_count
from benchmarks.ways.addresses import addresses
from transfer.computed import Computed
from transfer.cuda import Device
from transfer.gpu_memory import GpuMemory
from transfer.layout import PoolLayout
from transfer.nvlink import NvlinkRoute, NvlinkTransport
from transfer.plan import Pages
from transfer.pool import Pool

TOKENS, PAGE_TOKENS = 8192, 64
LAYERS, HIDDEN, INNER = 32, 4096, 14336
HEADS, KV_HEADS, HEAD = 32, 8, 128
PAGE_BYTES = PAGE_TOKENS * KV_HEADS * HEAD * 2
POOL_PAGES = 400
LASTS = (1, 2, 4)
COLUMNS = ("pages leave", "pass ms", "more than alone", "all ms", "more than alone")


def main() -> int:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=9, help="of each way (default 9)")
    options = parser.parse_args()
    if not gpu_count():
        report.progress("copy_beside_compute: wanted a GPU, found none")
        return 2
    times = asyncio.run(measure(options.repeats))
    alone_ms = statistics.median(passed for passed, _ in times["nothing"])
    rows: list[dict[str, Any]] = []
    for way, taken in times.items():
        pass_ms, all_ms = (statistics.median(column) for column in zip(*taken, strict=True))
        rows.append(
            {
                "way": way,
                "pass_ms": round(pass_ms, 2),
                "pass_added_ms": round(pass_ms - alone_ms, 2),
                "all_ms": round(all_ms, 2),
                "all_added_ms": round(all_ms - alone_ms, 2),
            }
        )
    link = "two GPUs" if gpu_count() > 1 else "one GPU: no link is crossed"
    result = {"gpus": machine.gpus(), "between": link, "tokens": TOKENS, "repeats": options.repeats, "results": rows}
    report.publish(result, COLUMNS, [list(row.values()) for row in rows], options.json)
    return 0


class Pass:
    """A forward pass's arithmetic, on torch's first device."""

    def __init__(self, device: Device, other: int) -> None:
        import torch

        # Has torch open the way to the other GPU's memory, for all of this process.
        torch.zeros(1, device=f"cuda:{device.number}").to(f"cuda:{other}")
        self._torch = torch
        self._device = device
        self._stream = torch.cuda.Stream()
        shapes = ((HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD), (HIDDEN, HIDDEN), (HIDDEN, 2 * INNER), (INNER, HIDDEN))
        self._input = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self._weights = [0.01 * torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        self.before = device.event()
        self.reached = [device.event() for _ in range(LAYERS)]
        """Recorded where a layer's keys and values are there."""
        self.done = device.event()

    def begin(self) -> None:
        """All of it is put into its stream."""
        with self._torch.cuda.stream(self._stream):
            self._record(self.before)
            for reached in self.reached:
                heads = (self._input @ self._weights[0]).view(TOKENS, HEADS + 2 * KV_HEADS, HEAD).transpose(0, 1)
                self._record(reached)
                query, key, value = heads.split((HEADS, KV_HEADS, KV_HEADS))
                attended = self._torch.nn.functional.scaled_dot_product_attention(
                    query[None], key[None], value[None], is_causal=True, enable_gqa=True
                )
                projected = attended[0].transpose(0, 1).reshape(TOKENS, HIDDEN) @ self._weights[1]
                gate, up = (projected @ self._weights[2]).split(INNER, dim=1)
                self._torch.nn.functional.silu(gate).mul(up) @ self._weights[3]
            self._record(self.done)

    def wait(self) -> None:
        self._stream.synchronize()

    def wait_for_all(self) -> None:
        """For every stream of the device."""
        self._torch.cuda.synchronize()

    def _record(self, event: Any) -> None:
        self._device.record(event, self._stream.cuda_stream)


Leave = Callable[[Pages, Pages], Awaitable[None]]
"""Has pages leave, to which pages."""


async def measure(repeats: int) -> dict[str, list[tuple[float, float]]]:
    """By way, of each time, milliseconds until the pass was over and until everything was there."""
    here, there = Device(0), Device(min(1, gpu_count() - 1))
    buffers = tuple((layer, LAYERS + layer) for layer in range(LAYERS))
    mine, theirs = _pointers(here), _pointers(there)
    here.use()
    forward = Pass(here, there.number)
    route = await _route(mine, theirs, buffers)
    # Each with a stream of its own.
    by_layer = [
        await _route([mine[one] for one in of_it], [theirs[one] for one in of_it], ((0, 1),)) for of_it in buffers
    ]
    engines = here.stream()

    async def nothing(_source: Pages, _target: Pages) -> None:
        pass

    async def together(source: Pages, target: Pages) -> None:
        await route.write_ahead(source, target, len(source), Computed(forward.before, forward.done))

    def last(count: int) -> Leave:
        layers = LAYERS - count
        computed = Computed(forward.before, forward.done, forward.reached[layers], layers)

        async def leave(source: Pages, target: Pages) -> None:
            await route.write_ahead(source, target, len(source), computed)

        return leave

    async def each(source: Pages, target: Pages) -> None:
        for one, reached in zip(by_layer, forward.reached, strict=True):
            await one.write_ahead(source, target, len(source), Computed(forward.before, reached))

    async def each_by_engines(source: Pages, target: Pages) -> None:
        page_bytes = (PAGE_BYTES,) * len(mine)
        from_rows, to_rows = addresses(mine, page_bytes, source), addresses(theirs, page_bytes, target)
        sizes = np.full(len(source), PAGE_BYTES, np.uint64)
        for of_it, reached in zip(buffers, forward.reached, strict=True):
            here.wait(engines, reached)
            for one in of_it:
                here.copy_many(engines, from_rows[one], to_rows[one], sizes)

    ways: dict[str, Leave] = {"nothing": nothing, "pass": together}
    ways |= {f"last {count}": last(count) for count in LASTS} | {"each": each, "each, by engines": each_by_engines}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    chooser = np.random.default_rng(1)
    for number in range(2 + repeats):
        for way, leave in ways.items():
            pages = [chooser.permutation(POOL_PAGES)[: TOKENS // PAGE_TOKENS].astype(np.int32) for _ in range(2)]
            began_s = time.perf_counter()
            forward.begin()
            await leave(*pages)
            forward.wait()
            passed_s = time.perf_counter()
            forward.wait_for_all()
            there_s = time.perf_counter()
            await asyncio.gather(*(one.settled() for one in (route, *by_layer)))
            if number >= 2:
                times[way].append((1e3 * (passed_s - began_s), 1e3 * (there_s - began_s)))
        report.progress(f"  round {number + 1} of {2 + repeats}")
    for one in (route, *by_layer):
        await one.disconnect()
    return times


def _pointers(device: Device) -> list[int]:
    """A pool's buffers, no two of them the same: a copy of zeros may be quicker."""
    device.use()
    layout = _layout(2 * LAYERS)
    memory = GpuMemory(device, layout)
    memory.pattern()
    return memory.pointers


def _layout(buffers: int) -> PoolLayout:
    return PoolLayout("measured", "bfloat16", PAGE_TOKENS, (PAGE_BYTES,) * buffers, (), POOL_PAGES)


async def _route(mine: list[int], theirs: list[int], layers: tuple[tuple[int, ...], ...]) -> NvlinkRoute:
    """Both ends in this process: CUDA maps nothing then, all the rest is as it is."""
    layout, nothing = _layout(len(mine)), cast(Any, None)
    landing = await NvlinkTransport(Pool.at(layout, theirs)).land(nothing)
    return await NvlinkTransport(Pool.at(layout, mine), layers=layers).connect(landing.describe(), layout, nothing)


if __name__ == "__main__":
    sys.exit(run_main(main))

"""What both indexes are asked in `benchmarks.index`. Only the standard library: Dynamo's is run by another Python.

    prompt      |==========------------------------------........................................|
    everybody   first tenth
    3 workers   half                                    1 worker  all

beside 200,000 pages of other prompts, each held once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

PROMPT_TOKENS = (2048, 8192, 32768, 131072)
WORKERS = (8, 64, 512)
BACKGROUND_PAGES = 200_000
BACKGROUND_CHAIN = 1000
EVENT_PAGES = 16
PROMPTS = 4
"""Asked for in turn, so that no answer is warm from the last question."""
WARM_UP = 20


@dataclass(frozen=True, slots=True)
class Scenario:
    """One fleet and one page size; the prompts' lengths are gone through within it."""

    workers: int
    page_tokens: int
    background_pages: int
    repetitions: int
    seed: int = 1

    def background(self) -> Iterator[tuple[int, list[int]]]:
        """(worker, pages) of every other prompt."""
        random = Random(self.seed)
        for number in range(self.background_pages // BACKGROUND_CHAIN):
            yield number % self.workers, [random.getrandbits(63) for _ in range(BACKGROUND_CHAIN)]

    def prompts(self, prompt_tokens: int) -> list[list[int]]:
        """Tokens of the prompts that are asked for."""
        random = Random(f"{self.seed} {prompt_tokens}")
        return [random.choices(range(32_000), k=prompt_tokens) for _ in range(PROMPTS)]

    def held(self, worker: int, pages: int) -> int:
        """Leading pages of a prompt of so many pages that this worker holds."""
        if worker == 0:
            return pages
        return pages // 2 if worker < 4 else max(1, pages // 10)


def percentiles_us(call: Callable[[], object], repetitions: int) -> tuple[float, float]:
    """Median and 99th percentile of the call's wall-clock time."""
    for _ in range(WARM_UP):
        call()
    took_s = []
    for _ in range(repetitions):
        began_s = time.perf_counter()
        call()
        took_s.append(time.perf_counter() - began_s)
    took_s.sort()
    return round(took_s[repetitions // 2] * 1e6, 1), round(took_s[int(0.99 * repetitions)] * 1e6, 1)

"""What one round of one cell came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from benchmarks.ways.cell import Cell


@dataclass(frozen=True)
class Sample:
    us_p50: float
    us_p99: float
    cpu_us_per_page: float
    """Of both processes together, with what drives a repetition: that weighs in cells of one page, and in no other."""

    @classmethod
    def of(cls, took_s: Sequence[float], cpu_s: float, cell: Cell) -> Self:
        """took_s: of each repetition; cpu_s: of all"""
        p50, p99 = np.percentile(took_s, (50, 99)) * 1e6
        return cls(round(float(p50), 1), round(float(p99), 1), round(cpu_s * 1e6 / len(took_s) / cell.pages, 3))

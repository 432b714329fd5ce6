"""Where the rows of a hand-off lie, for the ways that are told of each by its address."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from transfer.plan import Pages


def addresses(pointers: Sequence[int], page_bytes: Sequence[int], pages: Pages) -> npt.NDArray[np.uint64]:
    """Of these pages in each buffer, shape (buffers, pages)."""
    starts, sizes = (np.array(one, np.uint64)[:, None] for one in (pointers, page_bytes))
    return starts + pages.astype(np.uint64)[None, :] * sizes

"""Hit rate of one pool of pages under a trace, by its size: what a loader and a cache must agree on.

One pool for all requests, in the order of their arrival, least recently used leaves dropped first; no
timing. For traces with published rates, those stand beside ours. Two ways to count: `whole_pages` is
what an engine can reuse; `with_partial_page` gives the last page of a prompt an id even where it
is not whole, as the published rates do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.traces.load import FORMATS, load
from benchmarks.traces.trace import Trace, Turn
from router.page_lru import PageLru

CAPACITIES_TOKENS = (1_000_000, 3_000_000, 10_000_000, 50_000_000)
PUBLISHED: dict[tuple[int, int], dict[int, float]] = {
    # Mooncake (FAST'25) figure 9, recomputed on its published traces of 512-token blocks.
    (12_031, 512): {1_000_000: 0.054, 3_000_000: 0.139, 10_000_000: 0.291, 50_000_000: 0.371},
    (3_993, 512): {1_000_000: 0.145, 3_000_000: 0.315, 10_000_000: 0.577, 50_000_000: 0.651},
}
"""Token-weighted hit rate by capacity, of the trace with so many requests and tokens a page."""


def main() -> None:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("trace", type=Path, metavar="FILE", help="a trace, plain or packed by zstd")
    parser.add_argument("--format", choices=FORMATS, help="of the file (default: by its first line)")
    parser.add_argument("--page-tokens", type=int, help="tokens a page (default: the format's own)")
    parser.add_argument(
        "--capacity-tokens", type=int, nargs="+", default=CAPACITIES_TOKENS, help="sizes of the pool", metavar="N"
    )
    options = parser.parse_args()
    try:
        result = measure(load(options.trace, options.format, options.page_tokens), options.capacity_tokens)
    except (OSError, ValueError) as error:
        raise SystemExit(f"lru: {error}") from error
    kind = f"{result['trace']} (synthetic)" if result["synthetic"] else result["trace"]
    rows = [
        (
            kind,
            f"{point['capacity_tokens']:,}" if point["capacity_tokens"] else "no bound",
            _percent(point["whole_pages"]),
            _percent(point["with_partial_page"]),
            _percent(point["published"]),
        )
        for point in result["curve"]
    ]
    report.publish(
        result, ("trace", "capacity, tokens", "whole pages", "with partial page", "published"), rows, options.json
    )


def measure(trace: Trace, capacities_tokens: Sequence[int]) -> dict[str, Any]:
    """Raises ValueError for a closed loop: its order depends on how fast it is served."""
    turns = [turn for _, _, turn in trace.arrivals()]
    published = PUBLISHED.get((len(turns), trace.page_tokens), {})
    curve = []
    for capacity_tokens in (*capacities_tokens, None):
        whole = hit_rates(turns, trace.page_tokens, capacity_tokens, partial=False)
        partial = hit_rates(turns, trace.page_tokens, capacity_tokens, partial=True)
        curve.append(
            {
                "capacity_tokens": capacity_tokens,
                "whole_pages": round(whole[0], 4),
                "with_partial_page": round(partial[0], 4),
                "with_partial_page_by_pages": round(partial[1], 4),
                "published": published.get(capacity_tokens) if capacity_tokens else None,
            }
        )
        report.progress(f"  {capacity_tokens or 'no bound'}: {partial[0]:.4f}")
    return {
        "trace": trace.name,
        "synthetic": trace.synthetic,
        "requests": len(turns),
        "sessions": len(trace.sessions),
        "page_tokens": trace.page_tokens,
        "curve": curve,
    }


def hit_rates(
    turns: Sequence[Turn], page_tokens: int, capacity_tokens: int | None, *, partial: bool
) -> tuple[float, float]:
    """Hits as a part of all prompt tokens, and of all pages.

    capacity_tokens  None is no bound
    partial          whether the partial last page of a prompt is a page
    """
    pool = PageLru(sys.maxsize if capacity_tokens is None else capacity_tokens // page_tokens)
    hit_tokens = all_tokens = hit_pages = all_pages = 0
    for turn in turns:
        ids = [*turn.ids, turn.partial_id] if partial and turn.partial_id is not None else turn.ids
        held = pool.match(ids)
        pool.use(ids)
        hit_tokens += min(held * page_tokens, turn.prompt_tokens)
        all_tokens += turn.prompt_tokens
        hit_pages += held
        all_pages += len(ids)
    return hit_tokens / max(1, all_tokens), hit_pages / max(1, all_pages)


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.2f} %"


if __name__ == "__main__":
    main()

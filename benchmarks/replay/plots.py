"""Pictures of replays: hit rate, time to the first token, load of each worker, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.replay.outcome import Outcome
from benchmarks.replay.row import Row

mpl.use("agg")
OURS, OTHERS = "#0b7285", "#adb5bd"


def draw_outcomes(outcomes: Mapping[str, Outcome], title: str, path: Path) -> None:
    """Three panels for one trace: hit rate by policy, distribution of TTFT, computed tokens by worker."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    hits, ttft, load = figure.subplots(1, 3)
    names = list(outcomes)
    hits.barh(names, [100 * outcomes[name].hit_rate for name in names], color=[_color(name) for name in names])
    hits.invert_yaxis()
    hits.set_xlabel("prompt tokens found in the cache, %")
    for name in names:
        values = np.sort(outcomes[name].ttft_s)
        share = np.arange(1, len(values) + 1) / len(values)
        ours = name == names[0]
        ttft.plot(values, 100 * share, label=name, color=OURS if ours else None, linewidth=2.5 if ours else 1)
    ttft.set_xscale("log")
    ttft.set_xlabel("seconds to the first token")
    ttft.set_ylabel("requests, %")
    ttft.legend(fontsize="x-small")
    for place, name in enumerate(names):
        outcome = outcomes[name]
        computed = [outcome.computed.get(worker, 0) / 1e6 for worker in outcome.workers]
        load.scatter(computed, [place] * len(computed), s=14, color=_color(name))
    load.set_yticks(range(len(names)), names)
    load.invert_yaxis()
    load.set_xlabel("million prompt tokens computed, one dot a worker")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def draw_suite(rows: Sequence[Row], path: Path) -> None:
    """One panel for each trace and capacity: what load each policy sustains."""
    cells = list(dict.fromkeys((row.trace, row.capacity_tokens) for row in rows))
    figure = Figure(figsize=(7 * 2, 3.4 * -(-len(cells) // 2)), layout="constrained")
    for place, (trace, capacity) in enumerate(cells):
        panel = figure.add_subplot(-(-len(cells) // 2), 2, place + 1)
        shown = [row for row in rows if (row.trace, row.capacity_tokens) == (trace, capacity)]
        names = [row.policy for row in shown]
        panel.barh(names, [row.sustainable_load or 0 for row in shown], color=[_color(name) for name in names])
        panel.invert_yaxis()
        synthetic = " (synthetic)" if shown[0].synthetic and "synthetic" not in trace.lower() else ""
        panel.set_title(f"{trace}{synthetic}, {capacity / 1e6:g} M tokens a worker", fontsize="small")
        panel.set_xlabel("sustained load")
    figure.savefig(path, dpi=110)


def _color(policy: str) -> str:
    return OURS if policy == "mainstem" else OTHERS

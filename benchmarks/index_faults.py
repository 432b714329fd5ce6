"""What lost page events and restarted workers cost: is the index right, and how soon again?

    python -m benchmarks.index_faults TRACE [--json]

TRACE is a file, or a folder with mooncake_conversation_trace.jsonl. The replay's cluster, in virtual time. After a
third of the trace, when caches are full, the faults begin, and end after ten minutes:

    restarts  every minute, or every other, the next worker dies, and is back after DOWN_S with nothing in its cache
    lost      of all that workers publish, batches and audits, LOST_SHARE does not arrive
    unmended  no question is answered meanwhile: a row to show that what is lost is missed

What a restarted worker has to compute again is lost with any index: the row of restarts alone is what losses beside
restarts compare with. `decisions_off` counts the choices at whose moment the index had another number of leading
pages than a running worker truly held, of any worker; some fall in the milliseconds that an event travels.

`healed_s` is the time from a batch that is lost to the moment that the index has it and all after it.

Agreement is of all pages of one worker, the index's against the worker's own, looked at each second; one that is down
holds none. Where it is below 99 %, it is looked at again when what was under way has come. `back_s_max` is the longest
time from a fault to the first look that finds 99 % again. Beside it stands what the router's own audits say.

The trace's requests come all together every 3 s. Between two such moments an index has time to heal unseen: so the same
faults are shown with requests spread over the time until the next ones come.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.replay import suite
from benchmarks.replay.cluster import Cluster
from benchmarks.replay.feed import LAG_S, Feed
from benchmarks.replay.outcome import Outcome
from benchmarks.replay.scenario import Scenario, speed_of
from benchmarks.replay.virtual_router import VirtualRouter
from benchmarks.traces.arrivals import spread
from benchmarks.traces.trace import Session, Trace, Turn
from router.decision import Decision
from router.pair_cost import PairCost
from transfer.wire import Audit, Batch, Published

TRACE = "mooncake_conversation_trace"
WORKERS = 8
CAPACITY_TOKENS = 3_000_000
WINDOW_S = 600.0
RESTART_EVERY_S = (60.0, 120.0)
DOWN_S = 5.0
LOST_SHARE = 0.05
AGREED = 0.99
LOOK_S = 1.0
AGAIN_S = 2 * LAG_S
"""From a look that does not find agreement to the one that counts: a question and its answer take as long."""
HEALED_S = 0.05
"""How often a feed that has lost a batch is looked at."""
AFTER_S = 30.0
"""How long after the last fault agreement is still looked at."""
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """restart_every_s: 0 for none. unmended: whether agents answer no question while the faults go on."""

    name: str
    spread: bool = False
    """Whether requests of one moment come one after the other instead."""
    restart_every_s: float = 0.0
    down_s: float = DOWN_S
    lost_share: float = 0.0
    unmended: bool = False


ROWS = (
    Faults(name="none"),
    Faults(name="lost", lost_share=LOST_SHARE),
    Faults(name="lost, unmended", lost_share=LOST_SHARE, unmended=True),
    *(
        Faults(
            name=f"restarts every {every_s:g} s{', lost' if share else ''}", restart_every_s=every_s, lost_share=share
        )
        for every_s in RESTART_EVERY_S
        for share in (0.0, LOST_SHARE)
    ),
)
"""As recorded, and spread."""
COLUMNS = (
    "faults",
    "arrivals",
    "hit %",
    "meanwhile",
    "TTFT mean",
    "published",
    "lost",
    "restarts",
    "decisions",
    "off",
    "pages off",
    "healed s p50",
    "max",
    "s below 99 %",
    "back after s",
    "audits",
    "least",
    "refuted",
)


@dataclass(slots=True)
class Agreement:
    """How one worker and the index agreed, from look to look."""

    least: float = 1.0
    below_s: float = 0.0
    """Time in which they agreed on less than AGREED."""
    back_s: float = 0.0
    """From a fault to the first look that found them agreed again, at most."""
    fault_s: float = 0.0
    """When the last fault was."""
    broken_s: float | None = None
    """When the fault was that they do not agree since."""

    def looked(self, share: float, now_s: float) -> None:
        self.least = min(self.least, share)
        if share < AGREED:
            self.below_s += LOOK_S
            if self.broken_s is None:
                self.broken_s = self.fault_s
        if self.broken_s is not None:
            # One that does not agree at the last look is counted as far as it was seen.
            self.back_s = max(self.back_s, now_s - self.broken_s)
            if share >= AGREED:
                self.broken_s = None


@dataclass(slots=True)
class Seen:
    """What was counted while the faults went on; agreement, a little longer."""

    batches: int = 0
    audits: int = 0
    lost_batches: int = 0
    lost_audits: int = 0
    restarts: int = 0
    decisions: int = 0
    decisions_off: int = 0
    pages_off: int = 0
    sent_to_dead: int = 0
    """Requests that were sent to a worker that was down, and again a moment later."""
    audit_agreement_min: float = 1.0
    healed_s: list[float] = field(default_factory=list)
    """From the loss of each batch; of one that is not made good, as long as it was looked at."""
    agreements: dict[str, Agreement] = field(default_factory=dict)


class FaultyRun:
    """One replay with faults from `from_s` to `to_s`."""

    def __init__(self, scenario: Scenario, faults: Faults, from_s: float, to_s: float, seed: int = SEED) -> None:
        self.cluster = Cluster(scenario, PairCost.name, lost=self._lost, watch=self._watch)
        self.seen = Seen(agreements={name: Agreement() for name in self.cluster.workers})
        self._faults = faults
        self._from_s, self._to_s = from_s, to_s
        self._network = random.Random(seed)
        self._down_until_s = dict.fromkeys(self.cluster.workers, -1.0)
        (self._router,) = self.cluster.routers
        self.cluster.keep_in_touch()
        if faults.restart_every_s:
            for number, at_s in enumerate(_times(from_s + faults.restart_every_s / 2, to_s, faults.restart_every_s)):
                name = list(self.cluster.workers)[number % len(self.cluster.workers)]
                self.cluster.later(at_s, partial(self._restart, name))
        if faults.unmended:
            self.cluster.later(from_s, partial(self._answer, False))
            self.cluster.later(to_s, partial(self._answer, True))
        for at_s in _times(from_s, to_s + AFTER_S, LOOK_S):
            self.cluster.later(at_s, self._look_at_all)

    def replayed(self, trace: Trace) -> Outcome:
        return self.cluster.open_loop(trace, 1.0)

    def row(self, outcome: Outcome) -> dict[str, Any]:
        """Times in seconds."""
        seen, agreements = self.seen, self.seen.agreements.values()
        audited = Counter[str]()
        for _, one in self._router.audits:
            audited.update(compared=one.audits, refuted=one.refuted, heals=one.heals)
        counted = {name: value for name, value in asdict(seen).items() if name not in ("agreements", "healed_s")}
        return {
            "faults": self._faults.name,
            "arrivals": "spread" if self._faults.spread else "recorded",
            "hit_rate": round(outcome.hit_rate, 4),
            "hit_rate_meanwhile": round(_hit_rate(outcome, self._from_s, self._to_s), 4),
            "ttft_s_mean": round(outcome.ttft_mean, 3),
            "ttft_s_p99": round(outcome.ttft(0.99), 3),
            "refused": outcome.refused,
            **counted,
            "healed_s_p50": round(statistics.median(seen.healed_s), 3) if seen.healed_s else None,
            "healed_s_max": round(max(seen.healed_s), 3) if seen.healed_s else None,
            "agreement_min": round(min(one.least for one in agreements), 4),
            "below_s": sum(one.below_s for one in agreements),
            "back_s_max": round(max(one.back_s for one in agreements), 3),
            "audits_compared": audited["compared"],
            "audits_refuted": audited["refuted"],
            "heals": audited["heals"],
        }

    def _meanwhile(self, now_s: float) -> bool:
        return self._from_s <= now_s < self._to_s

    def _lost(self, feed: Feed, message: Published, now_s: float) -> bool:
        if not self._meanwhile(now_s):
            return False
        lost = self._network.random() < self._faults.lost_share
        if isinstance(message, Audit):
            self.seen.audits += 1
            self.seen.lost_audits += lost
        else:
            self.seen.batches += 1
            self.seen.lost_batches += lost
        if lost:
            self.seen.agreements[feed.name].fault_s = now_s
        if lost and isinstance(message, Batch):
            self.cluster.later(now_s + HEALED_S, partial(self._healed, feed, message.sequence, now_s))
        return lost

    def _healed(self, feed: Feed, wanted: int, lost_s: float, now_s: float) -> None:
        """Looks again and again, until the feed has this batch or is of no use any more."""
        healed = feed.closed or (feed.sequence.exact and feed.sequence.position >= wanted)
        if healed or now_s >= self._to_s + AFTER_S:
            self.seen.healed_s.append(now_s - lost_s)
        else:
            self.cluster.later(now_s + HEALED_S, partial(self._healed, feed, wanted, lost_s))

    def _watch(self, router: VirtualRouter, session: Session, turn: Turn, decision: Decision, now_s: float) -> None:
        if not self._meanwhile(now_s):
            return
        known = router.index.match(turn.ids)
        off = sum(
            abs(known.get(name, 0) - worker.held(turn.ids))
            for name, worker in self.cluster.workers.items()
            if not self._down(name, now_s)
        )
        self.seen.decisions += 1
        self.seen.decisions_off += off > 0
        self.seen.pages_off += off
        self.seen.sent_to_dead += self._down(decision.prefill, now_s)

    def _down(self, name: str, now_s: float) -> bool:
        return now_s < self._down_until_s[name]

    def _restart(self, name: str, now_s: float) -> None:
        self.seen.restarts += 1
        self.seen.agreements[name].fault_s = now_s
        self._down_until_s[name] = now_s + self._faults.down_s
        self.cluster.restart(name, self._faults.down_s, now_s)

    def _answer(self, answers: bool, now_s: float) -> None:
        for source in self.cluster.sources.values():
            source.answers = answers

    def _look_at_all(self, now_s: float) -> None:
        for name, agreement in self.seen.agreements.items():
            share = self._agreement(name, now_s)
            if share < AGREED:
                self.cluster.later(now_s + AGAIN_S, partial(self._look_again, name))
            else:
                agreement.looked(share, now_s)
        for _, audited in self._router.audits:
            self.seen.audit_agreement_min = min(self.seen.audit_agreement_min, audited.agreement)

    def _look_again(self, name: str, now_s: float) -> None:
        self.seen.agreements[name].looked(self._agreement(name, now_s), now_s)

    def _agreement(self, name: str, now_s: float) -> float:
        held = set() if self._down(name, now_s) else set(self.cluster.sources[name].journal.held)
        known = self._router.index.sample(name, 1, 0)
        return len(held & known) / len(held | known) if held or known else 1.0


def measure(trace: Trace, scenario: Scenario, faults: Faults, window_s: float = WINDOW_S) -> dict[str, Any]:
    """One row. The faults begin after a third of the trace, and go on for another third at most."""
    third_s = _third_s(trace)
    if faults.spread:
        trace = spread(trace)
    run = FaultyRun(scenario, faults, third_s, third_s + min(window_s, third_s))
    return run.row(run.replayed(trace))


def _third_s(trace: Trace) -> float:
    return trace.arrivals()[-1][0] / 3


def _times(first_s: float, end_s: float, period_s: float) -> Iterator[float]:
    """From the first, before the end."""
    number = 0
    while (at_s := first_s + number * period_s) < end_s:
        yield at_s
        number += 1


def _hit_rate(outcome: Outcome, from_s: float, to_s: float) -> float:
    """Of the requests that arrived in this time."""
    kept = [place for place, at_s in enumerate(outcome.arrived_s) if from_s <= at_s < to_s]
    return sum(outcome.hits[place] for place in kept) / max(1, sum(outcome.lengths[place] for place in kept))


def main(words: Sequence[str] | None = None) -> int:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("trace", type=Path, metavar="TRACE", help=f"a file, or a folder with {TRACE}.jsonl")
    options = parser.parse_args(words)
    try:
        trace = suite.open_loop(options.trace, TRACE)
    except (OSError, ValueError) as error:
        print(f"index_faults: {error}", file=sys.stderr)
        return 2
    scenario = Scenario(
        workers=WORKERS, capacity_tokens=CAPACITY_TOKENS, speed=speed_of(trace), page_tokens=trace.page_tokens
    )
    third_s = _third_s(trace)
    rows = []
    for faults in (*ROWS, *(replace(faults, spread=True) for faults in ROWS)):
        report.progress(f"{faults.name}{', spread' if faults.spread else ''}")
        rows.append(measure(trace, scenario, faults))
    result = {
        "benchmark": "index_faults",
        "trace": trace.name,
        "synthetic": trace.synthetic,
        "workers": WORKERS,
        "capacity_tokens": CAPACITY_TOKENS,
        "window_s": [round(third_s, 1), round(third_s + min(WINDOW_S, third_s), 1)],
        "down_s": DOWN_S,
        "lost_share": LOST_SHARE,
        "rows": rows,
    }
    table = [
        (
            row["faults"],
            row["arrivals"],
            f"{100 * row['hit_rate']:.2f}",
            f"{100 * row['hit_rate_meanwhile']:.2f}",
            row["ttft_s_mean"],
            row["batches"] + row["audits"],
            row["lost_batches"] + row["lost_audits"],
            row["restarts"],
            row["decisions"],
            row["decisions_off"],
            row["pages_off"],
            "" if row["healed_s_p50"] is None else row["healed_s_p50"],
            "" if row["healed_s_max"] is None else row["healed_s_max"],
            row["below_s"],
            row["back_s_max"],
            row["audits_compared"],
            row["audit_agreement_min"],
            row["audits_refuted"],
        )
        for row in rows
    ]
    report.publish(result, COLUMNS, table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

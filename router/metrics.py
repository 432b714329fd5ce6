"""Every metric of the router, for Prometheus.

Counters and gauges are read from the ledger, the fleet and the index when somebody
asks, so nothing is counted twice; only histograms and decisions are fed, one request at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from router.admission import Admission
from router.audit import Audits
from router.fleet import FeedMode, Fleet
from router.handoffs import Handoffs
from router.index import Index
from router.ledger import FOLLOWED, Ledger, Record
from router.placement import Placement

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """A registry of its own, so that two routers in one process do not meet."""

    def __init__(
        self,
        ledger: Ledger,
        fleet: Fleet,
        index: Index,
        handoffs: Handoffs,
        audits: Audits,
        placement: Placement,
        admission: Admission,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(ledger, fleet, index, handoffs, admission))
        self._registry.register(_Choices(fleet, audits, placement))
        self._ttft = self._histogram("mainstem_time_to_first_token_seconds", "Until the first bytes of a stream")
        self._itl = self._histogram("mainstem_inter_token_seconds", "Mean time between tokens, one value a request")
        self._total = self._histogram("mainstem_request_seconds", "From choice to end")
        self._queued = self._histogram("mainstem_queue_seconds", "From a request's body to its first dispatch")
        self._served = Counter(
            "mainstem_served",
            "Requests that are over, by how they were served last and what became of them",
            labelnames=["mode", "outcome"],
            registry=self._registry,
        )
        self._decisions = Counter(
            "mainstem_decisions",
            "Requests that are over, by the first word of why they went where they did",
            labelnames=["policy", "reason"],
            registry=self._registry,
        )
        self._first_tokens = Counter(
            "mainstem_first_tokens",
            "Streams that are over, by which of their workers said the first token",
            labelnames=["from"],
            registry=self._registry,
        )

    def ended(self, record: Record) -> None:
        """Takes in a finished request."""
        if record.first_token_from:
            self._first_tokens.labels(record.first_token_from).inc()
        self._served.labels(record.mode, record.outcome.value).inc()
        self._queued.observe(record.queued_s)
        self._decisions.labels(record.decision.policy, _kind(record)).inc()
        for histogram, value in ((self._ttft, record.ttft_s), (self._itl, record.itl_s), (self._total, record.total_s)):
            if value is not None:
                histogram.observe(value)

    def text(self) -> bytes:
        """What `/metrics` answers."""
        text: bytes = generate_latest(self._registry)
        return text

    def _histogram(self, name: str, says: str) -> Histogram:
        return Histogram(name, says, registry=self._registry, buckets=_SECONDS)


def _kind(record: Record) -> str:
    return "unrendered" if record.unrendered else record.decision.kind


class _Collector:
    def __init__(self, ledger: Ledger, fleet: Fleet, index: Index, handoffs: Handoffs, admission: Admission) -> None:
        self._ledger = ledger
        self._fleet = fleet
        self._index = index
        self._handoffs = handoffs
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        totals = self._ledger.totals
        yield CounterMetricFamily("mainstem_requests", "Requests received", value=totals.requests)
        yield CounterMetricFamily("mainstem_errors", "Requests that failed", value=totals.errors)
        yield GaugeMetricFamily("mainstem_waiting_requests", "Requests that wait for room", value=len(self._admission))
        refused = CounterMetricFamily("mainstem_refused", "Requests turned away without being sent", labels=["why"])
        for why in ("full", "late", "no_worker"):
            refused.add_metric([why], self._admission.refused.get(why, 0))
        yield refused
        followed = CounterMetricFamily(
            "mainstem_failed_attempts", "Attempts that failed or were moved, by what followed", labels=["then"]
        )
        for then in (*FOLLOWED, "told"):
            followed.add_metric([then], self._ledger.followed.get(then, 0))
        yield followed
        yield CounterMetricFamily("mainstem_prompt_tokens", "Prompt tokens", value=totals.prompt_tokens)
        yield CounterMetricFamily("mainstem_generated_tokens", "Generated tokens", value=totals.generated_tokens)
        cached = CounterMetricFamily("mainstem_cached_tokens", "Prompt tokens not computed again", labels=["source"])
        cached.add_metric(["predicted"], totals.predicted_cached_tokens)
        cached.add_metric(["engine"], totals.actual_cached_tokens)
        yield cached
        yield GaugeMetricFamily("mainstem_index_pages", "Pages in the index", value=len(self._index))
        yield GaugeMetricFamily("mainstem_index_bytes", "Memory of the index", value=self._index.bytes)
        yield CounterMetricFamily("mainstem_index_evicted_pages", "Pages dropped", value=self._index.evicted)
        yield from self._workers()
        yield from self._moved()

    def _workers(self) -> Iterator[Metric]:
        labels = ["worker", "role"]
        up = GaugeMetricFamily("mainstem_worker_ready", "1 where it takes requests", labels=labels)
        exact = GaugeMetricFamily("mainstem_worker_index_exact", "1 where all its pages are known", labels=labels)
        pages = GaugeMetricFamily("mainstem_worker_held_pages", "Pages it is known to hold", labels=labels)
        inflight = GaugeMetricFamily("mainstem_worker_inflight_requests", "Requests in flight", labels=labels)
        outstanding = GaugeMetricFamily(
            "mainstem_worker_outstanding_uncached_tokens", "Tokens it has yet to compute", labels=labels
        )
        requests = CounterMetricFamily("mainstem_worker_requests", "Requests sent to it", labels=labels)
        for worker in self._fleet:
            key = [worker.name, worker.role]
            up.add_metric(key, worker.state() == "ready")
            exact.add_metric(key, worker.mode is FeedMode.EXACT)
            pages.add_metric(key, self._index.held(worker.name))
            inflight.add_metric(key, worker.inflight_requests)
            outstanding.add_metric(key, worker.outstanding_uncached_tokens)
            requests.add_metric(key, worker.requests)
        yield from (up, exact, pages, inflight, outstanding, requests)

    def _moved(self) -> Iterator[Metric]:
        labels = ["prefill", "decode", "transport"]
        ended = CounterMetricFamily("mainstem_handoffs", "Hand-offs that ended", labels=[*labels, "outcome"])
        seconds = CounterMetricFamily(
            "mainstem_handoff_seconds", "From the first word of a hand-off to its end", labels=[*labels, "outcome"]
        )
        moved = CounterMetricFamily("mainstem_handoff_bytes", "KV moved", labels=labels)
        pages = CounterMetricFamily("mainstem_handoff_pages", "Pages moved", labels=labels)
        ahead = CounterMetricFamily(
            "mainstem_handoff_ahead_pages", "Of them, those that left before SGLang sent them", labels=labels
        )
        handover = CounterMetricFamily(
            "mainstem_handoff_handover_seconds",
            "Of those that went well: without the time in which decode found pages, and prefill computed them",
            labels=labels,
        )
        prefix = CounterMetricFamily(
            "mainstem_handoff_prefix_tokens", "Prompt tokens not moved, as decode held them", labels=labels
        )
        for decode, totals in self._handoffs:
            pair = [totals.prefill, decode, totals.transport]
            ended.add_metric([*pair, totals.outcome], totals.handoffs)
            seconds.add_metric([*pair, totals.outcome], totals.took_s)
            if totals.outcome == "ok":
                moved.add_metric(pair, totals.moved_bytes)
                pages.add_metric(pair, totals.pages)
                ahead.add_metric(pair, totals.ahead_pages)
                handover.add_metric(pair, totals.handover_s)
                prefix.add_metric(pair, totals.prefix_tokens)
        yield from (ended, seconds, handover, moved, pages, ahead, prefix)


class _Choices:
    """What choices are made from: how far the index is right, what work is believed to take, what others would do."""

    def __init__(self, fleet: Fleet, audits: Audits, placement: Placement) -> None:
        self._fleet = fleet
        self._audits = audits
        self._placement = placement

    def collect(self) -> Iterator[Metric]:
        mode = GaugeMetricFamily(
            "mainstem_worker_index_mode", "1 for the mode its pages are known in", labels=["worker", "mode"]
        )
        for worker in self._fleet:
            for one in FeedMode:
                mode.add_metric([worker.name, one.value], worker.mode is one)
        yield mode
        yield from self._audited()
        yield from self._learned()
        yield from self._shadows()

    def _audited(self) -> Iterator[Metric]:
        agreement = GaugeMetricFamily(
            "mainstem_index_audit_agreement",
            "Share of the last sample that both agree on",
            labels=["worker"],
        )
        audits = CounterMetricFamily("mainstem_index_audits", "Samples compared", labels=["worker"])
        refuted = CounterMetricFamily("mainstem_index_audits_refuted", "Samples that differed", labels=["worker"])
        heals = CounterMetricFamily("mainstem_index_heals", "Times a worker's pages were taken anew", labels=["worker"])
        for name, audited in self._audits:
            agreement.add_metric([name], audited.agreement)
            audits.add_metric([name], audited.audits)
            refuted.add_metric([name], audited.refuted)
            heals.add_metric([name], audited.heals)
        yield from (agreement, audits, refuted, heals)

    def _learned(self) -> Iterator[Metric]:
        model = self._placement.model
        constants = GaugeMetricFamily("mainstem_cost_constant", "What the cost model has learned", labels=["name"])
        for name, value in model.constants():
            constants.add_metric([name], value)
        slowness = GaugeMetricFamily(
            "mainstem_cost_worker_slowness", "Its seconds for the same prefills, over the fleet's", labels=["worker"]
        )
        for name, value in model.slowness():
            slowness.add_metric([name], value)
        bandwidth = GaugeMetricFamily(
            "mainstem_cost_handoff_bytes_per_second", "Between a pair, while it writes", labels=["prefill", "decode"]
        )
        for prefill, decode, value in model.bandwidths():
            bandwidth.add_metric([prefill, decode], value)
        observed = CounterMetricFamily(
            "mainstem_cost_observations", "Stretches of prefills learned from", value=model.observed_prefills
        )
        yield from (constants, slowness, bandwidth, observed)
        yield GaugeMetricFamily(
            "mainstem_expected_requests",
            "Requests with pages expected before their events",
            len(self._placement.expected),
        )

    def _shadows(self) -> Iterator[Metric]:
        hits = GaugeMetricFamily(
            "mainstem_shadow_hit_ratio", "Cached of all prompt tokens, had this policy chosen", labels=["policy"]
        )
        imbalance = GaugeMetricFamily(
            "mainstem_shadow_imbalance",
            "Tokens computed by the busiest worker over the mean",
            labels=["policy"],
        )
        requests = CounterMetricFamily("mainstem_shadow_requests", "Requests it saw", labels=["policy"])
        for shadow in self._placement.shadows:
            hits.add_metric([shadow.policy.name], shadow.hit_rate)
            imbalance.add_metric([shadow.policy.name], shadow.imbalance)
            requests.add_metric([shadow.policy.name], shadow.requests)
        yield from (hits, imbalance, requests)

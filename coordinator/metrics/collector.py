"""How do a coordinator's numbers become Prometheus' metric families?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvrelay.coordinator.metrics.histogram import Histogram
from kvrelay.coordinator.metrics.requests import RequestMetrics
from kvrelay.coordinator.metrics.sources import IndexFigures, Sources, WorkerReport
from kvrelay.v1 import cluster_pb2, worker_pb2

FamilyT = TypeVar("FamilyT", CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily)
_PerWorker: TypeAlias = tuple[str, str, Callable[[WorkerReport], float]]

_PER_WORKER: list[_PerWorker] = [
    ("running_requests", "Sequences that are its to generate", lambda r: r.view.num_running_requests),
    ("queued_prompts", "Prompts that wait for it or are computed", lambda r: r.view.num_queued_prompts),
    ("queued_prompt_tokens", "Tokens of these that it has to compute", lambda r: r.view.num_queued_prompt_tokens),
    ("context_tokens", "Tokens of its sequences, prompts and generated", lambda r: r.view.num_context_tokens),
    ("avoided", "Whether it gets nothing for a while, as it failed requests or is slow", lambda r: r.view.avoided),
    ("engine_running_requests", "Sequences in its engine's batch", lambda r: r.status.num_running_requests),
    ("engine_waiting_requests", "Sequences that wait for its engine", lambda r: r.status.num_waiting_requests),
    ("engine_kv_usage_ratio", "Share of its engine's KV blocks in use", lambda r: r.status.engine_kv_usage),
]
_OF_INDEX: list[tuple[str, str, Callable[[IndexFigures], float]]] = [
    ("entries", "Pairs of a block and a worker that has it", lambda index: index.num_entries),
    ("speculated_entries", "Of these, those that a request in flight promises", lambda index: index.num_speculated),
    ("blocks", "Different blocks", lambda index: index.num_blocks),
    ("bytes", "Memory of this copy", lambda index: index.size_bytes),
    ("lag_seconds", "From when the newest delta was published until it was applied", lambda index: index.lag_s),
    ("etcd_keys", "Deltas that etcd holds", lambda index: index.num_etcd_keys),
    ("etcd_bytes", "Size of these", lambda index: index.etcd_bytes),
    ("writes_per_second", "Deltas of workers that came in the last second", lambda index: index.writes_per_s),
]
_SLOT_STATES: dict[str, Callable[[worker_pb2.BlockStoreStatus], int]] = {
    "free": lambda store: store.num_free,
    "reserved": lambda store: store.num_reserved,
    "pinned": lambda store: store.num_pinned,
    "evictable": lambda store: store.num_evictable,
    "granted": lambda store: store.num_granted,
}


class CoordinatorCollector(Collector):
    """Everything that carries the label `coordinator`. Reads the sources when it is asked, and keeps nothing."""

    def __init__(self, coordinator_id: str, requests: RequestMetrics, sources: Sources) -> None:
        self._own = [coordinator_id]
        self._requests = requests
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        """The families of this moment."""
        yield from self._of_latencies()
        yield from self._of_requests()
        yield from self._of_workers(self._sources.workers())
        if index := self._sources.index():
            yield from self._of_index(index)
        is_leader = self._sources.is_leader()
        yield self._gauge("is_leader", "Whether this coordinator does the cluster's chores", is_leader)

    def _of_latencies(self) -> Iterator[Metric]:
        requests = self._requests
        yield self._histogram("ttft_seconds", "From a request's arrival to its first token", requests.ttft_s)
        yield self._histogram("itl_seconds", "Between messages with tokens of a completion", requests.itl_s)
        yield self._histogram("e2e_seconds", "From arrival to last token, of requests that are ok", requests.e2e_s)
        yield self._histogram("schedule_seconds", "To choose the workers of a request", requests.schedule_s)

    def _of_requests(self) -> Iterator[Metric]:
        requests = self._requests
        outcomes = self._labelled(CounterMetricFamily, "requests", "Requests that are over", "outcome")
        for outcome, number in requests.num_by_outcome.items():
            outcomes.add_metric([*self._own, outcome], number)
        yield outcomes
        refused = self._labelled(CounterMetricFamily, "refused_requests", "Requests that no worker got", "reason")
        for reason, number in requests.num_refused.items():
            refused.add_metric([*self._own, reason], number)
        yield refused
        decisions = self._labelled(CounterMetricFamily, "decisions", "Choices of workers", "policy", "kind")
        for (policy, kind), number in requests.num_decided.items():
            decisions.add_metric([*self._own, policy, kind], number)
        yield decisions
        yield self._counter("replanned_requests", "Plans made after a worker was lost", requests.num_replanned)
        yield self._gauge("in_flight_requests", "Requests that workers have", requests.num_in_flight)
        yield self._gauge("queued_requests", "Requests that wait for their turn", self._sources.queue_depth())
        yield self._counter("prompt_tokens", "Tokens of prompts", requests.num_prompt_tokens)
        yield self._counter("cached_tokens", "Prompt tokens that were not computed again", requests.num_cached_tokens)
        yield self._counter("generated_tokens", "Tokens generated", requests.num_generated_tokens)

    def _of_workers(self, reports: Sequence[WorkerReport]) -> Iterator[Metric]:
        info = self._labelled(GaugeMetricFamily, "worker_info", "Workers connected now", "worker", "role", "model")
        slots = self._labelled(
            GaugeMetricFamily, "worker_store_slots", "Blocks of its host store by state", "worker", "state"
        )
        for report in reports:
            worker_id = report.view.worker_id
            role = cluster_pb2.Role.Name(report.view.role).removeprefix("ROLE_").lower()
            info.add_metric([*self._own, worker_id, role, report.view.model], 1)
            for state, read in _SLOT_STATES.items():
                slots.add_metric([*self._own, worker_id, state], read(report.status.store))
        yield info
        yield slots
        for name, text, value in _PER_WORKER:
            family = self._labelled(GaugeMetricFamily, f"worker_{name}", text, "worker")
            for report in reports:
                family.add_metric([*self._own, report.view.worker_id], value(report))
            yield family

    def _of_index(self, index: IndexFigures) -> Iterator[Metric]:
        for name, text, value in _OF_INDEX:
            yield self._gauge(f"prefix_index_{name}", text, value(index))
        yield self._counter("prefix_index_rebuilds", "Times it was read anew from etcd", index.num_rebuilds)
        yield self._counter("prefix_index_writes", "Deltas of workers that came from etcd", index.num_writes)

    def _histogram(self, name: str, text: str, values: Histogram) -> Metric:
        family = self._labelled(HistogramMetricFamily, name, text)
        family.add_metric(self._own, [(_bound(le), count) for le, count in values.cumulative()], values.sum)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = self._labelled(GaugeMetricFamily, name, text)
        family.add_metric(self._own, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = self._labelled(CounterMetricFamily, name, text)
        family.add_metric(self._own, value)
        return family

    @staticmethod
    def _labelled(kind: type[FamilyT], name: str, text: str, *labels: str) -> FamilyT:
        return kind(f"kvrelay_{name}", f"{text}.", labels=["coordinator", *labels])


def _bound(upper: float) -> str:
    return "+Inf" if upper == math.inf else str(upper)

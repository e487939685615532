"""A page of metrics, as a Prometheus server reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from kvrelay.coordinator.metrics.collector import CoordinatorCollector
from kvrelay.coordinator.metrics.exposition import Exposition
from kvrelay.coordinator.metrics.requests import RequestMetrics
from kvrelay.coordinator.metrics.sources import IndexFigures, Sources, WorkerReport
from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.v1 import cluster_pb2, worker_pb2

Labels = tuple[tuple[str, str], ...]


def worker(worker_id: str) -> WorkerReport:
    view = WorkerView(
        worker_id=worker_id,
        role=cluster_pb2.ROLE_DECODE,
        model='m"\\',
        address="h:1",
        fingerprint=b"",
        block_size_tokens=16,
        max_model_len_tokens=100,
        num_queued_prompt_tokens=300,
        num_running_requests=3,
    )
    store = worker_pb2.BlockStoreStatus(num_free=5, num_pinned=2)
    return WorkerReport(view=view, status=worker_pb2.WorkerStatus(engine_kv_usage=0.25, store=store))


def page(sources: Sources, metrics: RequestMetrics | None = None) -> str:
    exposition = Exposition([CoordinatorCollector("c1", metrics or RequestMetrics(), sources)])
    body, content_type = exposition.page("")
    assert content_type.startswith("text/plain")
    return body.decode()


def samples(text: str) -> dict[tuple[str, Labels], float]:
    """Sample and labels but `coordinator`, which all of ours have, -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.name.startswith("kvrelay_"):
                assert sample.labels.pop("coordinator") == "c1"
                assert family.documentation
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def sources(workers: Sequence[WorkerReport] = (), index: IndexFigures | None = None) -> Sources:
    return Sources(workers=lambda: workers, index=lambda: index, queue_depth=lambda: 4)


def test_counters_begin_at_nothing_so_that_their_first_increase_is_seen() -> None:
    found = samples(page(sources()))
    assert {
        labels[0][1]: value for (name, labels), value in found.items() if name == "kvrelay_requests_total"
    } == dict.fromkeys(("ok", "failed", "cancelled", "refused"), 0.0)
    assert found["kvrelay_refused_requests_total", (("reason", "overloaded"),)] == 0
    assert found["kvrelay_in_flight_requests", ()] == 0
    assert found["kvrelay_queued_requests", ()] == 4


def test_durations_are_histograms() -> None:
    metrics = RequestMetrics(lambda: 10.0)
    metrics.started("r", ["r"], arrived_s=9.0, num_prompt_tokens=7)
    metrics.take([worker_pb2.TokenDelta(request_id="r", token_ids=[1], num_cached_tokens=4)])
    metrics.decided("cost", "local", 0.0002)
    found = samples(page(sources(), metrics))
    buckets = {
        float(labels[0][1]): value for (name, labels), value in found.items() if name == "kvrelay_ttft_seconds_bucket"
    }
    assert buckets[0.5] == 0
    assert buckets[1.0] == buckets[float("inf")] == found["kvrelay_ttft_seconds_count", ()] == 1
    assert found["kvrelay_ttft_seconds_sum", ()] == 1
    assert found["kvrelay_cached_tokens_total", ()] == 4
    assert found["kvrelay_decisions_total", (("kind", "local"), ("policy", "cost"))] == 1
    assert found["kvrelay_schedule_seconds_sum", ()] == pytest.approx(0.0002)


def test_workers_are_told_as_the_scheduler_sees_them() -> None:
    found = samples(page(sources([worker("d1"), worker("d2")])))
    assert found["kvrelay_worker_info", (("model", 'm"\\'), ("role", "decode"), ("worker", "d1"))] == 1
    assert found["kvrelay_worker_queued_prompt_tokens", (("worker", "d2"),)] == 300
    assert found["kvrelay_worker_running_requests", (("worker", "d1"),)] == 3
    assert found["kvrelay_worker_engine_kv_usage_ratio", (("worker", "d1"),)] == 0.25
    assert found["kvrelay_worker_store_slots", (("state", "pinned"), ("worker", "d1"))] == 2
    assert not any("d1" in dict(labels).values() for _, labels in samples(page(sources())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    num_entries: int = 9
    num_blocks: int = 5
    num_speculated: int = 1
    size_bytes: int = 700
    lag_s: float = 0.5
    num_rebuilds: int = 2
    num_etcd_keys: int = 3
    etcd_bytes: int = 800
    num_writes: int = 30
    writes_per_s: float = 4.5


def test_the_index_is_told_when_there_is_one() -> None:
    found = samples(page(sources(index=Figures())))
    assert {name.removeprefix("kvrelay_prefix_index_"): v for (name, _), v in found.items() if "_index_" in name} == {
        "entries": 9,
        "speculated_entries": 1,
        "blocks": 5,
        "bytes": 700,
        "lag_seconds": 0.5,
        "etcd_keys": 3,
        "etcd_bytes": 800,
        "writes_per_second": 4.5,
        "rebuilds_total": 2,
        "writes_total": 30,
    }
    assert "_index_" not in page(sources())


def test_a_server_that_prefers_openmetrics_gets_it() -> None:
    exposition = Exposition([CoordinatorCollector("c1", RequestMetrics(), sources())])
    body, content_type = exposition.page("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics.text_string_to_metric_families(body.decode())}  # type: ignore[no-untyped-call]
    assert {"kvrelay_requests", "kvrelay_itl_seconds", "process_cpu_seconds"} <= names


def test_a_process_without_a_coordinator_tells_of_itself_only() -> None:
    body, _ = Exposition().page("")
    found = samples(body.decode())
    assert found["process_resident_memory_bytes", ()] > 0
    assert not any(name.startswith("kvrelay_") for name, _ in found)

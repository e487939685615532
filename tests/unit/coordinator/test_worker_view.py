"""Does the scheduler see what workers say of themselves?"""

from __future__ import annotations

import math

import pytest

from kvrelay.coordinator.worker_view import drain_s_of, take_speeds, view_of
from kvrelay.step_times.model import StepTimes
from kvrelay.v1 import cluster_pb2, worker_pb2

LAYOUT = cluster_pb2.KvLayout(
    dtype="bfloat16", num_layers=30, num_kv_heads=3, head_elements=128, block_size_tokens=32, fingerprint=b"f"
)


def test_a_record_tells_what_a_worker_holds() -> None:
    worker = cluster_pb2.WorkerInfo(
        worker_id="d1", layout=LAYOUT, num_engine_blocks=100, max_running_requests=8, weight=2.5
    )
    view = view_of(worker)
    assert (view.token_bytes, view.capacity_tokens) == (2 * 30 * 3 * 128, 3200)
    assert (view.max_running_requests, view.weight, view.fingerprint, view.draining) == (8, 2.5, b"f", False)


def test_what_a_record_leaves_out_is_unknown_and_not_nothing() -> None:
    view = view_of(cluster_pb2.WorkerInfo(worker_id="d1", layout=cluster_pb2.KvLayout(dtype="posit")))
    assert (view.token_bytes, view.capacity_tokens, view.max_running_requests, view.weight) == (0, 0, 0, 1.0)
    assert view_of(cluster_pb2.WorkerInfo(state=cluster_pb2.WORKER_STATE_DRAINING)).draining


def test_a_report_tells_how_fast_a_worker_is() -> None:
    view = view_of(cluster_pb2.WorkerInfo(worker_id="d1"))
    take_speeds(view, worker_pb2.WorkerStatus())
    assert (view.times, view.link_bytes_per_s) == (StepTimes(), {})
    times = StepTimes(prefill_token_s=1e-3, num_prefills=7)
    links = [worker_pb2.LinkSpeed(address="d2:1", bytes_per_s=5e8)]
    take_speeds(view, worker_pb2.WorkerStatus(step_times=times.to_proto(), links=links))
    assert (view.times, dict(view.link_bytes_per_s)) == (times, {"d2:1": 5e8})


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -1.0])
def test_what_cannot_be_is_unknown(nonsense: float) -> None:
    worker = cluster_pb2.WorkerInfo(worker_id="d1", weight=nonsense, drain_s=nonsense)
    view = view_of(worker)
    assert (view.weight, drain_s_of(worker)) == (1.0, 0.0)
    links = [worker_pb2.LinkSpeed(address="d2:1", bytes_per_s=nonsense)]
    times = cluster_pb2.StepTimes(prefill_token_s=nonsense)
    take_speeds(view, worker_pb2.WorkerStatus(step_times=times, links=links))
    assert (view.times, dict(view.link_bytes_per_s)) == (StepTimes(), {})

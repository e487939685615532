"""What does the scheduler see of a worker's record, and of what the worker reports?"""

from __future__ import annotations

import math
from dataclasses import astuple

from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.kv_transfer.part_shape import ITEM_BYTES
from kvrelay.step_times.model import StepTimes
from kvrelay.v1 import cluster_pb2, worker_pb2


def view_of(worker: cluster_pb2.WorkerInfo) -> WorkerView:
    """Without any load."""
    layout = worker.layout
    return WorkerView(
        worker_id=worker.worker_id,
        role=worker.role,
        model=worker.model,
        address=worker.address,
        fingerprint=layout.fingerprint,
        block_size_tokens=layout.block_size_tokens,
        max_model_len_tokens=worker.max_model_len_tokens,
        token_bytes=_token_bytes(layout),
        capacity_tokens=worker.num_engine_blocks * layout.block_size_tokens,
        max_running_requests=worker.max_running_requests,
        weight=worker.weight if _is_number(worker.weight) and worker.weight > 0 else 1.0,
        draining=worker.state == cluster_pb2.WORKER_STATE_DRAINING,
    )


def take_speeds(view: WorkerView, status: worker_pb2.WorkerStatus) -> None:
    """How fast the worker is; one that has measured nothing, or what cannot be, keeps the defaults."""
    times = StepTimes.of(status.step_times) if status.HasField("step_times") else view.times
    if all(_is_number(seconds) for seconds in astuple(times)):
        view.times = times
    view.link_bytes_per_s = {link.address: link.bytes_per_s for link in status.links if _is_number(link.bytes_per_s)}


def drain_s_of(worker: cluster_pb2.WorkerInfo) -> float:
    """How long the requests of a worker that drains may go on."""
    return worker.drain_s if _is_number(worker.drain_s) else 0.0


def _is_number(value: float) -> bool:
    """Records and reports come from other processes: whatever they say, requests must be planned by it."""
    return 0 <= value < math.inf


def _token_bytes(layout: cluster_pb2.KvLayout) -> int:
    """0 for an element type of which the size is not known."""
    return layout.num_layers * layout.num_kv_heads * layout.head_elements * ITEM_BYTES.get(layout.dtype, 0)

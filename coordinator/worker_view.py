"""What does the scheduler see of a worker's record, and of what the worker reports?"""

from __future__ import annotations

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
        weight=worker.weight or 1.0,
        draining=worker.state == cluster_pb2.WORKER_STATE_DRAINING,
    )


def take_speeds(view: WorkerView, status: worker_pb2.WorkerStatus) -> None:
    """How fast the worker is; one that has measured nothing keeps the defaults."""
    if status.HasField("step_times"):
        view.times = StepTimes.of(status.step_times)
    view.link_bytes_per_s = {link.address: link.bytes_per_s for link in status.links}


def _token_bytes(layout: cluster_pb2.KvLayout) -> int:
    """0 for an element type of which the size is not known."""
    return layout.num_layers * layout.num_kv_heads * layout.head_elements * ITEM_BYTES.get(layout.dtype, 0)

"""What does a worker tell of itself? Gauges of this moment, and counters."""

from __future__ import annotations

from kvrelay.v1 import worker_pb2
from kvrelay.worker.host import WorkerHost


def worker_status(host: WorkerHost, worker_id: str) -> worker_pb2.WorkerStatus:
    """Of the host, under this id."""
    load, usage = host.load, host.store.usage()
    return worker_pb2.WorkerStatus(
        worker_id=worker_id,
        num_running_requests=load.num_running_requests,
        num_waiting_requests=max(0, host.num_requests - load.num_running_requests),
        num_queued_prompts=host.num_queued_prompts,
        num_queued_prompt_tokens=host.num_queued_tokens,
        num_computed_prompt_tokens=host.num_computed_tokens,
        engine_kv_usage=load.kv_usage,
        num_incoming_transfers=host.receiver.num_transfers,
        num_outgoing_transfers=host.peers.num_transfers,
        counters=host.counters,
        num_prefill_jobs=host.jobs["prefill"],
        num_decode_jobs=host.jobs["decode"],
        num_context_tokens=host.num_context_tokens,
        step_times=host.timer.times.to_proto(),
        links=host.link_speeds,
        store=worker_pb2.BlockStoreStatus(
            num_slots=usage.num_slots,
            num_free=usage.num_free,
            num_reserved=usage.num_reserved,
            num_pinned=usage.num_pinned,
            num_evictable=usage.num_evictable,
            num_granted=usage.num_granted,
            slot_bytes=host.segment.slot_bytes,
            disk_bytes=host.disk.size_bytes if host.disk else 0,
            num_disk_blocks=host.disk.num_blocks if host.disk else 0,
        ),
    )
